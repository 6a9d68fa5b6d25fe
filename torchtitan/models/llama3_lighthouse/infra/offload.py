"""Layer inputs in host memory between forward and backward: ``offload_inputs``.

Our own, because torch's ``save_on_cpu`` copies on the compute stream, and the compiler's offloading
ends with a graph, which here is one layer.

A layer's input goes to the layer's pinned buffer while that layer runs forward, and comes back
while the layer after it runs backward. One more stream makes all copies, in order, so that a buffer
is not written before it has been read. Memory on the device is the compute stream's alone, and two
rules keep it from changing hands early, whatever the timing and without ``record_stream``:

- a copy begins after all work queued before it: what computes its source or last used its target;
- where a tensor that was copied from is dropped, or one that was copied to is used, the compute
  stream waits for all copies queued so far.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

# At most, in backward: the one in use and the one on its way. In forward, one.
INPUTS_ON_DEVICE = 2


@dataclass
class _Input:
    """One layer's input, of its latest forward pass."""

    host: torch.Tensor | None = None
    """Made in the first pass and used in all others."""
    device: torch.Tensor | None = None
    """While it is there, or on its way there."""
    passes: int = 0
    """Forward passes that have written to the host."""


class LayerInputOffload:
    """Offloads from now on what backward saves of the inputs of ``layers``.

    A forward pass without gradients changes nothing. One with them overwrites what the last one
    left on the host, so its backward has to come before the next one's forward.

    Args:
        layers: called one after another in this order, with a [B, N, dim] tensor as their first
            argument, which backward has to save. FSDP, whose hooks may cast it, has to have been
            applied.

    Raises:
        RuntimeError: from a layer's forward, whose input is not saved; from a backward that comes
            after the next forward.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.inputs: list[_Input] = []
        self.copies = None
        self._hooks: saved_tensors_hooks | None = None
        self._is_saved = False
        for number, layer in enumerate(layers):
            self.inputs.append(_Input())
            layer.register_forward_pre_hook(partial(self._enter, number))
            layer.register_forward_hook(self._leave, always_call=True)

    def _enter(self, number: int, layer: nn.Module, arguments: tuple) -> None:
        if not torch.is_grad_enabled():
            return
        x = arguments[0].detach()
        if self.copies is None:
            self._device, self._streams = x.device, torch.get_device_module(x.device)
            self.copies = self._streams.Stream()
        self._wait_for_copies()
        for earlier in self.inputs:
            earlier.device = None
        mine = self.inputs[number]
        if mine.host is None or (mine.host.shape, mine.host.dtype) != (x.shape, x.dtype):
            mine.host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        mine.device = x
        mine.passes += 1
        self._copy(mine.host, x)
        self._is_saved = False
        self._hooks = saved_tensors_hooks(partial(self._pack, number), self._unpack)
        self._hooks.__enter__()

    def _leave(self, layer: nn.Module, arguments: tuple, output: torch.Tensor | None) -> None:
        if self._hooks is None:
            return
        self._hooks.__exit__()
        self._hooks = None
        # There is no output where forward raised an error.
        if output is not None and not self._is_saved:
            raise RuntimeError(
                "activation_checkpoint.offload_inputs = true: backward does not save the input "
                f"{tuple(arguments[0].shape)} of a layer as it is; set it to false"
            )

    def _pack(self, number: int, tensor: torch.Tensor) -> torch.Tensor | tuple[int, int]:
        mine = self.inputs[number]
        # Subclasses are those of tracing, without memory.
        if (
            type(tensor) is torch.Tensor
            and tensor.data_ptr() == mine.device.data_ptr()
            and (tensor.shape, tensor.stride()) == (mine.device.shape, mine.device.stride())
            and tensor.dtype == mine.device.dtype
        ):
            self._is_saved = True
            return number, mine.passes
        return tensor

    def _unpack(self, packed: torch.Tensor | tuple[int, int]) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        number, passes = packed
        mine = self.inputs[number]
        if passes != mine.passes:
            raise RuntimeError(
                "activation_checkpoint.offload_inputs = true: another forward pass has taken the "
                "place of this one's layer inputs; run backward before it"
            )
        self._fetch(number)
        self._wait_for_copies()
        x, mine.device = mine.device, None
        if number > 0:
            self._fetch(number - 1)
        return x

    def _fetch(self, number: int) -> None:
        mine = self.inputs[number]
        if mine.device is None:
            mine.device = torch.empty_like(mine.host, device=self._device, pin_memory=False)
            self._copy(mine.device, mine.host)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.copies.wait_stream(self._streams.current_stream())
        with self._streams.stream(self.copies):
            target.copy_(source, non_blocking=True)

    def _wait_for_copies(self) -> None:
        self._streams.current_stream().wait_stream(self.copies)
