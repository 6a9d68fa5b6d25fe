"""The tensors of a checkpoint, and whether they are finite."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def named_tensors(
    model_parts: list[nn.Module], optimizers: list[torch.optim.Optimizer]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and optimizer state of this rank, each with its name; shards are DTensors."""
    names: dict[torch.Tensor, str] = {}
    for part in model_parts:
        for name, parameter in part.named_parameters():
            names[parameter] = name
            yield name, parameter
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    yield f"{key} of {names.get(parameter, 'a weight')}", value


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first tensor of which this rank holds a value that is not finite.

    Waits for the device once.
    """
    names, flags = [], []
    with torch.no_grad():
        for name, tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.is_floating_point() and local.numel():
                names.append(name)
                flags.append(is_finite(local))
        devices = {flag.device for flag in flags}
        # Fused optimizers count their steps on the device, others on the host.
        device = next((each for each in devices if each.type != "cpu"), torch.device("cpu"))
        finite = torch.stack([flag.to(device) for flag in flags]).tolist() if flags else []
    return next((name for name, good in zip(names, finite, strict=True) if not good), None)


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all of a tensor is finite, as a scalar on its device.

    NaN and infinities show in the extremes, which take no temporary as large as the tensor.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.tensor(True, device=tensor.device)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()
