"""What a trained model is worth: held-out loss, retrieval, and what it knows of later tokens."""
