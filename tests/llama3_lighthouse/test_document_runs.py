"""Whole runs with ``training.document_mask``: stages, resume, counts, meshes and refusals."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import SMALL, VALIDATED, Run, arguments, validation_losses
from text_data import write_jsonl

from torchtitan.models.llama3_lighthouse.checks.configuration import check_config
from torchtitan.models.llama3_lighthouse.checks.unread import warnings_of
from torchtitan.models.llama3_lighthouse.data.documents import DOCUMENTS, PADDING
from torchtitan.models.llama3_lighthouse.document_statistics import DocumentStatistics
from torchtitan.models.llama3_lighthouse.dry_run import dry_run
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.infra.pass_graphs import why_no_graphs
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.studies.ablation_results import read_metrics

MASKED = {
    "training.document_mask": True,
    "lighthouse.window": 24,
    "lighthouse.combine": "finest",
    "training.dataset": "c4_local",
}
# The numbers that have to be the same where two runs compute the same.
EXACT = ("stage", "batches", "loss", "grad_norm", "tokens_seen")
LENGTHS = [{2: 300, 3: 700}.get(i % 6, 3 + 37 * i % 211) for i in range(60)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Documents from a few tokens to those of several sequences of 128."""
    generator = torch.Generator().manual_seed(0)
    texts = [
        bytes(torch.randint(97, 123, (n,), generator=generator).tolist()).decode() for n in LENGTHS
    ]
    folder = tmp_path_factory.mktemp("documents")
    return write_jsonl(folder, {"train.jsonl": texts, "validation.jsonl": texts[::-1]})


def settings_of(text: Path, **settings: Any) -> dict[str, Any]:
    return {
        **MASKED, "training.dataset_path": text, "training.seq_len": 128,
        # Four strata, for the chunks of two ranks.
        "lighthouse.top_k": 16, "lighthouse.picks_per_stratum": 4, **settings,
    }  # fmt: skip


def exact(run: Run) -> dict[int, tuple[object, ...]]:
    return {step: tuple(line[key] for key in EXACT) for step, line in run.steps().items()}


