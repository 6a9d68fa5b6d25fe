"""Checkpoints: what is saved, what may be loaded, and what a run may go on from."""
