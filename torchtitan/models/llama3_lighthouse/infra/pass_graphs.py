"""CUDA graphs of passes: the host launches forward and backward of a microbatch as one.

The kernels of a small model end sooner than the host launches them one by one, and the GPU waits.
A graph holds the launches of a whole pass with the addresses that they read and write. So whatever
changes from pass to pass is copied to fixed addresses first: the tokens, the labels, and the number
that the loss is divided by. The optimizer, the checks and the logs stay outside.
"""

import gc
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtitan.tools.logging import logger

from ..data.documents import DOCUMENTS
from ..job_config import JobConfig

GIB = 2**30
# The first pass compiles, and creates handles and workspaces that must be there before a capture.
EAGER_PASSES = 3
Inputs = dict[str, torch.Tensor]
# Takes inputs and labels on any device, and on the GPU the float32 scalar that the summed loss is
# divided by. Returns the loss without its autograd graph, and leaves gradients in the parameters.
Pass = Callable[[Inputs, torch.Tensor, torch.Tensor], torch.Tensor]


def why_no_graphs(config: JobConfig, world_size: int) -> str | None:
    """The reason why a run on GPUs launches kernel by kernel; None if it captures graphs."""
    if not config.lighthouse.cuda_graphs:
        return "lighthouse.cuda_graphs = false"
    if world_size > 1:
        return f"{world_size} processes send to one another within a pass"
    if config.activation_checkpoint.offload_inputs:
        return "activation_checkpoint.offload_inputs = true copies on streams of its own"
    if config.training.enable_cpu_offload:
        return "training.enable_cpu_offload = true computes on the host"
    if not config.compile.enable or "model" not in config.compile.components:
        return "the model is not compiled (compile.enable, compile.components)"
    if config.compile.backend != "inductor":
        return f"compile.backend = '{config.compile.backend}' was not tried with graphs"
    if config.model.converters:
        return f"model.converters = {config.model.converters} were not tried with graphs"
    return None


def launch_line(config: JobConfig, world_size: int) -> str:
    """How the host of a run on GPUs launches its passes."""
    reason = why_no_graphs(config, world_size)
    if reason:
        return f"launches      kernel by kernel, without CUDA graphs: {reason}"
    return f"launches      each pass as one CUDA graph, after {EAGER_PASSES} passes without"


@dataclass
class _Captured:
    """A graph and the tensors at its fixed addresses."""

    graph: Any
    inputs: Inputs
    labels: torch.Tensor
    loss: torch.Tensor
    gradients: list[torch.Tensor | None]


