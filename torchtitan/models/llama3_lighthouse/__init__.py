"""Llama 3 with Lighthouse attention: everything that this fork adds to torchtitan.

``train`` trains the model; ``train_spec`` registers it with torchtitan.
"""

from .infra.cpu import use_cpu_without_accelerator

# Other modules copy the name of the device from torchtitan when they are imported.
use_cpu_without_accelerator()
