"""The ``lighthouse`` command. Its modules import torch only to run, so that help comes at once."""