class PassGraphs:
    """Runs passes, each kind as a graph once it has run ``EAGER_PASSES`` times without one.

    The first pass of a step writes gradients and the others add to them, so these are two graphs.
    The passes of a step may be of several kinds. Each kind's first graph writes to addresses of its
    own, so a kind has a further graph for each kind that a step began with.

    Args:
        forward_backward: one pass, launched kernel by kernel.
        parameters: all that ``forward_backward`` leaves gradients in.
        device: a GPU.

    Attributes:
        held: bytes that graphs keep for themselves and that no tensor occupies between passes.
    """

    def __init__(
        self, forward_backward: Pass, parameters: Sequence[nn.Parameter], device: torch.device
    ) -> None:
        self._forward_backward, self._parameters = forward_backward, list(parameters)
        self._tokens = torch.ones((), device=device)
        # Autograd adds gradients on the stream of the pass that first met a parameter. Passes
        # before the capture therefore run on the stream of the capture.
        self._stream = self._new_stream()
        # By the kind of the pass, and by that of the step's first pass if this is a further one.
        self._graphs: dict[tuple[str, str | None], _Captured] = {}
        self._begin()

    def _begin(self) -> None:
        # Freeing memory does not wait for the optimizer, which may still read gradients.
        self._wait()
        for parameter in self._parameters:
            parameter.grad = None
        for captured in self._graphs.values():
            captured.graph.reset()
        self._graphs, self.held = {}, 0
        self._eager_passes: Counter[tuple[str, bool]] = Counter()
        # Bytes that a pass without a graph takes at its peak, gradients left out.
        self._needed: dict[tuple[str, bool], int] = {}
        # Kinds of passes whose graph the memory has no room for.
        self._without: set[tuple[str, bool]] = set()
        # Graphs share memory. A replay may write over what a graph captured later holds, so the
        # graph of a further pass is captured after the one that its step begins with.
        self._pool = self._new_pool()
        self._empty_cache()

    def forget(self) -> None:
        """Drop graphs, their memory and all gradients, because shapes or kernels change.

        Each kind of pass runs without a graph again before it is captured anew.
        """
        self._begin()

    def run(
        self, attention: str, inputs: Inputs, labels: torch.Tensor, tokens: float
    ) -> torch.Tensor:
        """Run one pass and leave its gradients, added to those of the step's earlier passes.

        Args:
            attention: tells passes apart that run different kernels. Those with documents among
                their inputs and those without are of different kinds too.
            inputs, labels: the microbatch, on any device, of one shape for each kind until
                ``forget``.
            tokens: the number that the summed loss is divided by.

        Returns:
            The loss, a float32 scalar that later passes leave alone.

        Raises:
            ValueError: the microbatch has another shape than that of the graph.
            RuntimeError: a pass cannot be captured.
        """
        kind = f"masked {attention}" if DOCUMENTS in inputs else attention
        key = kind, all(parameter.grad is None for parameter in self._parameters)
        # A further pass adds to gradients at fixed addresses, which are those of a first graph.
        first = None if key[1] else self._writer()
        self._tokens.fill_(tokens)
        if key[1] or first is not None:
            if (kind, first) not in self._graphs and self._is_due(key):
                self._capture((kind, first), inputs, labels)
            if (kind, first) in self._graphs:
                return self._replay(self._graphs[kind, first], inputs, labels)
        self._eager_passes[key] += 1
        work = partial(self._forward_backward, inputs, labels, self._tokens)
        with self._on_stream():
            if self._eager_passes[key] != EAGER_PASSES:
                return work()
            loss, self._needed[key] = self._with_peak(work)
        return loss

    def _writer(self) -> str | None:
        """The kind whose first graph wrote the present gradients; None if it ran without one."""
        for (kind, first), captured in self._graphs.items():
            pairs = zip(self._parameters, captured.gradients, strict=True)
            if first is None and all(parameter.grad is gradient for parameter, gradient in pairs):
                return kind
        return None

    def _is_due(self, key: tuple[str, bool]) -> bool:
        if key in self._without or self._eager_passes[key] < EAGER_PASSES:
            return False
        needed, gradients = self._needed[key], 0
        # Where passes are of several kinds, each first graph keeps gradients of its own, and those
        # of a pass without a graph lie beside them.
        if key[1] and len({kind for kind, _ in self._eager_passes}) > 1:
            gradients = sum(x.numel() * x.element_size() for x in self._parameters)
        if self._free() >= needed + max(0, needed - self.held) + 2 * gradients:
            return True
        self._go_without(
            key,
            f"it would keep {(needed + gradients) / GIB:.1f} GiB, and leave too little for "
            "validation and for passes without a graph",
        )
        return False

    def _go_without(self, key: tuple[str, bool], reason: str) -> None:
        self._without.add(key)
        kind, is_first = key
        passes = "first pass" if is_first else "further passes"
        logger.warning(
            f"No CUDA graph for the {passes} of a step under {kind} attention: {reason}. The host "
            "launches their kernels one by one until the stage ends"
        )

    def _replay(self, captured: _Captured, inputs: Inputs, labels: torch.Tensor) -> torch.Tensor:
        # Copying would broadcast.
        fixed = {**captured.inputs, "labels": captured.labels}
        given = {**inputs, "labels": labels}
        shapes = [{name: tuple(x.shape) for name, x in each.items()} for each in (fixed, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the CUDA graph takes a microbatch of {shapes[0]}, got {shapes[1]}")
        for name, x in inputs.items():
            captured.inputs[name].copy_(x, non_blocking=True)
        captured.labels.copy_(labels, non_blocking=True)
        captured.graph.replay()
        # The optimizer sets gradients to None, and a graph knows nothing of attributes.
        for parameter, gradient in zip(self._parameters, captured.gradients, strict=True):
            parameter.grad = gradient
        return captured.loss.clone()

    def _capture(self, key: tuple[str, str | None], inputs: Inputs, labels: torch.Tensor) -> None:
        """Capture a pass, which runs nothing; without the memory for it, say so and go on."""
        kind, first = key
        start, device = time.perf_counter(), self._tokens.device
        fixed = {name: x.to(device, copy=True) for name, x in inputs.items()}
        fixed_labels = labels.to(device, copy=True)
        before = [parameter.grad for parameter in self._parameters]
        try:
            graph, loss, held = self._captured(
                partial(self._forward_backward, fixed, fixed_labels, self._tokens)
            )
        except RuntimeError as error:
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient
            if not _is_out_of_memory(error):
                raise RuntimeError(
                    "forward and backward cannot be captured as a CUDA graph; pass "
                    "--lighthouse.no-cuda_graphs to launch their kernels one by one"
                ) from error
            self._empty_cache()
            self._go_without((kind, first is None), "its capture ran out of memory")
            return
        self.held = max(self.held, held)
        gradients = [parameter.grad for parameter in self._parameters]
        self._graphs[key] = _Captured(graph, fixed, fixed_labels, loss, gradients)
        if first is None:
            logger.info(
                f"Steps under {kind} attention replay a CUDA graph from here on, captured in "
                f"{time.perf_counter() - start:.1f} s"
            )

    # Only the methods below touch CUDA; tests on a CPU put a stand-in there.

    def _captured(self, work: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor, int]:
        """A graph of ``work``, the tensor that ``work`` returned, and the bytes held between."""
        # A dead cycle may hold autograd's nodes of an earlier pass, bound to another stream.
        gc.collect()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # The data loader pins memory in another thread, which the default mode forbids.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result, peak = self._with_peak(work)
        finally:
            # torch leaves the capture's stream in place if the capture cannot be ended.
            torch.cuda.set_stream(current)
        # From here on the peak is that of what runs beside the graph.
        torch.cuda.reset_peak_memory_stats()
        return graph, result, peak

    def _with_peak(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
        """``work()`` and the bytes that it had at its peak beyond those that it leaves."""
        torch.cuda.reset_peak_memory_stats()
        result = work()
        memory = torch.cuda.memory_stats()
        return result, memory["active_bytes.all.peak"] - memory["active_bytes.all.current"]

    def _free(self) -> int:
        """Bytes that are free outside of graphs, with those that the allocator keeps at hand."""
        memory, (free, _) = torch.cuda.memory_stats(), torch.cuda.mem_get_info()
        kept = memory["reserved_bytes.all.current"] - memory["active_bytes.all.current"]
        return free + kept - self.held

    @contextmanager
    def _on_stream(self) -> Generator[None]:
        """Launch on the capture's stream, after and before all else on the current one."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _new_stream(self) -> Any:
        return torch.cuda.Stream()

    def _new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def _wait(self) -> None:
        torch.cuda.synchronize()

    def _empty_cache(self) -> None:
        torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was too small; torch's own error may hide behind that of the capture's end."""
    while error is not None:
        # CUDA's own errors have no class for it.
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__context__
    return False
