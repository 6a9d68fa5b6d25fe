"""The ``lighthouse`` command.

No module here imports torch or the trainer at its top, so that ``--help`` answers at once and works
without them.
"""
