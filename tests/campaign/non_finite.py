"""Values that are not finite, in one of the ranks: nothing of them may be saved."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import Bad, Case, Result, clear, go_on
from .runs import STEPS, Launch, command

PLACES = ("loss", "gradients", "weights before", "weights after", "first moments", "second moments")
VALUES = (math.nan, math.inf, -math.inf)
COUNT = len(PLACES) * len(VALUES) * 2


@dataclass(frozen=True)
class Poison:
    """A value that one rank puts somewhere in one step."""

    place: str
    value: float
    step: int
    rank: int
    parameter: int
    mode: str

    def inside(self, rank: int) -> None:
        """Patch the trainer of this process if it is the one."""
        if rank != self.rank:
            return
        from torchtitan.models.llama3_lighthouse.train import LighthouseTrainer

        forward, step = LighthouseTrainer.forward_backward_step, LighthouseTrainer.train_step
        poison = self

        def forward_backward_step(self: Any, **arguments: Any) -> Any:
            loss = forward(self, **arguments)
            if self.step == poison.step and poison.place == "gradients":
                poison.put(parameter.grad for parameter in _parameters(self))
            here = self.step == poison.step and poison.place == "loss"
            return loss * poison.value if here else loss

        def train_step(self: Any, batches: Any) -> None:
            here = self.step == poison.step
            if here and poison.place == "weights before":
                poison.put(_parameters(self))
            step(self, batches)
            if here and poison.place == "weights after":
                poison.put(_parameters(self))
            if here and poison.place.endswith("moments"):
                key = "exp_avg" if poison.place.startswith("first") else "exp_avg_sq"
                poison.put(state[key] for each in self.optimizers for state in each.state.values())

        LighthouseTrainer.forward_backward_step = forward_backward_step
        LighthouseTrainer.train_step = train_step

    def put(self, tensors: Any) -> None:
        """Put the value into the middle of one of the tensors that this rank has a part of."""
        own = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]
        own = [tensor for tensor in own if tensor.numel()]
        chosen = own[self.parameter % len(own)]
        chosen.view(-1)[chosen.numel() // 2] = self.value


def _parameters(trainer: Any) -> Iterator[Any]:
    return itertools.chain.from_iterable(part.parameters() for part in trainer.model_parts)


def poison(case: Case) -> Result:
    """Poison one rank; all must stop, keep nothing of it, and go on without it."""
    draw = case.random
    place = PLACES[case.number % len(PLACES)]
    value = VALUES[case.number // len(PLACES) % len(VALUES)]
    processes = 2 if case.number % 3 else 1
    given = Poison(place, value, draw.randint(2, STEPS), draw.randrange(processes),
                   draw.randrange(1000), draw.choice(("disabled", "async")))  # fmt: skip
    reference = case.world.references[f"forked {processes}"]
    line = command(case.dump, case.world.text, checkpoint__async_mode=given.mode)
    tried = (f"{value} in {place} of rank {given.rank} of {processes} at step {given.step}, "
             f"checkpoint.async_mode {given.mode}")  # fmt: skip
    try:
        end = clear(Launch(line, case.folder, processes, given.inside).wait(), "run")
        for path in (case.dump / "checkpoint").glob("step-*"):
            if (path / ".metadata").is_file() and (name := not_finite(path, case.folder)):
                raise Bad("silent", f"{path.name} holds a value that is not finite in {name}")
        if not end.code and (problem := reference.problem(case.dump)):
            raise Bad("silent", f"ended well, but {problem}")
        go_on(case, reference, line, reference.newest_whole(case.dump))
    except Bad as bad:
        return Result(bad.outcome, tried, bad.found)
    return Result("refused" if end.code else "ok", tried, end.message)


def not_finite(path: Path, folder: Path) -> str:
    """The name of a tensor of a checkpoint that is not finite, or ""."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from torchtitan.models.llama3_lighthouse.checkpoints.storage import in_one_process

    file = folder / "whole.pt"
    with in_one_process():
        dcp_to_torch_save(path, file)
    found = _walk(torch.load(file, weights_only=False))
    return next((name for name, tensor in found if not tensor.isfinite().all()), "")


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _walk(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _walk(each, f"{name}[{number}]")
