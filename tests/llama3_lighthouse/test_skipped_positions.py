"""Short stages whose rotary positions skip, so that they train the distances of long sequences."""

import re
from pathlib import Path
from typing import Any

import pytest
import small_flavor  # noqa: F401
import torch
from launch import Run, continued
from sharp_start import losses, run_from_sharp_weights
from small_model import SIZE, build
from text_data import config, loader, write_jsonl
from torch.nn.functional import scaled_dot_product_attention

from torchtitan.models.llama3_lighthouse.data.packing import build_validation_dataloader
from torchtitan.models.llama3_lighthouse.data.skipped_positions import (
    PARTS,
    POSITIONS,
    SkippedPositions,
    skipped_positions_of,
)
from torchtitan.models.llama3_lighthouse.data.staged import build_staged_dataloader
from torchtitan.models.llama3_lighthouse.data.tokenizer import ByteTokenizer
from torchtitan.models.llama3_lighthouse.job_config import JobConfig
from torchtitan.models.llama3_lighthouse.model.model import LighthouseModelArgs
from torchtitan.models.llama3_lighthouse.model.rotary import RotaryAttention, turns_at
from torchtitan.models.llama3_lighthouse.stages import stage_at, stages_of

N, MOST = 16, 64


def test_positions_skip_at_cuts_and_every_distance_occurs() -> None:
    most = N + 8
    skipped = SkippedPositions(N, most)
    seen, cuts, first, last = set(), set(), set(), set()
    for sequence in range(4000):
        positions = skipped.of(3, sequence)
        assert positions.dtype == torch.int32 and positions.shape == (N,)
        assert positions[0] == 0 and positions[-1] < most
        skips = positions.diff() - 1
        assert (skips >= 0).all() and (skips > 0).sum() < PARTS
        places = skips.nonzero().flatten().tolist()
        cuts |= {place + 1 for place in places}
        last.add(int(skips.sum()))
        if places:
            first.add(int(skips[places[0]]))
        seen |= set((positions[:, None] - positions).flatten().tolist())
    assert cuts == set(range(1, N)) and last == first | {0} == set(range(9))
    assert seen == set(range(1 - most, most))


def test_sixty_percent_of_pairs_lie_in_different_parts() -> None:
    length, sequences = 256, 2000
    # So many positions that a skip of 0 is rare.
    skipped = SkippedPositions(length, 2**30)
    plain, apart = torch.arange(length), 0
    for sequence in range(sequences):
        positions = skipped.of(0, sequence)
        distances, before = (x[:, None] - x for x in (positions.long(), plain))
        apart += (distances != before).sum().item()
    assert apart / sequences / (length * (length - 1)) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_sequence_may_be_shorter_than_its_parts(length: int) -> None:
    positions = SkippedPositions(length, 8).of(0, 0)
    assert len(positions) == length and positions[-1] < 8


def test_positions_depend_on_seed_stream_and_number_alone() -> None:
    def of(seed: int, stream: int, sequence: int) -> list[int]:
        return SkippedPositions(N, MOST, seed).of(stream, sequence).tolist()

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert of(0, 0, 0) == of(0, 0, 0)
    assert len({tuple(of(*place)) for place in places}) == len(places)


def job_of(folder: Path, stages: list[str], **options: Any) -> JobConfig:
    job = config(path=folder, seq_len=MOST, batch_size=1, **options)
    job.training.steps, job.training.global_batch_size = 6, 2
    job.lighthouse.schedule = stages
    return job


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "text", {"a.jsonl": [f"{i} " * 400 for i in range(8)]})


def test_a_stage_takes_its_own_positions_or_those_of_all(text: Path) -> None:
    job = job_of(text, [f"dense until={step} seq_len={N}" for step in (1, 2, 3)] + ["dense"])
    job.lighthouse.schedule[1] += " skip_positions=32"
    job.lighthouse.schedule[2] += " skip_positions=0"
    job.lighthouse.skip_positions, job.lighthouse.shuffle_seed = MOST, 7
    found = [skipped_positions_of(stage.config) for stage in stages_of(job)]
    assert found == [SkippedPositions(N, MOST, 7), SkippedPositions(N, 32, 7), None, None]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resume_has_the_same_positions(text: Path, workers: int) -> None:
    """The text is that of a stage which skips nothing, and the next stages skip nothing either."""

    def read(stages: list[str], stop: int) -> list[dict[str, torch.Tensor]]:
        """The inputs of each of five steps, a row for each sequence; ``stop`` is the last of a
        first loader."""
        job, state, found = job_of(text, stages, workers=workers), None, []
        for first, last in ((1, stop), (stop + 1, 5)):
            each = build_staged_dataloader(1, 0, ByteTokenizer(), job)
            if state:
                each.load_state_dict(state)
            reader = iter(each)
            for step in range(first, last + 1):
                stage = stage_at(step, stages_of(job)).config
                each.use(stage)
                passes = stage.training.global_batch_size // stage.training.local_batch_size
                batches = [next(reader)[0] for _ in range(passes)]
                found.append({key: torch.cat([x[key] for x in batches]) for key in batches[0]})
            state = each.state_dict()
        return found

    # The second stage differs from the first in this alone.
    stages = [f"dense until=2 seq_len={N} skip_positions={MOST}", f"dense until=3 seq_len={N}"]
    whole, plain = read([*stages, "dense"], 5), read([f"dense until=3 seq_len={N}", "dense"], 5)
    for step, (own, other) in enumerate(zip(whole, plain, strict=True), 1):
        assert (POSITIONS in own) == (step <= 2) and POSITIONS not in other
        assert torch.equal(own["input"], other["input"])
    positions = torch.cat([x[POSITIONS] for x in whole[:2]])
    assert len(positions.unique(dim=0)) == len(positions) == 16
    for stop in (1, 2, 4):
        for own, other in zip(whole, read([*stages, "dense"], stop), strict=True):
            assert own.keys() == other.keys()
            assert all(torch.equal(own[key], other[key]) for key in own)


