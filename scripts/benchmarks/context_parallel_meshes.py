"""Parts of the context parallelism benchmark that compare the losses of a run on several meshes."""

import math
from pathlib import Path
from typing import Any

from context_parallel_jobs import (
    COMPARED,
    Job,
    Mesh,
    Settings,
    Sizes,
    Steps,
    largest_difference,
    losses,
    meshes_of,
)

STEPS_OF_A_MESH = 3


def seed_checkpoint(folder: Path, gpus: list[int], settings: Settings, config: str) -> str:
    """Path of a checkpoint for runs on all meshes, which would each initialise differently."""
    found = folder / "seed/checkpoint/step-0"
    if not found.exists():
        settings = {**settings, "checkpoint.create_seed_checkpoint": True}
        Job(folder / "seed", gpus[:1], settings, config).steps()
    return str(found)


def differences(runs: dict[str, Steps], expected: Steps) -> dict[str, dict[str, float]]:
    """Largest relative differences of each run's losses and gradient norms from ``expected``."""
    return {
        f"largest relative difference of {key} from one GPU": {
            name: largest_difference(steps, expected, key) for name, steps in runs.items()
        }
        for key in COMPARED
    }


def compared(
    folder: Path, gpus: list[int], config: str, sizes: Sizes, meshes: dict[str, Mesh]
) -> dict[str, Any]:
    """Ten steps of a small model from one seed checkpoint, on meshes of all GPUs and on one GPU.

    Args:
        meshes: each mesh by the name that the record gives it.
    """
    batch = math.lcm(*(mesh.fsdp for mesh in meshes.values()))
    settings = {
        **sizes.of_small_runs(len(gpus)),
        "training.steps": 10,
        "training.global_batch_size": batch,
    }
    settings["checkpoint.initial_load_path"] = seed_checkpoint(folder, gpus, settings, config)
    # Two more runs show what rounding does: another GPU, where the order of sums may change, and
    # the model not compiled, which rounds the same sums elsewhere.
    variants = {"one": gpus[:1], "again": gpus[1:2], "eager": gpus[2:3] or gpus[:1]}
    jobs = {
        name: Job(
            folder / name, used, settings | ({"compile.enable": False} if name == "eager" else {}),
            config,
        )
        for name, used in variants.items()
    }  # fmt: skip
    expected, repeated, eager = (job.steps() for job in jobs.values())
    runs = {
        name: Job(folder / f"mesh {number}", gpus, {**settings, **mesh.settings()}, config).steps()
        for number, (name, mesh) in enumerate(meshes.items())
    }
    others = {"one GPU, not compiled": eager, "another GPU alone": repeated}
    return {
        "GPUs": len(gpus),
        "sequences a step": batch,
        "losses, one GPU": losses(expected),
        **{f"losses, {name}": losses(steps) for name, steps in runs.items()},
        **differences(runs | others, expected),
    }


def changing(
    folder: Path, gpus: list[int], config: str, sizes: Sizes, meshes: list[Mesh]
) -> dict[str, Any]:
    """A run that goes on under the next mesh after three steps each, and one that never stops.

    Args:
        meshes: of all GPUs, or of one of them.
    """
    last = STEPS_OF_A_MESH * len(meshes)
    settings = {
        **sizes.of_small_runs(len(gpus)),
        "training.global_batch_size": len(gpus),
        "lr_scheduler.total_steps": last,
        "compile.enable": False,
    }
    settings["checkpoint.initial_load_path"] = seed_checkpoint(folder, gpus, settings, config)
    one = Job(folder / "never stops", gpus[:1], {**settings, "training.steps": last}, config)
    described = []
    for number, mesh in enumerate(meshes):
        until = STEPS_OF_A_MESH * (number + 1)
        used = gpus[: mesh.fsdp * mesh.context]
        spread = {**settings, **mesh.settings(), "training.steps": until}
        steps = Job(folder / "changing", used, spread, config).steps()
        described.append(f"{until - STEPS_OF_A_MESH + 1}-{until}: {mesh}")
    expected = one.steps()
    return {
        "GPUs": len(gpus),
        "meshes": f"steps {'; '.join(described)}",
        "losses, one GPU throughout": losses(expected),
        "losses, changing": losses(steps),
        **{
            f"largest relative difference of {key}": largest_difference(steps, expected, key)
            for key in COMPARED
        },
    }


def equivalence(folder: Path, gpus: list[int], config: str, sizes: Sizes) -> dict[str, Any]:
    """The part "equivalence": context parallelism over all GPUs, and one GPU."""
    return compared(folder, gpus, config, sizes, {"W GPUs": Mesh(context=len(gpus))})


def resume(folder: Path, gpus: list[int], config: str, sizes: Sizes) -> dict[str, Any]:
    """The part "resume": FSDP alone, context parallelism alone, and one GPU."""
    every = len(gpus)
    return changing(folder, gpus, config, sizes, [Mesh(fsdp=every), Mesh(context=every), Mesh()])


def meshes(folder: Path, gpus: list[int], config: str, sizes: Sizes) -> dict[str, Any]:
    """The part "meshes": FSDP with context parallelism, and a run that goes on from mesh to mesh.

    The run changes between those meshes, on to context parallelism alone, and back to the first.
    """
    found = meshes_of(len(gpus))
    order = [*dict.fromkeys([*found, Mesh(context=len(gpus))]), found[0]]
    return {
        **compared(folder, gpus, config, sizes, {str(mesh): mesh for mesh in found}),
        "resumed": changing(folder, gpus, config, sizes, order),
    }
