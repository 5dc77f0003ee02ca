"""Linear attention: a fixed-size state, written with keys and values and read with queries."""
