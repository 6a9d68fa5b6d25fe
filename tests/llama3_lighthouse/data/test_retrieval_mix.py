"""Retrieval documents among the text: their share, their form, and the text around them."""

import re
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from text_data import config, digest, global_batches, loader, write_jsonl
from torchtitan.components.loss import IGNORE_INDEX

from torchtitan.models.llama3_lighthouse.data.packing import build_validation_dataloader
from torchtitan.models.llama3_lighthouse.data.retrieval import (
    TASKS,
    PromptEncoder,
    evaluation_prompt,
)
from torchtitan.models.llama3_lighthouse.data.retrieval_mix import RetrievalMix
from torchtitan.models.llama3_lighthouse.data.tokenizer import BOS_ID, EOS_ID, ByteTokenizer
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, RetrievalTask

SEQ_LEN = 256
# The questions that end a document, with their answers.
QUESTIONS = re.compile(r"(?: [A-Z]{2} = \d){2}$|(?: The pass key (?:of [A-Z]{2} )?is \d+)+$")
# Every retrieval document has a space, and no document of the text has one.
SPACE = ord(" ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    texts = [",".join(f"{i}:{line}" for line in range(random.integers(1, 700))) for i in range(64)]
    return write_jsonl(tmp_path / "text", {"train.jsonl": texts, "validation.jsonl": ["held out"]})


def mixed(folder: Path, rate: float, batch_size=1, seq_len=SEQ_LEN, **options) -> JobConfig:
    job = config(path=folder, seq_len=seq_len, batch_size=batch_size, **options)
    job.lighthouse.passkey_mix = rate
    job.training.global_batch_size = 8
    return job


def sequences(job: JobConfig, count: int, rank=0, ranks=1) -> list[torch.Tensor]:
    """The first ``count`` sequences of a rank, labels included: int64 [seq_len + 1] each."""
    batches = islice(loader(job, rank, ranks), count)
    return [torch.cat([inputs["input"][0], labels[0, -1:]]) for inputs, labels in batches]


def is_retrieval(sequence: torch.Tensor) -> bool:
    return bool((sequence == SPACE).any())


def test_tasks_are_those_of_the_configuration() -> None:
    """``lighthouse.passkey_tasks`` takes exactly the tasks that exist, in the same order."""
    assert tuple(TASKS) == get_args(RetrievalTask)


@pytest.mark.parametrize("rate", [0.03, 0.1, 0.5, 0.9, 1.0])
def test_share_is_reached_in_every_stretch_and_every_batch(folder: Path, rate: float) -> None:
    taken = np.array([is_retrieval(each) for each in sequences(mixed(folder, rate), 800)])
    # 8 streams take turns.
    by_batch = taken.reshape(100, 8)
    assert np.all(np.abs(by_batch.sum(1) - 8 * rate) < 1)
    assert np.all(np.abs(np.cumsum(by_batch, 0) - rate * np.arange(1, 101)[:, None]) <= 1)
    assert abs(taken.mean() - rate) < 0.01


def test_answers_alone_are_labels(folder: Path) -> None:
    """Retrieval documents have the tokens and labels of the mix; in text every token is a label."""
    mix = RetrievalMix(PromptEncoder(ByteTokenizer()), 0.5, SEQ_LEN + 1, streams=8)
    drawn = 0
    for number, (inputs, labels) in enumerate(islice(loader(mixed(folder, 0.5)), 80)):
        if not is_retrieval(inputs["input"]):
            assert torch.equal(inputs["input"][0, 1:], labels[0, :-1])
            continue
        stream, sequence = number % 8, number // 8
        tokens, in_loss = mix.sequence(stream, sequence)
        assert np.array_equal(inputs["input"][0], tokens[:-1])
        assert np.array_equal(labels[0], np.where(in_loss, tokens, IGNORE_INDEX)[1:])
        drawn += 1
    assert drawn == 40


def test_text_is_delayed_and_left_whole(folder: Path) -> None:
    plain = [digest_of(each) for each in sequences(mixed(folder, 0.0, batch_size=1), 400)]
    rest = [each for each in sequences(mixed(folder, 0.3), 400) if not is_retrieval(each)]
    assert len(rest) == 280
    # Each stream is delayed by itself, so the comparison goes stream by stream.
    by_stream = [plain[stream::8] for stream in range(8)]
    found = [by_stream_of(digest_of(each), by_stream) for each in rest]
    for stream in range(8):
        places = [place for owner, place in found if owner == stream]
        assert places == list(range(len(places))) and len(places) > 30


def digest_of(sequence: torch.Tensor) -> bytes:
    return sequence.numpy().tobytes()


def by_stream_of(digest: bytes, by_stream: list[list[bytes]]) -> tuple[int, int]:
    ((stream, place),) = [
        (stream, members.index(digest))
        for stream, members in enumerate(by_stream)
        if digest in members
    ]
    return stream, place


def test_documents_are_whole_answered_and_of_every_kind() -> None:
    mix = RetrievalMix(PromptEncoder(ByteTokenizer()), 0.5, 1025, streams=4)
    kinds, lengths = [], []
    for number in range(200):
        tokens, in_loss = mix.sequence(number % 4, number)
        assert tokens.shape == in_loss.shape == (1025,)
        assert tokens[0] == BOS_ID and tokens[-1] == EOS_ID
        starts = np.flatnonzero(tokens == BOS_ID)
        assert np.array_equal(starts[1:] - 1, np.flatnonzero(tokens == EOS_ID)[:-1])
        for document, counted in zip(
            np.split(tokens, starts[1:]), np.split(in_loss, starts[1:]), strict=True
        ):
            text = ByteTokenizer().decode(document.tolist())
            kinds.append(kind_and_check(text))
            lengths.append(len(document))
            # The answers alone, after BOS, which is no character of the text.
            questions = QUESTIONS.search(text)
            answers = re.finditer(r"\d+", questions[0])
            places = [1 + questions.start() + i for each in answers for i in range(*each.span())]
            assert np.array_equal(np.flatnonzero(counted), places)
    drawn = JobConfig().lighthouse.passkey_tasks
    assert {kind: kinds.count(kind) > len(kinds) / 8 for kind in drawn} == dict.fromkeys(
        drawn, True
    )
    # Every octave of lengths has a like share of the tokens; five octaves lie above 40.
    lengths = np.array(lengths)
    assert lengths.min() < 60 and lengths.max() == 1025
    for shortest in (64, 128, 256, 512):
        inside = lengths[(shortest < lengths) & (lengths <= 2 * shortest)]
        assert inside.sum() > lengths.sum() / 10


def test_tasks_can_be_chosen(folder: Path) -> None:
    """Only the chosen tasks are drawn, and sequences may be too short for the others."""
    job = mixed(folder, 1.0, seq_len=63)
    job.lighthouse.passkey_tasks = ["passkey"]
    for inputs, labels in islice(loader(job), 40):
        text = ByteTokenizer().decode(inputs["input"][0].tolist())
        (key,) = re.findall(r" The pass key is (\d)\. ", text)
        assert text.endswith(f" The pass key is {key}") and (labels >= 0).sum() == 1
    job.lighthouse.passkey_tasks = ["passkey", "several_keys"]
    with pytest.raises(ValueError, match="needs training.seq_len of at least"):
        loader(job)


def kind_and_check(text: str) -> str:
    """The task of a document, after a check that its answers are right."""
    if match := re.search(r"( [A-Z]{2} = \d){2}$", text):
        values = dict(re.findall(r" ([A-Z]{2}) = (\w+);", text))
        answers = dict(re.findall(r" ([A-Z]{2}) = (\d)", match[0]))
        # The questions name the last variable of each chain, which no other one equals.
        assert answers.keys() == values.keys() - set(values.values())
        for name, answer in answers.items():
            while name in values:
                name = values[name]
            assert name == answer
        return "variables"
    question = r" The pass key (?:of [A-Z]{2} )?is \d+"
    asked = re.findall(question, re.search(rf"(?:{question})+$", text)[0])
    stated = re.findall(rf"({question})\. ", text)
    assert sorted(asked) == sorted(stated) and len(set(asked)) == len(asked)
    if len(asked) > 1:
        assert len(asked) == 4
        return "several_keys"
    return "passkey" if re.search(r" \d$", text) else "long_passkey"


def test_no_document_repeats_and_none_is_an_evaluation_prompt() -> None:
    encoder = PromptEncoder(ByteTokenizer())
    mix = RetrievalMix(encoder, 0.5, 513, streams=4)
    seen = {mix.sequence(s, n)[0].tobytes() for s in range(4) for n in range(50)}
    assert len(seen) == 200
    task = TASKS["passkey"]
    beginnings = {
        evaluation_prompt(encoder, task, 510, depth / 10, trial).tokens[:100].tobytes()
        for depth in range(11)
        for trial in range(20)
    }
    documents = set()
    for each in seen:
        tokens = np.frombuffer(each, np.int32)
        documents |= {
            document[:100].tobytes()
            for document in np.split(tokens, np.flatnonzero(tokens == BOS_ID))
        }
    assert len(beginnings) == 220 and not beginnings & documents


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_is_exact_at_every_batch(folder: Path, workers: int) -> None:
    job = mixed(folder, 0.4, workers=workers)
    straight = [digest(batch) for batch in islice(loader(job), 60)]
    assert len(set(straight)) == 60
    for stop in range(1, 40, 3 if workers == 0 else 19):
        resumed, state = [], None
        for count in (stop, 3, 10):
            part = loader(job)
            if state:
                part.load_state_dict(state)
            resumed += [digest(batch) for batch in islice(part, count)]
            state = part.state_dict()
        assert resumed == straight[: stop + 13]


def test_global_batches_do_not_depend_on_the_ranks(folder: Path) -> None:
    """The number of ranks changes three times, and the text ends in between."""
    job = mixed(folder, 0.4)
    straight, _ = global_batches(job, 1, 90, None)
    changed, state = global_batches(job, 2, 31, None)
    for ranks, count in ((8, 7), (4, 40), (1, 12)):
        batches, state = global_batches(job, ranks, count, state)
        changed += batches
    assert changed == straight


def test_rate_may_change_at_a_resume_and_text_goes_on(folder: Path) -> None:
    first = loader(mixed(folder, 0.25))
    assert sum(is_retrieval(batch[0]["input"]) for batch in islice(first, 80)) == 20
    later = loader(mixed(folder, 0.0))
    later.load_state_dict(first.state_dict())
    plain = sequences(mixed(folder, 0.0), 400)
    goes_on = [batch[0]["input"][0] for batch in islice(later, 40)]
    by_stream = [[digest_of(each[:-1]) for each in plain[stream::8]] for stream in range(8)]
    places = [by_stream_of(digest_of(each), by_stream)[1] for each in goes_on]
    # A quarter of the 80 sequences were not text: each stream has read 7 or 8 of its own.
    assert set(places[:8]) <= {7, 8} and places[8:16] == [place + 1 for place in places[:8]]


def test_held_out_text_is_unmixed(folder: Path) -> None:
    write_jsonl(folder, {"validation.jsonl": [f"{i:03d}" * 1000 for i in range(8)]})
    batches = [
        [digest(batch) for batch in loader(mixed(folder, rate), build=build_validation_dataloader)]
        for rate in (0.0, 0.5)
    ]
    assert batches[0] == batches[1] and len(batches[0]) == 93


def test_sequences_too_short_for_the_documents_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"passkey_mix = 0.1 .* needs training\.seq_len of"):
        loader(mixed(folder, 0.1, seq_len=64))
    loader(mixed(folder, 0.0, seq_len=64))
