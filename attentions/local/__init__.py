"""Attention restricted to a neighbourhood of the query."""
