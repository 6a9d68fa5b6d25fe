"""The same training on every mesh: each composition of parallelisms against one process.

``docs/guides/parallelism.md`` lists the compositions by the names that they have here.
"""

import shutil
from pathlib import Path

import pytest
from launch import Run, validation_losses

from torchtitan.models.llama3_lighthouse.studies.ablation_results import read_metrics

# Eight strata, so that the eight chunks of four balanced ranks have one each, and chunks that are
# longer than the window.
SETTINGS = {
    "training.seq_len": 512,
    "lighthouse.top_k": 64,
    "lighthouse.picks_per_stratum": 8,
    "lighthouse.dense_from_step": 4,
    # One Lighthouse layer, and an early one. Meshes round differently: where two candidates' scores
    # are closer than the rounding, meshes may pick different ones. In many layers, some do.
    "lighthouse.dense_layers": [0, 2, 3],
    "training.global_batch_size": 2,
    "training.steps": 6,
    # AdamW's first steps divide each gradient by its own size, even one that is mere rounding.
    # Without these two settings the losses would show how such noise grows.
    "optimizer.lr": 2e-4,
    "optimizer.eps": 1e-6,
    "checkpoint.interval": 1000,
    "lighthouse.log_selection_every": 2,
    "validation.enable": True,
    "validation.freq": 3,
    "validation.steps": 2,
    "validation.seq_len": 512,
    "validation.local_batch_size": 1,
}
CP2 = {"parallelism.context_parallel_degree": 2}
TP2 = {"parallelism.tensor_parallel_degree": 2}
# Two sequences, so that both pipeline stages have work at the same time.
PP2 = {
    "lighthouse.log_selection_every": 0,
    "parallelism.pipeline_parallel_degree": 2,
    "training.local_batch_size": 2,
    "validation.local_batch_size": 2,
    "validation.steps": 1,
}
WINDOW = {"lighthouse.window": 40, "lighthouse.combine": "finest"}
# The one process that a composition is compared with has its settings of these keys.
SHARED = ("training.global_batch_size", "lighthouse.attention", *WINDOW)
WINDOW_ALONE = {"lighthouse.attention": "window", "lighthouse.window": 40}
COMPOSITIONS = {
    "cp2-contiguous-selective": (2, {
        **CP2, "parallelism.context_parallel_load_balancer": "None",
        "activation_checkpoint.mode": "selective",
    }),
}  # fmt: skip
SLOW_COMPOSITIONS = {
    "tp2-cp2-full": (4, {**TP2, **CP2, "activation_checkpoint.mode": "full"}),
    "pp2": (2, PP2),
    "pp2-interleaved-selective": (2, {
        **PP2, "parallelism.pipeline_parallel_schedule": "Interleaved1F1B",
        "activation_checkpoint.mode": "selective",
    }),
    "pp2-gpipe": (2, {**PP2, "parallelism.pipeline_parallel_schedule": "GPipe"}),
    "pp2-compile": (2, {**PP2, "compile.enable": True}),
    "pp2-cp2": (4, {**PP2, **CP2}),
    "pp2-window": (2, {**PP2, **WINDOW}),
    "pp2-window-alone": (2, {**PP2, **WINDOW_ALONE}),
    "cp2-contiguous-window-compile": (2, {
        **CP2, **WINDOW, "parallelism.context_parallel_load_balancer": "None",
        "activation_checkpoint.mode": "lighthouse", "compile.enable": True,
    }),
    "cp2-window-alone-compile": (2, {**CP2, **WINDOW_ALONE, "compile.enable": True}),
    "cp4-window-compile": (4, {
        **WINDOW, "parallelism.context_parallel_degree": 4,
        "activation_checkpoint.mode": "selective", "compile.enable": True,
    }),
    "cp4-contiguous-window-alone-compile": (4, {
        **WINDOW_ALONE, "parallelism.context_parallel_degree": 4,
        "parallelism.context_parallel_load_balancer": "None",
        "activation_checkpoint.mode": "selective", "compile.enable": True,
    }),
    "tp2-cp2-window-full": (4, {
        **TP2, **CP2, **WINDOW, "activation_checkpoint.mode": "full",
    }),
    "pp2-cp2-window": (4, {**PP2, **CP2, **WINDOW}),
    "pp2-tp2-full": (4, {**PP2, **TP2, "activation_checkpoint.mode": "full"}),
    "fsdp2-pp2": (4, {**PP2, "training.global_batch_size": 4}),
    "cp2": (2, CP2),
    "cp4": (4, {"parallelism.context_parallel_degree": 4}),
    "cp2-compile": (2, {**CP2, "compile.enable": True}),
    "cp4-compile": (4, {
        "parallelism.context_parallel_degree": 4, "activation_checkpoint.mode": "lighthouse",
        "compile.enable": True,
    }),
    "cp2-selective-compile": (2, {
        **CP2, "activation_checkpoint.mode": "selective", "compile.enable": True,
    }),
    "cp2-lighthouse-compile": (2, {
        **CP2, "activation_checkpoint.mode": "lighthouse", "compile.enable": True,
    }),
    "tp2": (2, TP2),
    "tp2-cp2-selective": (4, {**TP2, **CP2, "activation_checkpoint.mode": "selective"}),
    "cp2-chunked": (2, {**CP2, "lighthouse.loss": "chunked"}),
    "tp2-cp2-lighthouse": (4, {
        **TP2, **CP2, "activation_checkpoint.mode": "lighthouse",
        "activation_checkpoint.keep_products": ["wo", "w1", "w3"],
    }),
    "fsdp2": (2, {}),
    "fsdp2-tp2": (4, TP2),
    "fsdp2-compile": (2, {"compile.enable": True, "activation_checkpoint.mode": "selective"}),
    "fsdp2-cp2": (4, CP2),
    "fsdp2-cp2-compile": (4, {**CP2, "compile.enable": True}),
    "fsdp2-cp2-chunked": (4, {
        **CP2, "lighthouse.loss": "chunked",
        "parallelism.fsdp_reshard_after_forward": "always",
    }),
    "hsdp2-cp2": (4, {
        **CP2, "parallelism.data_parallel_replicate_degree": 2,
        "parallelism.data_parallel_shard_degree": 1,
    }),
}  # fmt: skip


