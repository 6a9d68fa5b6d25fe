"""Checkpoints in the format of Hugging Face: out of it, and into it."""
