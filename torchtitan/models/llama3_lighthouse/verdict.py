"""Whether a step is finite and the run goes on after it: all ranks answer alike."""

import torch


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