def selection_statistics(folder: Path) -> dict[int, dict[str, float]]:
    """Recorded statistics of selections, by step, from a metrics file that only one rank wrote."""
    text = (folder / "dump/metrics.jsonl").read_text()
    assert text.count("loss_metrics/global_avg_loss") == 6
    found = {}
    for step, entry in read_metrics(folder / "dump").items():
        if values := {k: v for k, v in entry.items() if k.startswith("selection/")}:
            found[step] = values
    return found


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Run]:
    """Settings that start from a seed checkpoint, and a run with them on one process."""
    folder = tmp_path_factory.mktemp("one")
    seed = folder / "seed"
    Run(folder, {**SETTINGS, "checkpoint.create_seed_checkpoint": True}).succeed()
    shutil.move(folder / "dump/checkpoint/step-0", seed)
    shutil.rmtree(folder / "dump/checkpoint")
    settings = {**SETTINGS, "checkpoint.initial_load_path": seed}
    return settings, Run(folder, settings).succeed()


@pytest.mark.parametrize(
    "name",
    [*COMPOSITIONS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_COMPOSITIONS)],
)
def test_six_steps_equal_those_of_one_process(
    name: str, one_process: tuple[dict, Run], tmp_path: Path
) -> None:
    settings, expected = one_process
    processes, changed = {**COMPOSITIONS, **SLOW_COMPOSITIONS}[name]
    shared = {key: changed[key] for key in SHARED if key in changed}
    batch = (settings | shared)["training.global_batch_size"]
    if shared:
        (tmp_path / "one").mkdir()
        if "lighthouse.attention" in shared:
            # A window that stands alone selects nothing to log.
            settings = {**settings, "lighthouse.log_selection_every": 0}
        expected = Run(tmp_path / "one", {**settings, **shared}).succeed()
    run = Run(tmp_path, {**settings, **changed}, processes).succeed()
    data_parallel = name.startswith(("fsdp", "hsdp"))
    for step, want in expected.steps().items():
        line = run.steps()[step]
        tokens = line["tokens_seen"]
        assert tokens == want["tokens_seen"] == 512 * batch * step
        for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("maximum_loss", 1e-5)):
            # The maximum is taken over ranks that read different text.
            if key != "maximum_loss" or not data_parallel:
                value, wanted = float.fromhex(line[key]), float.fromhex(want[key])
                assert value == pytest.approx(wanted, rel=tolerance), (step, key)
    assert len(validation_losses(expected)) == 3
    if not data_parallel:
        assert validation_losses(run) == pytest.approx(validation_losses(expected), rel=2e-5)
    if "pp2" in name:
        assert selection_statistics(tmp_path) == {}
    elif not data_parallel:
        statistics = selection_statistics(expected.record_file.parent)
        # One of 128 picks may differ, by the rounding of the step between the two passes.
        assert selection_statistics(tmp_path) == {
            step: pytest.approx(values, abs=0.01) for step, values in statistics.items()
        }
    else:
        assert list(selection_statistics(tmp_path)) == [2, 4]


