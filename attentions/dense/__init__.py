"""Exact softmax attention and its control, no attention."""
