"""Convolutions and state-space layers."""
