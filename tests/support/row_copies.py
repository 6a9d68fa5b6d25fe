"""Passes over rows that torch makes in our operations: copies, sums and fills."""

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lighthouse import context_parallel, halo
from lighthouse.kernels import merge, seams, window
from torchtitan.models.llama3_lighthouse.infra import ring_operations

# They make no pass over a tensor: some give a view of it, and others memory that nobody has filled.
NO_PASS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach",
           "_unsafe_view", "alias"}  # fmt: skip
FOLDER = Path(window.__file__).parents[2]


class Pass(NamedTuple):
    """An operation that reads or writes many elements.

    Attributes:
        name: torch's name of the operation.
        elements: of the largest tensor among its arguments and results.
        line: the line of ours that called it.
        operation: the operation of ours in which it ran, or None. A compiler joins what runs in
            none.
    """

    name: str
    elements: int
    line: str
    operation: str | None


def bodies() -> dict[Any, Callable[..., Any]]:
    """Our operations that PyTorch computes or parts of which it does, and their functions."""
    ours, ring = torch.ops.lighthouse, torch.ops.lighthouse_ring
    return {
        ours.send.default: context_parallel._send._init_fn,
        ours.receive.default: context_parallel._receive._init_fn,
        ours.add_to_last_rows.default: halo.add_to_last_rows._init_fn,
        ours.halo_window.default: halo._forward._init_fn,
        ours.halo_window_backward.default: halo._backward._init_fn,
        ours.window_by_kernel.default: window.launch_forward,
        ours.window_by_kernel_backward.default: window.launch_backward,
        ours.merge_outputs.default: merge.launch_merge,
        ours.collect_merged.default: merge.launch_collect,
        ours.seam_sums.default: seams.launch_seam_sums,
        ours.add_seam_sums.default: seams.launch_add_seam_sums,
        ring.attention.default: ring_operations._run_forward,
        ring.attention_backward.default: ring_operations._run_backward,
    }


class RowPasses(TorchDispatchMode):
    """Lists the operations of torch that take or give tensors of ``least`` elements or more.

    Kernels and torch's attentions are not listed, and nobody looks into them.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found = least, list[Pass]()
        self.bodies = bodies()
        self.operation: str | None = None

    def __torch_dispatch__(
        self, function: Any, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        if body := self.bodies.get(function):
            outer, self.operation = self.operation, self.operation or name
            with self:
                result = body(*args, **kwargs)
            self.operation = outer
            return result
        # Below autograd, what torch composes of other operations comes as it is.
        with self:
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = function(*args, **kwargs)
        if function.namespace == "aten" and not function.is_view and "attention" not in name:
            elements = max((x.numel() for x in tensors_of((args, kwargs, result))), default=0)
            if elements >= self.least and name not in NO_PASS and (line := line_of_ours()):
                self.found.append(Pass(name, elements, line, self.operation))
        return result


def tensors_of(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_of(each)


def line_of_ours() -> str | None:
    """The line that calls torch; None if Triton's interpreter does, for which rows are copied."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.name == "interpreter.py" and "triton" in path.parts:
            return None
        if path.is_relative_to(FOLDER) and not {".venv", "tests"} & set(path.parts):
            return f"{path.relative_to(FOLDER)}:{frame.lineno} {frame.line}"
    return None
