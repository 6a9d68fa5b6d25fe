"""Llama 3 with Lighthouse attention: what this fork adds to torchtitan.

``train_spec`` registers the model; ``train`` is the program that trains it.
"""

from .infra.cpu import use_cpu_without_accelerator

# Before any module copies the name of the device from torchtitan.
use_cpu_without_accelerator()
