"""Tasks: data and scoring; imports torch, numpy and datasets and nothing of ours."""
