"""The text goes on where it was when the length of sequences changes."""

from pathlib import Path

import pytest
import torch
from text_data import config, write_jsonl

from torchtitan.models.llama3_lighthouse.data.staged import (
    StagedDataloader,
    build_staged_dataloader,
)
from torchtitan.models.llama3_lighthouse.data.tokenizer import ByteTokenizer
from torchtitan.models.llama3_lighthouse.job_config import JobConfig
from torchtitan.models.llama3_lighthouse.stages import attention_at, stage_at, stages_of

SCHEDULE = ["dense until=3 seq_len=16", "dense until=5 seq_len=32", "dense"]
STEPS, STREAMS = 9, 4


def job_of(folder: Path, workers: int = 0, schedule: list[str] = SCHEDULE) -> JobConfig:
    job = config(path=folder, seq_len=64, batch_size=2, workers=workers)
    job.training.steps, job.training.global_batch_size = STEPS, STREAMS
    job.lighthouse.schedule = list(schedule)
    return job


def loader(job: JobConfig, rank: int = 0, ranks: int = 1) -> StagedDataloader:
    return build_staged_dataloader(ranks, rank, ByteTokenizer(), job)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Documents whose letters say which stream reads them, each of another length."""
    texts = [chr(ord("a") + i % STREAMS) * (50 + 13 * i) for i in range(40)]
    return write_jsonl(tmp_path / "text", {"a.jsonl": texts})


def read(job: JobConfig, ranks: int, stops: dict[int, int]) -> list[list[torch.Tensor]]:
    """The inputs of each step, a row for each sequence, in the order of the streams.

    Args:
        stops: steps after which all ranks are built anew, and the number of ranks from there on.
    """
    stages, state, steps = stages_of(job), None, []
    step = 0
    while step < STEPS:
        loaders = [loader(job, rank, ranks) for rank in range(ranks)]
        if state is not None:
            for each in loaders:
                each.load_state_dict(state)
                each.check_length(step, stage_at(step, stages).seq_len)
        readers = [iter(each) for each in loaders]
        while step < STEPS:
            step += 1
            stage = stage_at(step, stages)
            training = stage.config.training
            passes = training.global_batch_size // training.local_batch_size // ranks
            rows: list[list[torch.Tensor]] = []
            for each, reader in zip(loaders, readers, strict=True):
                each.use(stage.config)
                found = [next(reader)[0]["input"] for _ in range(passes)]
                assert all(x.shape == (training.local_batch_size, stage.seq_len) for x in found)
                rows.append([row for batch in found for row in batch])
            # A rank reads its streams in turn; in the order of all streams:
            share = STREAMS // ranks
            turns = len(rows[0]) // share
            steps.append(
                [
                    rows[r][t * share + s]
                    for t in range(turns)
                    for r in range(ranks)
                    for s in range(share)
                ]
            )
            if step in stops:
                state = {}
                for each in loaders:
                    state |= each.state_dict()
                ranks = stops[step]
                break
    return steps


@pytest.mark.parametrize("workers", [0, 1])
def test_no_token_is_skipped_or_repeated(text: Path, workers: int) -> None:
    steps = read(job_of(text, workers), 1, {})
    assert [len(rows) for rows in steps] == [16] * 3 + [8] * 2 + [4] * 4
    whole = read(job_of(text, schedule=["dense"]), 1, {})
    for stream in range(STREAMS):
        own, plain = (
            torch.cat([row for rows in each for row in rows[stream::STREAMS]])
            for each in (steps, whole)
        )
        assert torch.equal(own, plain)


@pytest.mark.parametrize("stops", [{3: 2}, {4: 2, 5: 1}, {step: 1 for step in range(1, STEPS)}])
def test_restarts_and_other_meshes_change_nothing(text: Path, stops: dict[int, int]) -> None:
    job = job_of(text, schedule=SCHEDULE)
    job.training.local_batch_size = 1
    expected, found = read(job, 1, {}), read(job, 1, stops)
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


MANY = 8


@pytest.fixture
def text_of_many(tmp_path: Path) -> Path:
    """As ``text``, for twice as many streams as a step of the last stage has sequences."""
    texts = [chr(ord("a") + i % MANY) * (50 + 13 * i) for i in range(80)]
    return write_jsonl(tmp_path / "many", {"a.jsonl": texts})


def read_in_turn(job: JobConfig, ranks: int, stops: dict[int, int]) -> list[list[torch.Tensor]]:
    """The inputs of each step in the order of its sequences; the rest as ``read``."""
    stages, state, steps = stages_of(job), None, []
    while len(steps) < STEPS:
        loaders = [loader(job, rank, ranks) for rank in range(ranks)]
        if state is not None:
            for each in loaders:
                each.load_state_dict(state)
        readers = [iter(each) for each in loaders]
        while len(steps) < STEPS:
            stage = stage_at(len(steps) + 1, stages)
            training = stage.config.training
            passes = training.global_batch_size // training.local_batch_size // ranks
            rows = []
            for each, reader in zip(loaders, readers, strict=True):
                each.use(stage.config)
                for _ in range(passes):
                    rows += list(next(reader)[0]["input"])
            steps.append(rows)
            if len(steps) in stops:
                state = {key: value for each in loaders for key, value in each.state_dict().items()}
                ranks = stops[len(steps)]
                break
    return steps


@pytest.mark.parametrize("schedule", [["dense"], ["dense until=4 seq_len=32", "dense"]])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_more_streams_than_sequences_take_turns(text_of_many: Path, batch: int, schedule) -> None:
    # Each of some twenty loaders would start a process, which takes longer than to read.
    job = job_of(text_of_many, workers=int(batch == 2), schedule=schedule)
    job.training.local_batch_size, job.training.global_batch_size = 1, batch
    job.lighthouse.data_streams = MANY
    expected = read_in_turn(job, 1, {})
    if len(schedule) == 1:
        # Most tokens of a row are the letter of its stream.
        letters = [[chr(int(row.mode().values)) for row in rows] for rows in expected]
        size = MANY // batch
        wanted = [[chr(ord("a") + place * size + step % size) for place in range(batch)]
                  for step in range(STEPS)]  # fmt: skip
        assert letters == wanted
    stops = [{3: 1, 4: 1, 7: 1}, {step: 1 for step in range(1, STEPS)}]
    if batch > 1:
        stops += [{2: 2}, {3: 2, 5: 1, 6: batch}]
    for each in stops:
        found = read_in_turn(job, 1, each)
        for one, other in zip(expected, found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True)), each


def test_another_length_is_refused_unless_it_is_meant(text: Path) -> None:
    job = job_of(text)
    part = loader(job)
    reader = iter(part)
    next(reader)
    state = part.state_dict()
    later = loader(job)
    later.load_state_dict(state)
    with pytest.raises(ValueError, match="after step 4, is in sequences of 16 tokens, .* has 32 t"):
        later.check_length(4, 32)
    job.lighthouse.schedule = []
    with pytest.raises(ValueError, match="seq_len = 16, this run has 64"):
        loader(job).load_state_dict(state)
    job.lighthouse.keep_position = True
    last = loader(job)
    last.load_state_dict(state)
    expected = next(reader)[0]["input"].flatten()
    assert torch.equal(next(iter(last))[0]["input"][0, :16], expected[:16])


def test_stages_of_the_short_form() -> None:
    job = JobConfig()
    job.training.steps = 4
    for stage, switch, expected in (
        ("auto", 2, ["lighthouse", "lighthouse", "dense", "dense"]),
        ("auto", 0, ["dense"] * 4),
        ("auto", 9, ["lighthouse"] * 4),
        ("dense", 9, ["dense"] * 4),
        ("lighthouse", 1, ["lighthouse"] * 4),
    ):
        job.lighthouse.stage, job.lighthouse.dense_from_step = stage, switch
        stages = stages_of(job)
        assert [stage_at(step, stages).attention for step in range(1, 5)] == expected
        assert all(each.config is job for each in stages)
    job.lighthouse.dense_every = 3
    (stage,) = stages_of(job)
    assert [attention_at(step, stage) for step in range(1, 5)] == [
        "lighthouse", "lighthouse", "dense", "lighthouse",
    ]  # fmt: skip
