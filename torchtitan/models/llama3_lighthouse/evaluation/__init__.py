"""Measurements of trained models: held-out loss, retrieval, and knowledge of later tokens."""
