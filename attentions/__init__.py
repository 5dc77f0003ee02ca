"""Attention mechanisms: one file each, beside the paper; imports torch and nothing of ours."""
