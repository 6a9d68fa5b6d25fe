"""The learning rate of each step: upstream's schedule, and its last value after its end."""

import functools
from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components import lr_scheduler as upstream
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import LRScheduler


def build_lr_schedulers(
    optimizers: OptimizersContainer, config: LRScheduler, training_steps: int
) -> upstream.LRSchedulersContainer:
    """Upstream's schedulers, which keep their last value after the end of the schedule.

    Upstream goes on to decay: past zero under "linear" and "sqrt", and up again under "cosine".
    Where it does not decay, it fails.

    Args:
        config: the section [lr_scheduler].
        training_steps: length of the schedule if ``config.total_steps`` is None.
    """
    container = upstream.build_lr_schedulers(optimizers, config, training_steps)
    last = training_steps if config.total_steps is None else config.total_steps
    for scheduler in container.schedulers:
        assert isinstance(scheduler, LambdaLR)
        # Checkpoints keep what a partial holds besides its function: nothing, as with upstream's.
        scheduler.lr_lambdas = [
            functools.partial(_held, factor=factor, last=last) for factor in scheduler.lr_lambdas
        ]
    return container


def _held(step: int, factor: Callable[[int], float], last: int) -> float:
    return factor(min(step, last))