def test_validation_counts_on(text: Path) -> None:
    job = job_of(text, [f"dense until=3 seq_len={N} skip_positions={MOST}", "dense"])
    held_out = write_jsonl(text, {"validation.jsonl": ["some other text " * 40]})
    job.validation.dataset_path = str(held_out)
    stage = stages_of(job)[0].config
    inputs, _ = next(iter(loader(stage, build=build_validation_dataloader)))
    assert set(inputs) == {"input"}


def test_attention_is_that_of_a_long_sequence_without_the_tokens_between() -> None:
    torch.manual_seed(0)
    args = LighthouseModelArgs(**SIZE, dense_layers=[0, 1, 2, 3])
    model = build(args=args).double()
    attention = model.get_submodule("layers.0.attention")
    assert isinstance(attention, RotaryAttention)
    positions = SkippedPositions(N, 256, seed=5).of(0, 0)
    assert positions[-1] > N
    # Small inputs would leave attention nearly even, wherever positions are.
    x = 20 * torch.randn(1, N, args.dim, dtype=torch.float64)
    whole = torch.randn(1, 256, args.dim, dtype=torch.float64)
    whole[:, positions] = x
    table = model.freqs_cis
    q, k, v = (
        projection(whole).view(1, 256, -1, attention.head_dim)
        for projection in (attention.wq, attention.wk, attention.wv)
    )
    q, k = attention.rotated(q, k, turns_at(table, 256, None))
    rows = (each[:, positions].transpose(1, 2) for each in (q, k, v))
    wanted = scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
    wanted = attention.wo(wanted.transpose(1, 2).flatten(2))
    out = attention(x, table, None, positions[None])
    assert torch.allclose(out, wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(out, attention(x, table), rtol=0, atol=1e-3)


STAGES = [
    "lighthouse until=2 seq_len=128 skip_positions=256",
    "dense until=3 seq_len=64 skip_positions=256",
    "dense",
]
SETTINGS = {
    "lighthouse.dense_from_step": 10000, "training.steps": 4, "training.global_batch_size": 2,
    "lighthouse.schedule": STAGES, "lighthouse.top_k": 32, "checkpoint.interval": 1,
    # Without these two, AdamW's first steps show the rounding of each gradient.
    "optimizer.lr": 2e-4, "optimizer.eps": 1e-6,
}  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_from_sharp_weights(tmp_path_factory.mktemp("one"), SETTINGS)


@pytest.mark.parametrize(
    "mesh",
    [
        {"parallelism.context_parallel_degree": 2},
        pytest.param({"parallelism.tensor_parallel_degree": 2}, marks=pytest.mark.slow),
        pytest.param({"parallelism.data_parallel_shard_degree": 2}, marks=pytest.mark.slow),
    ],
    ids=["context", "tensor", "fsdp"],
)
def test_meshes_train_alike(one_process: Run, tmp_path: Path, mesh: dict[str, Any]) -> None:
    run = Run(tmp_path, {**one_process.settings, **mesh}, processes=2).succeed()
    assert losses(run) == pytest.approx(losses(one_process), rel=1e-6)


def test_a_resume_leaves_no_trace_and_positions_matter(one_process: Run, tmp_path: Path) -> None:
    assert "8 sequences of 64 tokens spread over 256 positions" in one_process.log
    begins = re.findall(r"begins at step (\d).* of (.* positions\b.*)", one_process.log)
    assert [(step, runs.split(",")[0]) for step, runs in begins] == [
        ("1", "128 positions spread over 256"),
        ("3", "64 positions spread over 256"),
        ("4", "256 positions"),
    ]
    again = continued(one_process, tmp_path / "resumed", 1)
    assert losses(again) == {step: x for step, x in losses(one_process).items() if step > 1}
    (tmp_path / "plain").mkdir()
    plain = [stage.replace(" skip_positions=256", "") for stage in STAGES]
    other = Run(tmp_path / "plain", {**one_process.settings, "lighthouse.schedule": plain})
    other.succeed()
    for step in (1, 2, 3):
        own, counted = one_process.steps()[step], other.steps()[step]
        assert own["batches"] == counted["batches"]
        # By far more than the tolerance between meshes, under either attention.
        assert losses(other)[step] != pytest.approx(losses(one_process)[step], rel=1e-4)
