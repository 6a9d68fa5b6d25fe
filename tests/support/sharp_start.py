"""Runs that begin from weights whose attention is uneven."""

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from launch import Run
from small_model import build

from torchtitan.models.llama3_lighthouse.model.flavors import flavors


def run_from_sharp_weights(folder: Path, settings: dict[str, Any], processes: int = 1) -> Run:
    """Train the small flavor from weights that show where attention goes.

    The attention of a new model is nearly even, and adds little.
    """
    state = build(args=flavors["small"]).state_dict()
    for name, weight in state.items():
        if name.endswith(("wq.weight", "wk.weight", "wo.weight", "output.weight")):
            weight.mul_(8)
    dcp.save(state, checkpoint_id=str(folder / "sharp"), no_dist=True)
    settings = {**settings, "checkpoint.initial_load_path": folder / "sharp"}
    run = Run(folder, settings, processes=processes).succeed()
    run.settings = settings
    return run


def losses(run: Run) -> dict[int, float]:
    return {step: float.fromhex(line["loss"]) for step, line in run.steps().items()}
