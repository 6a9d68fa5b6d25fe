"""The learning rate is upstream's up to the end of its schedule, and stays at its end after it."""

from typing import Any

import pytest
import torch
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.lr_scheduler import build_lr_schedulers as build_upstream

from torchtitan.models.llama3_lighthouse.job_config import JobConfig
from torchtitan.models.llama3_lighthouse.lr_schedule import build_lr_schedulers
from torchtitan.models.llama3_lighthouse.train_spec import get_train_spec

RATE, STEPS = 3e-4, 12
SCHEDULES: list[dict[str, Any]] = [
    {"warmup_steps": warmup, "decay_ratio": ratio, "decay_type": kind, "min_lr_factor": least}
    for warmup in (0, 4, 30)
    for ratio in (None, 0.0, 0.5, 1.0)
    for kind in ("linear", "sqrt", "cosine")
    for least in (0.0, 0.1)
]


def schedulers(build: Any, settings: dict[str, Any], steps: int = STEPS) -> LRSchedulersContainer:
    """The schedulers of two optimizers, as a pipeline stage with two parts of a model has them."""
    section = JobConfig().lr_scheduler
    for name, value in settings.items():
        setattr(section, name, value)
    optimizers = [torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=RATE) for _ in range(2)]
    return build(optimizers, section, steps)


def rates(container: LRSchedulersContainer, steps: int) -> list[list[float]]:
    """The learning rates of each step, by optimizer."""
    found = []
    for step in range(steps):
        if step:
            for scheduler in container:
                scheduler.optimizer.step()
            container.step()
        found.append([scheduler.get_last_lr()[0] for scheduler in container])
    return found


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_rate_is_upstreams_until_its_end_and_stays_there(settings: dict[str, Any]) -> None:
    ours = rates(schedulers(build_lr_schedulers, settings), 3 * STEPS)
    # The step after the last one is upstream's as well: it is in the last checkpoint.
    upstream = rates(schedulers(build_upstream, settings), STEPS + 1)
    assert ours[: STEPS + 1] == upstream
    assert all(rate == ours[STEPS] for rate in ours[STEPS:])
    assert min(ours[STEPS]) >= RATE * settings["min_lr_factor"]


def test_schedules_are_as_long_as_total_steps_says() -> None:
    settings = {"warmup_steps": 0, "total_steps": 6}
    found = rates(schedulers(build_lr_schedulers, settings), STEPS)
    assert found[5][0] > 0 and found[6:] == [[0.0, 0.0]] * (STEPS - 6)


def test_checkpoints_of_either_schedule_load_into_the_other() -> None:
    settings = {"warmup_steps": 4}
    old, new = (schedulers(build, settings) for build in (build_upstream, build_lr_schedulers))
    rates(old, 6)
    assert new.state_dict().keys() == old.state_dict().keys()
    assert new.state_dict()["lr_lambdas"] == old.state_dict()["lr_lambdas"]
    new.load_state_dict(old.state_dict())
    assert rates(new, 4) == rates(old, 4)


def test_the_trainer_takes_this_schedule() -> None:
    assert get_train_spec().build_lr_schedulers_fn is build_lr_schedulers
