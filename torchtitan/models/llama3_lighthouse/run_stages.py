"""The stages of a run with their model arguments, FLOPs and lengths."""

import copy
from dataclasses import dataclass
from functools import cached_property

import torch

from .checkpoints.model_folder import model_arguments_of
from .data.packing import global_batch_size
from .job_config import JobConfig
from .metrics import TimeLeft
from .model.model import LighthouseModelArgs, LighthouseTransformer
from .stages import ATTENTIONS, Stage, attention_at, stage_at, stages_of

# A laptop's processor does about 100 GFLOP/s.
FLOPS_OF_A_CPU_MINUTE = 6e12


@dataclass(frozen=True)
class RunStage:
    """A stage, and what it costs.

    Attributes:
        number: its place among the stages, from 0.
        args: arguments of the model as this stage runs it.
        flops: FLOPs per token by attention, of which the stage's own steps may use both.
        gathered: by attention, the length that attention runs on.
    """

    number: int
    stage: Stage
    args: LighthouseModelArgs
    flops: dict[str, float]
    gathered: dict[str, int]


class RunStages:
    """The stages of a run.

    Args:
        args: arguments of the model for the whole run.
    """

    def __init__(self, config: JobConfig, args: LighthouseModelArgs) -> None:
        self._config, self._args = config, args
        self._stages = stages_of(config)

    @cached_property
    def all(self) -> list[RunStage]:
        """The stages in order."""
        with torch.device("meta"):
            # Under pipeline parallelism no rank holds the whole model.
            whole = LighthouseTransformer(self._args)
        found = []
        for number, stage in enumerate(self._stages):
            args, length = copy.deepcopy(self._args), stage.seq_len
            args.update_from_config(stage.config)
            if stage.has_own_scaling:
                args.rope_scaling = model_arguments_of(stage.config).rope_scaling
            flops = {
                attention: args.get_nparams_and_flops(whole, length, attention)[1]
                for attention in ATTENTIONS
                if attention in ("dense", stage.attention)
            }
            gathered = {"dense": length}
            if stage.attention == "lighthouse":
                gathered["lighthouse"] = args.gathered_length(length)
            found.append(RunStage(number, stage, args, flops, gathered))
        return found

    def at(self, step: int) -> RunStage:
        """The stage of step number ``step``."""
        now = stage_at(step, self._stages)
        return next(each for each in self.all if each.stage is now)

    def attention_at(self, step: int) -> str:
        """The attention that step number ``step`` uses."""
        return attention_at(step, stage_at(step, self._stages))

    def kind_of(self, step: int) -> str:
        """A name that steps share which take the same time."""
        return f"{self.at(step).number} {self.attention_at(step)}"

    def time_left(self) -> TimeLeft:
        """An estimate of the time until the last step, which nothing was measured for yet."""
        steps = range(1, self._config.training.steps + 1)
        flops = {}
        for each in self.all:
            training = each.stage.config.training
            tokens = training.local_batch_size * training.seq_len
            flops |= {f"{each.number} {name}": tokens * x for name, x in each.flops.items()}
        return TimeLeft([self.kind_of(step) for step in steps], flops)


def is_too_much_for_a_cpu(config: JobConfig) -> bool:
    """Whether a step of any stage takes a CPU a minute or more."""
    for each in RunStages(config, model_arguments_of(config)).all:
        stage = each.stage
        tokens = global_batch_size(stage.config, 1) * stage.seq_len
        if tokens * max(each.flops[name] for name in stage.steps) > FLOPS_OF_A_CPU_MINUTE:
            return True
    return False
