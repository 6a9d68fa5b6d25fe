"""Layer inputs in host memory between forward and backward: ``offload_inputs``.

torch has two ways to do this, and neither fits. ``save_on_cpu`` copies on the compute stream, so
layers wait for copies. The compiler's offloading works within one graph, and a graph here is one
layer.

A layer's input is copied to a pinned host buffer while the layer runs forward. It is copied back
while the next layer runs backward. A second stream makes all copies, in the order in which they
were queued, so that a buffer is read before it is written again.

Device memory is allocated on the compute stream only. torch may therefore reuse a tensor's memory
as soon as the tensor is dropped, although a copy of it is still queued. Two rules prevent that,
whatever the timing and without ``record_stream``:

- A copy begins after all work that the compute stream had queued before it. Its source has been
  computed by then, and the last use of its target's memory is over.
- The compute stream waits for all copies queued so far before the source of a copy is dropped, and
  before the target of a copy is used.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

# At most so many inputs are on the device. Backward holds one in use and one on its way; forward
# holds one.
INPUTS_ON_DEVICE = 2


@dataclass
class _Input:
    """The input of one layer in its latest forward pass.

    Attributes:
        host: pinned buffer, allocated in the first pass and reused in all others.
        device: the input itself while it is on the device or on its way there, otherwise None.
        passes: forward passes that have written to ``host``.
    """

    host: torch.Tensor | None = None
    device: torch.Tensor | None = None
    passes: int = 0


class LayerInputOffload:
    """Offloads the inputs of ``layers`` that autograd saves for backward, from now on.

    Forward passes without gradients are left alone. A forward pass with gradients overwrites what
    the one before it left on the host. Each backward therefore has to run before the next forward.

    Args:
        layers: called one after another in this order. The first argument of each is a
            [B, N, dim] tensor that autograd saves for backward. Apply FSDP first, because its hooks
            may cast that tensor.

    Raises:
        RuntimeError: in a layer's forward, if autograd does not save its input; in a backward that
            runs after the next forward.
    """

    # The first forward pass sets both, because it shows the device.
    copies: torch.Stream
    _streams: ModuleType

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.inputs: list[_Input] = []
        self._device: torch.device | None = None
        self._hooks: saved_tensors_hooks | None = None
        self._is_saved = False
        for number, layer in enumerate(layers):
            self.inputs.append(_Input())
            layer.register_forward_pre_hook(partial(self._enter, number))
            layer.register_forward_hook(self._leave, always_call=True)

    def _enter(self, number: int, layer: nn.Module, arguments: tuple) -> None:
        """Start to copy the layer's input out, and catch it when autograd saves it."""
        if not torch.is_grad_enabled():
            return
        x = arguments[0].detach()
        if self._device is None:
            self._streams = torch.get_device_module(x.device)
            self.copies = self._streams.Stream()
            self._device = x.device
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
        """Stop catching what autograd saves."""
        if self._hooks is None:
            return
        self._hooks.__exit__()
        self._hooks = None
        # There is no output where forward raised an error.
        if output is not None and not self._is_saved:
            raise RuntimeError(
                "activation_checkpoint.offload_inputs = true: autograd does not save the input "
                f"{tuple(arguments[0].shape)} of a layer as it is; set it to false"
            )

    def _pack(self, number: int, tensor: torch.Tensor) -> torch.Tensor | tuple[int, int]:
        """Save a layer's input as its number and pass, and any other tensor as it is."""
        mine = self.inputs[number]
        x = mine.device
        # While a compiler traces, tensors are of subclasses that have no memory.
        if (
            type(tensor) is torch.Tensor
            and x is not None
            and tensor.data_ptr() == x.data_ptr()
            and (tensor.shape, tensor.stride()) == (x.shape, x.stride())
            and tensor.dtype == x.dtype
        ):
            self._is_saved = True
            return number, mine.passes
        return tensor

    def _unpack(self, packed: torch.Tensor | tuple[int, int]) -> torch.Tensor:
        """Wait for a layer's input, and start to fetch that of the layer before it."""
        if isinstance(packed, torch.Tensor):
            return packed
        number, passes = packed
        mine = self.inputs[number]
        if passes != mine.passes:
            raise RuntimeError(
                "activation_checkpoint.offload_inputs = true: another forward pass has taken the "
                "place of this one's layer inputs; run backward before it"
            )
        x = self._fetch(number)
        self._wait_for_copies()
        mine.device = None
        if number > 0:
            self._fetch(number - 1)
        return x

    def _fetch(self, number: int) -> torch.Tensor:
        """The input of a layer, which may still be on its way to the device."""
        mine = self.inputs[number]
        if mine.device is None:
            assert mine.host is not None, "forward copies every layer's input to the host"
            mine.device = torch.empty_like(mine.host, device=self._device, pin_memory=False)
            self._copy(mine.device, mine.host)
        return mine.device

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.copies.wait_stream(self._streams.current_stream())
        with self._streams.stream(self.copies):
            target.copy_(source, non_blocking=True)

    def _wait_for_copies(self) -> None:
        self._streams.current_stream().wait_stream(self.copies)
