"""Training text: where it comes from, how it becomes tokens, and how those fill sequences."""
