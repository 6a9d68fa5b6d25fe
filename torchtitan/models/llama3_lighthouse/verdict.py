"""Whether a step is finite and the run goes on after it: all ranks answer alike."""

from signal import Signals

import torch
from torchtitan.tools.logging import logger

from .checkpoints.manager import LighthouseCheckpointManager
from .errors import NonFiniteError


class Verdict:
    """All ranks' verdict on one step, on its way from the device to the host.

    Made as soon as the step's gradients are clipped. Reading it waits for these, but for nothing
    that was queued on the device later, such as the next step.

    Args:
        loss: this rank's share of the step's loss.
        signal_number: the signal that asked this rank to stop; 0 for none.

    Attributes:
        not_finite: 1.0 if the loss or the gradient norm of any rank is not finite, otherwise 0.0;
            a scalar on the device.
    """

    def __init__(
        self,
        step: int,
        stage: str,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        signal_number: int,
    ) -> None:
        self._step, self._stage = step, stage
        self._loss, self._grad_norm = loss, grad_norm
        numbers = verdict_of_all_ranks(loss, grad_norm, signal_number)
        self.not_finite = numbers[0]
        self._on_host, self._copied = numbers, None
        if numbers.device.type != "cpu":
            # Copies into other memory hold up the host until the device comes to them.
            pinned = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._on_host = pinned.copy_(numbers, non_blocking=True)
            self._copied = torch.get_device_module(numbers.device).Event()
            self._copied.record()

    @property
    def travels(self) -> bool:
        """Whether the host may have to wait for the verdict; the same on all ranks."""
        return self._copied is not None

    def read(self) -> tuple[bool, int]:
        """Wait for the verdict; return whether the step was not finite, and the signal's number.

        The number is that of a signal that asked any rank to stop, or 0.
        """
        if self._copied is not None:
            self._copied.synchronize()
        not_finite, number = self._on_host.tolist()
        return bool(not_finite), int(number)

    def complaint(self) -> str:
        """A message that the step was not finite; all later work on the device is waited for."""
        return (
            f"step {self._step} ({self._stage} stage): not finite on at least one rank (this rank: "
            f"loss share {self._loss.item()}, gradient norm {self._grad_norm.item()}). The "
            "optimizer step was not taken, nor any after it"
        )


class Verdicts:
    """The verdicts on a run's steps, of which at most the last is not read.

    Args:
        checkpointer: knows the checkpoint that an error names.

    Attributes:
        stopped_by: the signal that stops the run after the present step; 0 for none.
        unread: the last step's verdict until it is read, afterwards None.
    """

    def __init__(self, checkpointer: LighthouseCheckpointManager) -> None:
        self.stopped_by = 0
        self._checkpointer = checkpointer
        self.unread: Verdict | None = None

    def ask(
        self,
        step: int,
        stage: str,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        signal_number: int,
    ) -> Verdict:
        """Ask all ranks about ``step``, and heed the verdict on the step before.

        Raises:
            NonFiniteError: on every rank, if the step before was not finite.
        """
        verdict = Verdict(step, stage, loss, grad_norm, signal_number)
        self.heed(step)
        self.unread = verdict
        return verdict

    def heed(self, step: int) -> None:
        """Read the verdict that is not read yet, if there is one, while ``step`` is under way.

        Raises:
            NonFiniteError: on every rank, if it says that its step was not finite.
        """
        verdict, self.unread = self.unread, None
        if verdict is None:
            return
        not_finite, number = verdict.read()
        if number and not self.stopped_by:
            self.stopped_by = number
            logger.info(f"{Signals(number).name}: step {step} is the last one now")
        if not not_finite:
            return
        message = verdict.complaint()
        if self._checkpointer.enable:
            kept = self._checkpointer.last_good()
            message += f"; the last good checkpoint is {kept or 'none: nothing was saved yet'}"
        raise NonFiniteError(
            f"{message}. Lower optimizer.lr, lengthen the warmup or check the data."
        )


def verdict_of_all_ranks(
    loss: torch.Tensor, grad_norm: torch.Tensor, signal_number: int
) -> torch.Tensor:
    """Two numbers, the same on all ranks, so that all stop together and none waits for another.

    The first is 1.0 if the loss or the gradient norm of any rank is not finite, otherwise 0.0. The
    second is the number of a signal that asked any rank to stop, or 0.0.

    Args:
        signal_number: the signal that asked this rank to stop; 0 for none.
    """
    finite = torch.isfinite(loss).all() & torch.isfinite(grad_norm).all()
    # Filling a tensor does not hold up the host, as copying to a device would.
    verdict = torch.full((2,), float(signal_number), device=finite.device)
    verdict[0] = ~finite
    torch.distributed.all_reduce(verdict, op=torch.distributed.ReduceOp.MAX)
    return verdict


def skips_non_finite_steps(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether the optimizer itself skips steps that are not finite.

    Fused optimizers take no step if ``found_inf``, which GradScaler sets, is 1. Those with weights
    on the host do not count: they would not wait for the value of ``found_inf`` on ``device``.
    """
    weights_are_on = optimizer.param_groups[0]["params"][0].device.type
    return getattr(optimizer, "_step_supports_amp_scaling", False) and weights_are_on == device.type
