"""Layer inputs in host memory between forward and backward: ``offload_inputs``.

Each input goes to a pinned buffer while its layer and the next one run forward, and comes back
while the layer after it runs backward. torch's ``save_on_cpu`` copies on the compute stream, and
the compiler's own offloading ends with a graph, which here is one layer.

One more stream makes all copies, so that a buffer's next copy in follows its last copy out. The
rest is ordered by events, and no tensor is freed while a copy may touch it:

- a copy to the host waits for what computes its source; the source is held until the compute
  stream has been told to wait for that copy, two layers later;
- a copy to the device goes to memory of the compute stream's pool, and waits for all work queued
  there before that memory was given out; the compute stream waits for the copy before its use.

So memory passes from hand to hand in the compute stream's order whatever the timing, peak memory
does not depend on how far ahead of the device Python runs, and ``record_stream`` is not needed.
"""

from collections import deque
from collections.abc import Iterable

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

# Inputs whose copies to the host may be under way while later layers run.
COPIES_UNDER_WAY = 2


class _Offloaded:
    """One layer's input; it lives as long as the autograd graph that saved it."""

    def __init__(
        self, owner: "LayerInputOffload", x: torch.Tensor, host: torch.Tensor, previous
    ) -> None:
        self.owner = owner
        self.host = host
        self.previous = previous
        self.source: torch.Tensor | None = x
        self.fetched: torch.Tensor | None = None
        self.copied, self.arrived = owner.device_module.Event(), owner.device_module.Event()
        owner.stream.wait_stream(owner.compute_stream())
        with owner.device_module.stream(owner.stream):
            self.host.copy_(x, non_blocking=True)
            self.copied.record(owner.stream)
        self.device = x.device

    def let_go_of_source(self) -> None:
        """Drop the tensor on the device, which is then free once the copy of it is made."""
        if self.source is not None:
            self.owner.compute_stream().wait_event(self.copied)
            self.source = None

    def fetch(self) -> None:
        """Begin to bring it back, unless it is there."""
        if self.source is not None or self.fetched is not None:
            return
        self.fetched = torch.empty_like(self.host, device=self.device, pin_memory=False)
        self.owner.stream.wait_stream(self.owner.compute_stream())
        with self.owner.device_module.stream(self.owner.stream):
            self.fetched.copy_(self.host, non_blocking=True)
            self.arrived.record(self.owner.stream)

    def take(self) -> torch.Tensor:
        """The input, for use on the compute stream; begins to fetch that of the layer before."""
        self.fetch()
        if self.source is not None:
            self.owner.compute_stream().wait_event(self.copied)
            taken, self.source = self.source, None
        else:
            self.owner.compute_stream().wait_event(self.arrived)
            taken, self.fetched = self.fetched, None
        if self.previous is not None:
            self.previous.fetch()
            self.previous = None
        return taken

    def __del__(self) -> None:
        self.let_go_of_source()
        if self.fetched is not None:
            self.owner.compute_stream().wait_event(self.arrived)
        self.owner.give_back(self.host)


class LayerInputOffload:
    """Offloads what backward saves of layers' inputs, of every layer given to ``attach``.

    Args:
        device_module: ``torch.cuda``, or another module with its streams and events.
        pin_memory: whether host buffers are page-locked, which copies beside computation need.
    """

    def __init__(self, device_module=torch.cuda, pin_memory: bool = True) -> None:
        self.device_module = device_module
        self.pin_memory = pin_memory
        self.free_buffers: dict[tuple, list[torch.Tensor]] = {}
        self.buffers_made = 0
        self._stream = None
        self._under_way: deque[_Offloaded] = deque()
        self._input: torch.Tensor | None = None
        self._offloaded: _Offloaded | None = None
        self._previous: _Offloaded | None = None
        self._hooks: saved_tensors_hooks | None = None

    @property
    def stream(self):
        """The stream of all copies, made at first use."""
        if self._stream is None:
            self._stream = self.device_module.Stream()
        return self._stream

    def compute_stream(self):
        return self.device_module.current_stream()

    def buffer_like(self, x: torch.Tensor) -> torch.Tensor:
        """A host buffer for ``x``, one that is free if there is."""
        free = self.free_buffers.setdefault((x.shape, x.dtype), [])
        if free:
            return free.pop()
        self.buffers_made += 1
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=self.pin_memory)

    def give_back(self, buffer: torch.Tensor) -> None:
        self.free_buffers[buffer.shape, buffer.dtype].append(buffer)

    def attach(self, layers: Iterable[nn.Module]) -> None:
        """Offload the first argument, [B, N, dim], of each of ``layers``, called in this order.

        To be called after FSDP, whose hooks may cast that argument, has been applied.
        """
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._entering_first if number == 0 else self._entering)
            layer.register_forward_hook(self._leaving, always_call=True)

    def _entering_first(self, layer: nn.Module, arguments: tuple) -> None:
        self._previous = None
        self._entering(layer, arguments)

    def _entering(self, layer: nn.Module, arguments: tuple) -> None:
        if not torch.is_grad_enabled():
            return
        self._input = arguments[0]
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def _leaving(self, layer: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        if self._hooks is None:
            return
        self._hooks.__exit__(None, None, None)
        if self._offloaded is None and isinstance(output, torch.Tensor):
            raise RuntimeError(
                "activation_checkpoint.offload_inputs: backward does not save the input of a "
                f"layer, {tuple(self._input.shape)} in {self._input.dtype}; set it to false"
            )
        self._previous = self._offloaded
        self._input = self._offloaded = self._hooks = None

    def _is_input(self, tensor: torch.Tensor) -> bool:
        x = self._input
        return (
            type(tensor) is torch.Tensor
            and tensor.data_ptr() == x.data_ptr()
            and tensor.numel() == x.numel()
            and tensor.dtype == x.dtype
            and tensor.is_contiguous()
        )

    def _pack(self, tensor: torch.Tensor):
        if not self._is_input(tensor):
            return tensor
        if self._offloaded is None:
            x = tensor.detach().view_as(self._input)
            self._offloaded = _Offloaded(self, x, self.buffer_like(x), self._previous)
            self._under_way.append(self._offloaded)
            if len(self._under_way) > COPIES_UNDER_WAY:
                self._under_way.popleft().let_go_of_source()
        return self._offloaded, tensor.shape

    def _unpack(self, packed) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        offloaded, shape = packed
        return offloaded.take().view(shape)
