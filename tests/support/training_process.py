"""A training process that tests can watch and disturb. ``launch.py`` starts it.

Every step appends one JSON line to ``RECORD_FILE``-rank: the step, the stage, losses and gradient
norm as exact hexadecimal floats, and a hash of each microbatch. With documents, the line also says
of each microbatch which rows hold several, and of each call of the model whether it was given them.
Environment variables change what it does: ``TRAINER=upstream`` runs torchtitan's own trainer and
model on the same data, ``NAN_AT=step,rank`` makes one loss NaN, ``ANY_DEVICE=1`` skips the check
for a GPU, and ``LATE=1`` lets verdicts travel as they do from a GPU, so that the trainer reads them
as late as it can. A step that logs nothing repeats the losses and the norm of the last one that
did.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import small_flavor  # noqa: F401
import torch

from torchtitan.models.llama3_lighthouse import baseline
from torchtitan.models.llama3_lighthouse import train as lighthouse_train
from torchtitan.models.llama3_lighthouse.data.documents import DOCUMENTS
from torchtitan.models.llama3_lighthouse.errors import NonFiniteError
from torchtitan.models.llama3_lighthouse.verdict import Verdict

# isort: split
import torchtitan.train as upstream_train

RANK = int(os.environ["RANK"])


class Recording:
    """Mixed into a trainer, records the data and the results of each step."""

    logged: dict[str, Any] = {}

    def batch_generator(
        self, data_iterable: Iterable
    ) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        self.batches: list[str] = []
        self.rows: list[list[bool]] = []
        for input_dict, labels in super().batch_generator(data_iterable):
            digest = hashlib.sha256(input_dict["input"].numpy().tobytes())
            digest.update(labels.numpy().tobytes())
            self.batches.append(digest.hexdigest())
            if DOCUMENTS in input_dict:
                self.rows.append(input_dict[DOCUMENTS].bool().any(dim=1).tolist())
            yield input_dict, labels

    def forward_backward_step(self, **arguments: Any) -> torch.Tensor:
        loss = super().forward_backward_step(**arguments)
        if os.environ.get("NAN_AT") == f"{self.step},{RANK}":
            loss = loss * float("nan")
        return loss

    def train_step(self, data_iterator: Iterator) -> None:
        log = self.metrics_processor.log

        def recording_log(
            step: int,
            average_loss: float,
            maximum_loss: float,
            grad_norm: float,
            extra_metrics: dict[str, Any],
        ) -> None:
            self.logged = {
                "loss": float(average_loss).hex(),
                "maximum_loss": float(maximum_loss).hex(),
                "grad_norm": float(grad_norm).hex(),
                "tokens_seen": extra_metrics["n_tokens_seen"],
            }
            log(step, average_loss, maximum_loss, grad_norm, extra_metrics)

        self.metrics_processor.log = recording_log
        if os.environ.get("NAN_AT", "").startswith(f"{self.step},"):
            self.before = [x.detach().clone() for x in self._held()]
        try:
            super().train_step(data_iterator)
        except NonFiniteError:
            assert all(torch.equal(x, y) for x, y in zip(self._held(), self.before, strict=True))
            print("weights and optimizer state are as before", flush=True)
            raise
        self.metrics_processor.log = log
        stage = getattr(self, "stage", "upstream")
        record = {"step": self.step, "stage": stage, "batches": self.batches, **self.logged}
        record |= {"rows": self.rows, "masked": getattr(self, "masked", [])}
        self.batches, self.rows, self.masked = [], [], []
        record["unread"] = getattr(getattr(self, "verdicts", None), "unread", None) is not None
        record["pid"] = os.getpid()
        with open(f"{os.environ['RECORD_FILE']}-{RANK}", "a") as file:
            file.write(json.dumps(record) + "\n")

    def _held(self) -> list[torch.Tensor]:
        """This rank's part of the weights and of the optimizer's state."""
        weights = [weight for model in self.model_parts for weight in model.parameters()]
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        held = [*weights, *(value for state in states for value in state.values())]
        return [getattr(value, "_local_tensor", value) for value in held]


class RecordingLighthouseTrainer(Recording, lighthouse_train.LighthouseTrainer):
    masked: list[bool] = []

    def post_dataloading_process(self, *batch: Any) -> Any:
        found = super().post_dataloading_process(*batch)
        self.masked.append("attention_masks" in found[3])
        return found


class RecordingUpstreamTrainer(Recording, upstream_train.Trainer):
    pass


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        # Upstream waits two seconds at the end, for ranks that torchrun would end.
        upstream_train.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    if os.environ.get("TRAINER") == "upstream":
        baseline.register_baseline()
        sys.argv += ["--model.name", baseline.NAME]
        lighthouse_train.LighthouseTrainer = RecordingUpstreamTrainer
    else:
        lighthouse_train.LighthouseTrainer = RecordingLighthouseTrainer
    if os.environ.get("LATE"):
        Verdict.travels = True
    if os.environ.get("ANY_DEVICE"):
        lighthouse_train.check_device = lambda config, device_type: None
    lighthouse_train.main()
