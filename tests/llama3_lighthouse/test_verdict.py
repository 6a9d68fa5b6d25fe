"""Verdicts on steps: which step an error names, when a stop is noticed, and what reading waits for.

``test_training.py`` has whole runs.
"""

import logging
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from torchtitan.models.llama3_lighthouse.errors import NonFiniteError
from torchtitan.models.llama3_lighthouse.verdict import Verdict, Verdicts

KEPT = SimpleNamespace(enable=True, last_good=lambda: Path("checkpoint/step-5"))


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ask(
    verdicts: Verdicts, step: int, loss: float = 1.0, norm: float = 2.0, number: int = 0
) -> None:
    verdicts.ask(step, "dense", torch.tensor(loss), torch.tensor(norm), number)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 2.0), (1.0, math.inf), (-math.inf, 2.0)])
def test_error_names_the_step_that_was_not_finite(loss: float, norm: float) -> None:
    verdicts = Verdicts(KEPT)
    ask(verdicts, 6)
    ask(verdicts, 7, loss, norm)
    with pytest.raises(NonFiniteError) as found:
        ask(verdicts, 8)
    assert str(found.value) == (
        "step 7 (dense stage): not finite on at least one rank (this rank: loss share "
        f"{loss}, gradient norm {norm}). The optimizer step was not taken, nor any after it; the "
        "last good checkpoint is checkpoint/step-5. Lower optimizer.lr, lengthen the warmup or "
        "check the data."
    )


def test_stop_is_noticed_in_the_next_step_which_is_the_last(caplog) -> None:
    verdicts = Verdicts(KEPT)
    with caplog.at_level(logging.INFO):
        ask(verdicts, 3, number=signal.SIGTERM)
        assert not verdicts.stopped_by
        ask(verdicts, 4, number=signal.SIGTERM)
        assert verdicts.stopped_by == signal.SIGTERM
        verdicts.heed(4)
    assert caplog.messages == ["SIGTERM: step 4 is the last one now"]
    assert verdicts.unread is None


def test_verdicts_on_the_host_are_known_at_once() -> None:
    verdict = Verdict(1, "dense", torch.tensor(math.nan), torch.tensor(1.0), signal.SIGINT)
    assert not verdict.travels
    assert verdict.read() == (True, signal.SIGINT) and verdict.not_finite == 1.0


@pytest.mark.gpu
def test_reading_waits_for_no_later_work() -> None:
    finite, large = torch.ones((), device="cuda"), torch.rand(8192, 8192, device="cuda")
    # The first of each takes its time: a collective, pinned memory and a product.
    assert Verdict(1, "dense", finite, finite, 0).read() == (False, 0)
    large @ large
    verdict = Verdict(2, "dense", finite, finite * math.inf, signal.SIGTERM)
    assert verdict.travels
    for _ in range(50):
        large @ large
    assert verdict.read() == (True, signal.SIGTERM)
    assert not torch.cuda.current_stream().query()
