"""Networks around a mechanism: each takes a TaskSpec and a factory of attention layers, never a config."""