def validated(text: Path) -> dict[str, Any]:
    return {
        **VALIDATED, "validation.dataset": "c4_local", "validation.dataset_path": text,
        "validation.seq_len": 128, "validation.freq": 5, "validation.steps": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def ten_steps(text: Path, tmp_path_factory) -> Run:
    settings = {
        **settings_of(text), **validated(text), "training.steps": 10,
        "lighthouse.dense_from_step": 6, "checkpoint.interval": 3, "training.local_batch_size": 2,
        "lighthouse.log_selection_every": 4, "activation_checkpoint.mode": "lighthouse",
    }  # fmt: skip
    run = Run(tmp_path_factory.mktemp("straight"), settings).succeed()
    run.settings = settings
    return run


@pytest.mark.parametrize("step", [3, 6, 9])
def test_resume_leaves_no_trace(ten_steps: Run, tmp_path: Path, step: int) -> None:
    """In the Lighthouse stage, at the switch and in the dense stage."""
    folder = tmp_path / "dump/checkpoint"
    folder.mkdir(parents=True)
    name = f"step-{step}"
    shutil.copytree(ten_steps.log_file.parent / "dump/checkpoint" / name, folder / name)
    resumed = Run(tmp_path, ten_steps.settings).succeed()
    expected = exact(ten_steps)
    assert sorted(expected) == list(range(1, 11))
    assert exact(resumed) == {n: expected[n] for n in range(step + 1, 11)}
    assert validation_losses(resumed).items() <= validation_losses(ten_steps).items()


def test_the_log_and_the_metrics_say_what_documents_there_are(ten_steps: Run, text: Path) -> None:
    log = ten_steps.log
    assert "documents     do not see each other and each begins at a multiple" in log
    lines = read_metrics(ten_steps.log_file.parent / "dump")
    documents = [line["lighthouse/documents"] for line in lines.values()]
    padding = [line["lighthouse/padding_share"] for line in lines.values()]
    assert all(1 <= count <= 128 for count in documents) and max(documents) >= 2
    assert all(0 <= share < 0.1 for share in padding) and max(padding) > 0
    # A batch has 256 positions.
    assert all(share * 256 == int(share * 256) for share in padding)
    assert list(validation_losses(ten_steps)) == ["1", "5", "10"]
    assert "selection/level_" in (ten_steps.log_file.parent / "dump/metrics.jsonl").read_text()


def test_masks_are_given_where_a_row_holds_several_documents(ten_steps: Run) -> None:
    """Microbatches have two rows. One with several documents is enough."""
    rows, masked = [], []
    for step, line in ten_steps.steps().items():
        rows += line["rows"]
        # Selections are recorded before and after steps 4 and, in the dense stage, not at 8.
        assert len(line["masked"]) == (3 if step == 4 else 1)
        assert len(set(line["masked"])) == 1
        masked.append(line["masked"][0])
    assert masked == [any(several) for several in rows]
    assert [False, False] in rows and ([True, False] in rows or [False, True] in rows)


@pytest.fixture(scope="module")
def one_process(text: Path, tmp_path_factory) -> Run:
    """Four steps of both stages by one process, from a seed checkpoint."""
    folder = tmp_path_factory.mktemp("one")
    settings = {
        **settings_of(text), **validated(text), "training.steps": 4,
        "lighthouse.dense_from_step": 2, "training.global_batch_size": 2, "validation.freq": 2,
        "checkpoint.interval": 1000,
        # Without these two, AdamW's first steps show the rounding of each gradient.
        "optimizer.lr": 2e-4, "optimizer.eps": 1e-6,
    }  # fmt: skip
    Run(folder, {**settings, "checkpoint.create_seed_checkpoint": True}).succeed()
    shutil.move(folder / "dump/checkpoint/step-0", folder / "seed")
    shutil.rmtree(folder / "dump")
    settings["checkpoint.initial_load_path"] = folder / "seed"
    run = Run(folder, settings).succeed()
    run.settings = settings
    return run


@pytest.mark.parametrize(
    "mesh",
    [
        {"parallelism.data_parallel_shard_degree": 2},
        {"parallelism.tensor_parallel_degree": 2, "lighthouse.document_positions": "restart"},
        {
            "parallelism.context_parallel_degree": 2, "lighthouse.document_positions": "restart",
            "activation_checkpoint.mode": "lighthouse",
        },
        # ``test_document_chunks.py`` has attention over chunks in order, ``test_parallelism.py``
        # training on them.
        pytest.param(
            {
                "parallelism.context_parallel_degree": 2,
                "parallelism.context_parallel_load_balancer": "None",
            },
            marks=pytest.mark.slow,
        ),
        {
            "parallelism.pipeline_parallel_degree": 2, "training.local_batch_size": 2,
            "validation.local_batch_size": 2, "lighthouse.document_positions": "restart",
        },
    ],
    ids=["fsdp", "tensor", "context", "contiguous", "pipeline"],
)  # fmt: skip
def test_meshes_and_positions_train_alike(
    one_process: Run, tmp_path: Path, mesh: dict[str, Any]
) -> None:
    run = Run(tmp_path, {**one_process.settings, **mesh}, processes=2).succeed()
    for step, want in one_process.steps().items():
        for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
            value, wanted = (float.fromhex(x[key]) for x in (run.steps()[step], want))
            assert value == pytest.approx(wanted, rel=tolerance), (step, key)
    if "parallelism.data_parallel_shard_degree" not in mesh:
        expected = validation_losses(one_process)
        assert validation_losses(run) == pytest.approx(expected, rel=2e-5) and expected
    # Some microbatches have masks and some have not, unless ranks read other text.
    lines = [line for rank in range(2) for line in run.steps(rank).values()]
    several = {True} if "parallelism.data_parallel_shard_degree" in mesh else {False, True}
    assert {x for line in lines for x in line["masked"]} == several
    one, two = (list(read_metrics(x.log_file.parent / "dump").values()) for x in (one_process, run))
    for key in ("lighthouse/documents", "lighthouse/padding_share"):
        values = [x[key] for x in one]
        assert [x[key] for x in two] == pytest.approx(values) and len(set(values)) > 1


def test_a_schedule_changes_lengths_spans_and_attentions(text: Path, tmp_path: Path) -> None:
    """Validation has one layout for all stages, and a resume in each leaves no trace."""
    settings = {
        **settings_of(text), **validated(text), "training.steps": 5, "checkpoint.interval": 1,
        "validation.freq": 1, "validation.steps": 1,
        "lighthouse.dense_from_step": JobConfig().lighthouse.dense_from_step,
        "lighthouse.schedule": [
            "lighthouse until=1 seq_len=64 levels=2", "lighthouse until=2 levels=4 top_k=8",
            "window until=3 window=16", "lighthouse until=4", "dense",
        ],
    }  # fmt: skip
    (tmp_path / "straight").mkdir()
    straight = Run(tmp_path / "straight", settings).succeed()
    expected = exact(straight)
    assert sorted(expected) == [1, 2, 3, 4, 5] and len(validation_losses(straight)) == 5
    assert "each begins at a multiple of 8 positions" in straight.log
    for step in (1, 3):
        folder = tmp_path / f"{step}"
        (folder / "dump/checkpoint").mkdir(parents=True)
        name = f"dump/checkpoint/step-{step}"
        shutil.copytree(tmp_path / "straight" / name, folder / name)
        resumed = Run(folder, settings).succeed()
        assert exact(resumed) == {n: expected[n] for n in range(step + 1, 6)}
        assert validation_losses(resumed).items() <= validation_losses(straight).items()


def test_compiled_blocks_take_documents(text: Path, tmp_path: Path) -> None:
    """Each block is one graph, in both stages; ``aot_eager`` traces as inductor does."""
    settings = {"training.steps": 4, "lighthouse.dense_from_step": 2, "checkpoint.enable": False}
    compiled = {"compile.enable": True, "compile.backend": "aot_eager"}
    runs = []
    for name, more in (("eager", {}), ("compiled", compiled)):
        (tmp_path / name).mkdir()
        runs.append(Run(tmp_path / name, settings_of(text, **settings, **more)).succeed())
    one, other = ([float.fromhex(line["loss"]) for line in run.steps().values()] for run in runs)
    assert one == pytest.approx(other, rel=1e-4)
    # Each stage has compiled both with masks and without.
    for stage in ("lighthouse", "dense"):
        lines = [line for line in runs[1].steps().values() if line["stage"] == stage]
        assert {x for line in lines for x in line["masked"]} == {False, True}


def parsed(text: Path, folder: Path, **settings: Any) -> JobConfig:
    given = settings_of(text, **{"job.dump_folder": folder / "dump", **settings})
    return LighthouseConfigManager().parse_args(arguments({**SMALL, **given}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lighthouse.window": 0},
            "needs a window beside Lighthouse attention: with lighthouse.window = 0, up to 3 "
            "positions at the beginning of each document would attend over nothing; pass "
            "--lighthouse.window 512 --lighthouse.combine finest, or pass "
            "--training.no-document_mask",
        ),
        ({"lighthouse.repeat_mix": 0.1, "training.seq_len": 4096}, "lighthouse.repeat_mix = 0.1"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_masks_is_refused(text, tmp_path, settings, message) -> None:
    config = parsed(text, tmp_path, **settings)
    with pytest.raises(UserValueError, match="training.document_mask = true") as raised:
        check_config(config, flavors)
    assert message in str(raised.value)
    config.training.document_mask = False
    check_config(config, flavors)


def test_a_stage_of_a_schedule_is_refused_by_name(text: Path, tmp_path: Path) -> None:
    schedule = ["lighthouse until=4", "lighthouse until=8 window=0", "dense"]
    config = parsed(text, tmp_path, **{"lighthouse.schedule": schedule})
    config.lighthouse.dense_from_step = JobConfig().lighthouse.dense_from_step
    with pytest.raises(UserValueError, match=r"stage 'lighthouse until=8 window=0': .*a window"):
        check_config(config, flavors)
    config.lighthouse.schedule[1] = "window until=8 window=16"
    check_config(config, flavors)


def test_a_dense_run_needs_no_window(text: Path, tmp_path: Path) -> None:
    config = parsed(text, tmp_path, **{"lighthouse.window": 0, "lighthouse.stage": "dense"})
    check_config(config, flavors)


def test_positions_have_no_effect_without_masks(text: Path, tmp_path: Path) -> None:
    settings = {"training.document_mask": False, "lighthouse.document_positions": "restart"}
    lines = warnings_of(parsed(text, tmp_path, **settings), 1)
    assert any("lighthouse.document_positions = 'restart' has no effect" in x for x in lines)


def test_dry_run_says_what_flops_count(text: Path, tmp_path: Path) -> None:
    lines = dry_run(parsed(text, tmp_path), 1)
    assert "documents     do not see each other" in lines
    assert "FLOPs below are the most, those of one document a sequence" in lines
    without = dry_run(parsed(text, tmp_path, **{"training.document_mask": False}), 1)
    assert "documents     " not in without


def test_masks_leave_cuda_graphs_on(text: Path, tmp_path: Path) -> None:
    """Documents are an input of one shape, which a graph copies to its own address."""
    compiled = {"compile.enable": True, "activation_checkpoint.mode": "lighthouse"}
    assert why_no_graphs(parsed(text, tmp_path, **compiled), 1) is None


def test_counts_of_a_step() -> None:
    layouts = [[[0, 0, 2, 2], [0, 0, 0, 0]], [[0, 1, 2, 3], [0, 0, 0, 3]]]
    microbatches = [
        ({"input": torch.zeros(2, 4), DOCUMENTS: torch.tensor(x), PADDING: torch.tensor([1, 0])},
         torch.zeros(2, 4))
        for x in layouts
    ]  # fmt: skip
    statistics = DocumentStatistics()
    statistics.count(microbatches)
    assert all(list(inputs) == ["input", DOCUMENTS] for inputs, _ in microbatches)
    # Two ranks that have the same.
    metrics = statistics.metrics(lambda mesh, value: 2 * value.item())
    assert metrics == {"lighthouse/documents": 9 / 4, "lighthouse/padding_share": 2 / 16}
    statistics.count([({"input": torch.zeros(2, 4)}, torch.zeros(2, 4))])
    assert statistics.metrics(lambda mesh, value: value.item()) == {}


@pytest.mark.parametrize(
    ("length", "documents", "padding", "message"),
    [
        (512, 32, 416, "81% of the positions of this step are padding, which trains nothing: the "
         "text's documents are short, and each begins at a multiple of pooling_factor.*lower "
         "lighthouse.levels or lighthouse.pooling_factor"),
        (512, 32, 102, ""),
    ],
)  # fmt: skip
def test_a_large_share_of_padding_is_said_once(caplog, length, documents, padding, message) -> None:
    layout = torch.zeros(1, length, dtype=torch.int32)
    layout[0, :documents] = torch.arange(documents)
    layout[0, documents:] = documents - 1
    statistics = DocumentStatistics()
    for _ in range(3):
        inputs = {DOCUMENTS: layout, PADDING: torch.tensor([padding])}
        statistics.count([(inputs, torch.zeros(1, length))])
        with caplog.at_level("WARNING"):
            statistics.metrics(lambda mesh, value: value.item())
    assert len(caplog.records) == bool(message)
    assert re.search(message, caplog.text)
