"""Train one case of the training benchmark in this process, and write what was measured.

``training.py`` and ``context_parallel_profile.py`` start this file with the arguments ATTENTION,
WARM_UP, PROFILE and RESULT_FILE, followed by the command line of the trainer.
"""

import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_profile import COUNTED, kernels_of

OUT_OF_MEMORY = "out of memory"
GIB = 2**30


@dataclass
class Measured:
    """Measurements of a run's steps, which are read at its end: no step waits for its own.

    Attributes:
        ends: the end of each step, an event on the GPU; on a CPU, the seconds of the host's clock.
        losses: the shares of each step's average loss, one a microbatch.
        profile: the summary of the last steps by ``kernels_of``, if they were profiled.
    """

    ends: list[Any] = field(default_factory=list)
    losses: list[list[Any]] = field(default_factory=list)
    profile: dict[str, Any] | None = None

    def mark_end(self) -> None:
        """Note that a step ends here, without waiting for the GPU to come to its end."""
        import torch

        if not torch.cuda.is_available():
            self.ends.append(time.perf_counter())
            return
        self.ends.append(torch.cuda.Event(enable_timing=True))
        self.ends[-1].record()

    def read(self, warm_up: int) -> dict[str, Any]:
        """Wait for the GPU, and return what a record says of the steps.

        Args:
            warm_up: steps whose seconds are left out, at least 1.
        """
        from torchtitan.tools import utils

        utils.device_module.synchronize()
        seconds = [
            end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3
            for start, end in zip(self.ends, self.ends[1:], strict=False)
        ]
        memory = utils.device_module.memory_stats()
        return {
            "seconds": seconds[warm_up - 1 :],
            "losses": [float(sum(shares)) for shares in self.losses],
            "reserved GiB": memory["reserved_bytes.all.peak"] / GIB,
        }


def timed_trainer(base: type, measured: Measured, profile: int) -> type:
    """A subclass of the trainer ``base`` that fills ``measured`` and, on request, its profile.

    It logs nothing, because a log line waits for the GPU and starts the count of memory anew.

    Args:
        profile: how many of the last steps are profiled. Of several the first does not count: the
            host has waited for the GPU before it, which it does not do before the others.
    """
    import torch
    from torchtitan.tools import utils

    class TimedTrainer(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.metrics_processor.should_log = lambda step: False

        def _forward_backward(self, *arguments: Any) -> Any:
            # Our trainer calls this for each pass, and forward_backward_step for those that it
            # does not replay from a CUDA graph.
            return self._kept(super()._forward_backward(*arguments))

        def forward_backward_step(self, **arguments: Any) -> Any:
            loss = super().forward_backward_step(**arguments)
            return loss if hasattr(base, "_forward_backward") else self._kept(loss)

        def _kept(self, loss: Any) -> Any:
            # A copy, as the next step may compute its loss in the same place.
            self.shares.append(loss.detach().clone())
            return loss

        def train_step(self, data_iterator: Any) -> None:
            self.shares: list[Any] = []
            left = self.job_config.training.steps - self.step
            if left == profile - 1:
                # The steps before are no part of the profile.
                utils.device_module.synchronize()
                self.recorded = torch.profiler.profile()
                self.recorded.start()
            counts = left < max(1, profile - 1)
            with torch.profiler.record_function(COUNTED) if counts else nullcontext():
                super().train_step(data_iterator)
            measured.losses.append(self.shares)
            if left >= profile:
                measured.mark_end()
            elif left == 0:
                utils.device_module.synchronize()
                self.recorded.stop()
                measured.profile = kernels_of(self.recorded, max(1, profile - 1))

    return TimedTrainer


def sizes_of(trainer: Any, attention: str) -> dict[str, Any]:
    """Lengths and FLOPs of a run, as its record has them."""
    from torchtitan.models.llama3_lighthouse.model.flavors import flavors

    config = trainer.job_config
    args = flavors[config.model.flavor]
    args.update_from_config(config)
    counted = "lighthouse" if attention == "lighthouse" else "dense"
    length = config.training.seq_len
    _, flops = args.get_nparams_and_flops(trainer.model_parts[0], length, counted)
    peak = trainer.metrics_processor.gpu_peak_flops
    return {
        "S": args.gathered_length(length) if attention == "lighthouse" else length,
        "tokens a step": length * config.training.local_batch_size,
        "FLOPs a token": flops,
        # A CPU's peak is not known.
        "peak FLOP/s": peak if math.isfinite(peak) else None,
    }


def of_rank(result_file: Path, rank: int) -> Path:
    """Where a rank writes: the first one to ``result_file``, and the others beside it."""
    return result_file.with_stem(f"{result_file.stem} rank {rank}") if rank else result_file


def run_case(attention: str, warm_up: int, profile: int, result_file: str, line: list[str]) -> None:
    """Train a case to its end, write the result file and end this process.

    Args:
        attention: "lighthouse", "dense" or "upstream".
        warm_up: steps that are not timed.
        profile: how many of the last steps are profiled. They are not timed either.
        line: the trainer's command line.
    """
    import torch

    # The overlay comes first, because it sets the device that upstream copies when imported.
    from torchtitan.models.llama3_lighthouse import baseline
    from torchtitan.models.llama3_lighthouse import train as ours

    # isort: split
    import torchtitan.train as upstream

    from torchtitan.models.llama3_lighthouse.console import set_up_console
    from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

    set_up_console()
    if attention == "upstream":
        baseline.register_baseline()
        line = [*line, "--model.name", baseline.NAME]
    config = LighthouseConfigManager().parse_args(line)
    base = upstream.Trainer if attention == "upstream" else ours.LighthouseTrainer
    measured, result = Measured(), {}
    try:
        trainer = timed_trainer(base, measured, profile)(config)
        result = sizes_of(trainer, attention)
        trainer.train()
    except torch.OutOfMemoryError as error:
        result |= {"failure": OUT_OF_MEMORY, "message": str(error)}
    if measured.profile is not None:
        result["profile"] = measured.profile
    result |= measured.read(warm_up)
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rank = int(os.environ["RANK"])
    of_rank(Path(result_file), rank).write_text(json.dumps(result))
    # Nothing is left to tidy up, and after an error the trainer may wait for ever at its own end.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    attention, warm_up, profile, result_file, *line = sys.argv[1:]
    run_case(attention, int(warm_up), int(profile), result_file, line)