@pytest.mark.parametrize("window", [WINDOW, WINDOW_ALONE], ids=["beside", "alone"])
def test_six_steps_under_a_window_equal_those_of_one_process(
    window: dict, one_process: tuple[dict, Run], tmp_path: Path
) -> None:
    changed = {
        **window, "training.seq_len": 256, "lighthouse.top_k": 32,
        "lighthouse.picks_per_stratum": 4, "training.global_batch_size": 1,
        "lighthouse.log_selection_every": 0, "validation.enable": False,
    }  # fmt: skip
    settings = {**one_process[0], **changed}
    runs = []
    for processes, mesh in ((1, {}), (2, CP2)):
        (tmp_path / f"{processes}").mkdir()
        runs.append(Run(tmp_path / f"{processes}", {**settings, **mesh}, processes).succeed())
    expected, found = (run.steps() for run in runs)
    assert list(expected) == list(range(1, 7))
    for step, want in expected.items():
        for key in ("loss", "grad_norm"):
            value, wanted = float.fromhex(found[step][key]), float.fromhex(want[key])
            # Without the gradient of the halo the norm differs by 6e-5, and by rounding by 5e-7.
            assert value == pytest.approx(wanted, rel=1e-5), (step, key)


def test_a_pipeline_cuts_the_batch_of_its_stages(
    one_process: tuple[dict, Run], tmp_path: Path
) -> None:
    """The run's own local batch, one sequence, would be too few for two parts of a pipeline."""
    changed = {
        "lighthouse.schedule": ["lighthouse until=2 seq_len=256 top_k=32", "dense seq_len=256"],
        "lighthouse.dense_from_step": 10000, "lighthouse.log_selection_every": 0,
        "training.steps": 3, "validation.enable": False,
    }  # fmt: skip
    settings, losses = {**one_process[0], **changed}, []
    for processes in (1, 2):
        (tmp_path / f"{processes}").mkdir()
        mesh = {"parallelism.pipeline_parallel_degree": processes}
        run = Run(tmp_path / f"{processes}", {**settings, **mesh}, processes).succeed()
        losses.append({step: float.fromhex(line["loss"]) for step, line in run.steps().items()})
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_training_continues_on_another_mesh(one_process: tuple[dict, Run], tmp_path: Path) -> None:
    """One process, then two data-parallel ones, then two that share each sequence.

    The second run saves a step at which the selection was recorded.
    """
    settings, expected = one_process
    settings = {**settings, "lr_scheduler.total_steps": 6, "validation.enable": False}
    Run(tmp_path, {**settings, "training.steps": 3}).succeed()
    Run(tmp_path, {**settings, "training.steps": 4}, processes=2).succeed()
    other_batch = Run(tmp_path, {**settings, "training.global_batch_size": 4}, processes=2)
    assert other_batch.wait() != 0
    assert "pass --lighthouse.data_streams 2, or" in other_batch.log
    run = Run(tmp_path, {**settings, **CP2}, processes=2).succeed()
    for step, want in expected.steps().items():
        seen = run.steps()[step]["batches"]
        if step == 4:
            seen = seen + run.steps(rank=1)[step]["batches"]
        assert seen == want["batches"]
        loss = float.fromhex(run.steps()[step]["loss"])
        assert loss == pytest.approx(float.fromhex(want["loss"]), rel=1e-5)
