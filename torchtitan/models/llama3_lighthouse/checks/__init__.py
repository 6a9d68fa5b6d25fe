"""Checks of a configuration before anything is built, with one message for each mistake."""
