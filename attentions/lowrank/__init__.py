"""Low-rank attention: keys and values compressed to a fixed number of rows before they are read."""
