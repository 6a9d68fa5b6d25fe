"""A CPU stand-in for the device that torchtitan looks for.

torchtitan looks for a device once, in ``torchtitan.tools.utils``. When there is none it takes CUDA,
and other modules copy that answer as they are imported. ``use_cpu_without_accelerator`` puts the
stand-in there and into every copy.
"""

import math
import resource
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch.distributed.fsdp import FSDPModule
from torchtitan.tools import utils


class CPUDevice:
    """The part of ``torch.cuda``'s interface that torchtitan calls, answered for the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: object = None) -> str:
        return "CPU"

    def get_device_properties(self, device: object = None) -> SimpleNamespace:
        return SimpleNamespace(name="CPU", total_memory=psutil.virtual_memory().total)

    def memory_stats(self, device: object = None) -> dict[str, int]:
        """Peak resident memory of this process since it started, in bytes.

        Operating systems offer no portable way to reset the peak. Unlike on a GPU, it never falls
        from one log line to the next.
        """
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts in KiB, macOS in bytes.
        peak *= 1 if sys.platform == "darwin" else 1024
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: object = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def no_peak_flops(device_name: str) -> float:
    """Infinity: a CPU's peak is not known, and a share of it would not be true."""
    return math.inf


def use_cpu_without_accelerator() -> None:
    """Point torchtitan at the CPU when torch sees no accelerator; otherwise do nothing."""
    if torch.accelerator.is_available():
        return
    stand_in: dict[str, Any] = {"device_type": "cpu", "device_module": CPUDevice()}
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan."):
            vars(module).update({key: stand_in[key] for key in stand_in if key in vars(module)})
    # Modules that are imported later ask again.
    utils.get_device_info = lambda: (stand_in["device_type"], stand_in["device_module"])
    utils.get_peak_flops = no_peak_flops


def use_sum_reductions(model: torch.nn.Module) -> None:
    """Make FSDP reduce gradients with plain sums, which gloo supports.

    torchtitan sets a gradient divide factor of one. FSDP would express it as a pre-multiplied sum,
    which only NCCL has.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
