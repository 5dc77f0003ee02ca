"""Everything that runs: composing, training, measuring, storing, reporting."""
