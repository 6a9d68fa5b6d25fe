"""Documents in sequences that keep them apart: places, padding, labels, and exact resumes."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_data import config, loader, write_jsonl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from lighthouse.documents import check_layout
from torchtitan.models.llama3_lighthouse import validate
from torchtitan.models.llama3_lighthouse.data.documents import (
    DocumentLayout,
    document_span,
    layout_of,
    model_options,
    without_idle_masks,
)
from torchtitan.models.llama3_lighthouse.data.packing import (
    build_dataloader,
    build_validation_dataloader,
)
from torchtitan.models.llama3_lighthouse.data.retrieval import PromptEncoder
from torchtitan.models.llama3_lighthouse.data.retrieval_mix import RetrievalMix
from torchtitan.models.llama3_lighthouse.data.staged import build_staged_dataloader
from torchtitan.models.llama3_lighthouse.data.tokenizer import BOS_ID, EOS_ID, ByteTokenizer
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, Lighthouse
from torchtitan.models.llama3_lighthouse.stages import stage_at, stages_of

TEXTS = [f"{i:02d}" * (1 + i * i % 97) for i in range(30)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_jsonl(
        tmp_path / "text", {"train.jsonl": TEXTS, "validation.jsonl": ["held", "out"] * 100}
    )


def masked(folder: Path, seq_len: int = 64, workers: int = 0) -> JobConfig:
    job = config(path=folder, seq_len=seq_len, workers=workers)
    job.training.document_mask = True
    job.lighthouse.levels, job.lighthouse.pooling_factor = 3, 2
    return job


def rows(batches: Any, count: int) -> list[tuple[torch.Tensor, ...]]:
    """Inputs, labels, documents and padding of each sequence."""
    return [
        (inputs["input"][i], labels[i], inputs["documents"][i], inputs["padding"][i])
        for inputs, labels in itertools.islice(batches, count)
        for i in range(len(labels))
    ]


@st.composite
def streams(draw: st.DrawFn) -> tuple[DocumentLayout, list[int]]:
    span = draw(st.sampled_from([1, 2, 4, 16]))
    seq_len = span * draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(1, 2 * seq_len), min_size=1, max_size=20))
    # The last one leaves enough for whatever comes before it.
    return DocumentLayout(seq_len, span), [*lengths, seq_len + 1]


@given(streams())
def test_any_documents_lie_apart_and_each_token_is_predicted_once(drawn) -> None:
    layout, lengths = drawn
    total = sum(lengths)
    tokens = np.arange(total, dtype=np.int32)
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    begins = np.cumsum(lengths)[:-1]
    done = 0
    while total - done > layout.seq_len:
        found = layout.lay_out(tokens[done:], [b - done for b in begins.tolist() if b > done])
        real = found.labels != IGNORE_INDEX
        # Inputs and labels are the text, each token once and in its order.
        assert 0 < found.taken == real.sum() == layout.seq_len - found.padding
        assert found.inputs[real].tolist() == list(range(done, done + found.taken))
        assert torch.equal(found.labels[real], found.inputs[real] + 1)
        # A place in the layout belongs to one document of the text, and the other way round.
        places = found.documents.unique()
        assert (places % layout.span == 0).all()
        number = torch.from_numpy(numbers)[found.inputs]
        pairs = torch.stack([found.documents, number], dim=1).unique(dim=0)
        assert len(pairs) == len(places) == len(number.unique())
        # Padding comes after a document's tokens, and less than a span of it before another one.
        for first, end in itertools.pairwise([*places.tolist(), layout.seq_len]):
            tail = (~real[first:end]).sum()
            assert real[first : end - tail].all() and real[first]
            assert end == layout.seq_len or tail < layout.span
        assert found.padding < layout.span * len(places)
        done += found.taken


def test_the_loader_lays_out_the_whole_text(folder: Path) -> None:
    job = masked(folder)
    job.training.local_batch_size = 1
    text, documents = [], 0
    for inputs, labels, layout, padding in rows(iter(loader(job)), 60):
        assert inputs.shape == labels.shape == layout.shape == (64,)
        assert layout.dtype == torch.int32 and inputs.dtype == torch.int64
        real = labels != IGNORE_INDEX
        assert padding == 64 - real.sum()
        # Documents begin with BOS, or go on from the sequence before.
        begins = layout.unique().long()
        assert (inputs[begins[1:]] == BOS_ID).all()
        # Padding repeats a document's last token.
        assert (inputs[~real] == EOS_ID).all()
        documents += (inputs[real] == BOS_ID).sum()
        text += inputs[real].tolist()
    expected = [t for each in TEXTS for t in [BOS_ID, *each.encode(), EOS_ID]]
    assert len(text) > len(expected) and documents > 30
    assert text == (expected * 2)[: len(text)]


def same(one: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, y)
        for pair in zip(one, other, strict=True)
        for x, y in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_twice_changes_nothing(tmp_path: Path, workers: int) -> None:
    """80 batches go through the end of the text, and one document spans many of them."""
    texts = [*TEXTS[:9], "long" * 700, *TEXTS[9:]]
    folder = write_jsonl(tmp_path / "text", {"a.jsonl": texts, "validation.jsonl": ["held out"]})
    job = masked(folder, workers=workers)
    straight = rows(iter(loader(job)), 80)
    found, state = [], None
    for stop in (7, 1, 20, 1, 51):
        part = loader(job)
        if state:
            part.load_state_dict(state)
            # A position that was not read from yet is the one that was given.
            assert part.state_dict() == state
        batches = iter(part)
        found += rows(batches, stop)
        state = part.state_dict()
    assert same(found, straight)
    assert any(padding > 0 for *_, padding in straight)


def test_the_text_goes_on_where_the_length_and_the_span_change(folder: Path) -> None:
    job = masked(folder)
    job.training.steps, job.training.global_batch_size = 9, 2
    job.lighthouse.window, job.lighthouse.combine = 16, "finest"
    job.lighthouse.top_k = job.lighthouse.picks_per_stratum = 4
    job.lighthouse.schedule = [
        "lighthouse until=3 seq_len=32 levels=2",
        "window until=5 seq_len=64",
        "dense",
    ]

    def read(stops: tuple[int, ...]) -> list[tuple[torch.Tensor, ...]]:
        """Sequences of all steps; the loader is built anew after some."""
        stages, reader, found = stages_of(job), None, []
        loader = build_staged_dataloader(1, 0, ByteTokenizer(), job)
        for step in range(1, 10):
            stage = stage_at(step, stages)
            loader.use(stage.config)
            reader = reader or iter(loader)
            training = stage.config.training
            found += rows(reader, training.global_batch_size // training.local_batch_size)
            if step in stops:
                state, reader = loader.state_dict(), None
                loader = build_staged_dataloader(1, 0, ByteTokenizer(), job)
                loader.load_state_dict(state)
        return found

    straight = read(())
    assert [len(row[0]) for row in straight] == [32] * 12 + [64] * 4 + [64] * 8
    spans = [[2] * 12, [1] * 4, [1] * 8]
    for (_, _, layout, padding), span in zip(straight, sum(spans, []), strict=True):
        assert (layout % span == 0).all()
        assert span > 1 or padding == 0
    assert any((layout % 4).any() for _, _, layout, _ in straight[:12])
    for stops in ((2, 4), tuple(range(1, 9))):
        assert same(read(stops), straight)
    # Both streams are read without a gap.
    for stream in range(2):
        text = torch.cat([x[y != IGNORE_INDEX] for x, y, _, _ in straight[stream::2]]).tolist()
        own = [t for each in TEXTS[stream::2] for t in [BOS_ID, *each.encode(), EOS_ID]]
        assert text == (own * 2)[: len(text)]


@pytest.mark.parametrize("first", [True, False])
def test_a_position_is_refused_by_a_run_with_other_masks(folder: Path, first: bool) -> None:
    job, other = masked(folder), masked(folder)
    job.training.document_mask, other.training.document_mask = first, not first
    before = loader(job)
    next(iter(before))
    with pytest.raises(UserValueError, match=f"for training.document_mask = {first}, this run has"):
        loader(other).load_state_dict(before.state_dict())


def test_positions_of_earlier_versions_go_on_without_masks(folder: Path) -> None:
    job = masked(folder)
    job.training.document_mask = False
    before = loader(job)
    next(iter(before))
    state = before.state_dict()
    identity = json.loads(state["identity"])
    del identity["training.document_mask"]
    state["identity"] = json.dumps(identity)
    loader(job).load_state_dict(state)
    with pytest.raises(UserValueError, match="training.document_mask = False, this run has True"):
        loader(masked(folder)).load_state_dict(state)


def test_texts_without_tokens_are_no_documents(tmp_path: Path) -> None:
    """Tokenizers that add neither BOS nor EOS make nothing of spaces."""
    words = Tokenizer(WordLevel({"unknown": 0, "a": 1, "b": 2}, unk_token="unknown"))
    words.pre_tokenizer = Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    texts = ["a b a", " ", "  ", "b a", " ", "a b b b a", " "]
    job = masked(write_jsonl(tmp_path / "text", {"a.jsonl": texts}), seq_len=8)
    job.training.local_batch_size = 1
    straight = rows(iter(build_dataloader(1, 0, tokenizer, job)), 9)
    assert max(len(layout.unique()) for _, _, layout, _ in straight) > 1
    found, state = [], None
    for _ in range(9):
        part = build_dataloader(1, 0, tokenizer, job)
        if state:
            part.load_state_dict(state)
        found += rows(iter(part), 1)
        state = part.state_dict()
    assert same(found, straight)


@pytest.mark.parametrize("mask", [True, False])
def test_a_stream_keeps_no_places_of_what_was_cut(folder: Path, mask: bool) -> None:
    """They would grow with the text, and so would the time that each document takes."""
    job = masked(folder)
    job.training.document_mask = mask
    reader = loader(job)
    for _ in itertools.islice(reader, 60):
        for stream in reader.dataset.streams:
            assert len(vars(stream)["_begins"]) <= len(TEXTS) / 2
    # Each stream has half of the texts, and has read them more than twice.
    assert all(stream.state_dict()["epoch"] >= 2 for stream in reader.dataset.streams)


@pytest.mark.parametrize("begins", [[5, 5], [9, 2], [0], [10**9], ["1"], {"a": 1}, [-1], [True]])
def test_damaged_places_are_refused(folder: Path, begins: Any) -> None:
    job = masked(folder)
    before = loader(job)
    next(iter(before))
    state = before.state_dict()
    state["stream_0"] = json.dumps({**json.loads(state["stream_0"]), "begins": begins})
    with pytest.raises(UserValueError, match="'begins' holds no places"):
        loader(job).load_state_dict(state)


def test_validation_has_masks_and_evaluations_have_none(folder: Path) -> None:
    job = masked(folder)
    inputs, labels = next(iter(loader(job, build=build_validation_dataloader)))
    assert (inputs["documents"] > 0).any() and (labels == IGNORE_INDEX).any()

    def whole(*arguments: Any) -> Any:
        return build_validation_dataloader(*arguments, span=0)

    inputs, labels = next(iter(loader(job, build=whole)))
    assert list(inputs) == ["input"] and (labels != IGNORE_INDEX).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_has_no_masks_if_each_row_is_one_document(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 320, (2, 64), generator=generator)
    one = torch.zeros(2, 64, dtype=torch.int32)
    several = one.clone()
    begin = int(torch.randint(1, 64, (), generator=generator))
    several[seed % 2, begin:] = begin
    idle = {"input": tokens, "documents": one}
    found = without_idle_masks(idle, None)
    assert list(found) == ["input"] and found["input"] is tokens
    kept = {"input": tokens, "documents": several}
    assert without_idle_masks(kept, None) is kept and list(kept) == ["input", "documents"]
    without = {"input": tokens}
    assert without_idle_masks(without, None) is without
    other_ranks: Any = object()
    assert without_idle_masks(idle, other_ranks) is idle and list(idle) == ["input", "documents"]


def test_validation_gives_masks_where_a_row_holds_several_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["x" * (150 if n % 3 else 20) for n in range(20)]
    job = masked(write_jsonl(tmp_path, {"train.jsonl": texts, "validation.jsonl": texts}))
    validator = validate.LighthouseValidator.__new__(validate.LighthouseValidator)
    validator.job_config, validator.batch_mesh = job, None
    job.validation.steps = 8
    validator._build_dataloader = lambda: loader(job, build=build_validation_dataloader)
    monkeypatch.setattr(validate, "device_type", "cpu")
    several = [
        bool(inputs["documents"].any())
        for inputs, _ in itertools.islice(validator._build_dataloader(), job.validation.steps)
    ]
    given = [options for *_, options in validator._batches()]
    assert ["attention_masks" in options for options in given] == several
    assert set(several) == {False, True}


def test_settings_of_a_layout() -> None:
    job = JobConfig()
    assert layout_of(job, 512) is None
    job.training.document_mask = True
    assert layout_of(job, 512) == DocumentLayout(512, 16)
    job.lighthouse.schedule = [
        "lighthouse until=10 levels=4", "window until=20 window=9", "lighthouse until=30", "dense",
    ]  # fmt: skip
    # Validation uses the configuration of the run, and a stage its own.
    assert document_span(job) == 64
    assert [document_span(stage.config) for stage in stages_of(job)] == [64, 1, 16, 1]
    job.lighthouse.schedule = []
    for change in ({"attention": "window"}, {"stage": "dense"}, {"dense_from_step": 0}):
        job.lighthouse = replace(Lighthouse(), **change)
        assert document_span(job) == 1


def test_positions_of_rotary_embedding_run_on_or_restart() -> None:
    documents = torch.tensor([[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    assert model_options(None, Lighthouse()) == {}
    assert list(model_options(documents, Lighthouse())) == ["attention_masks"]
    options = model_options(documents, replace(Lighthouse(), document_positions="restart"))
    assert options["positions"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert options["attention_masks"] is documents


def test_retrieval_documents_lie_apart_and_are_whole() -> None:
    layout = DocumentLayout(1024, 16)
    encoder = PromptEncoder(ByteTokenizer())
    packed = RetrievalMix(encoder, 0.5, 1025, 4)
    mix = RetrievalMix(encoder, 0.5, 1025, 4, layout=layout)
    several = 0
    for number in range(40):
        drawn = mix.draw(number % 4, number)
        assert len(drawn.tokens) == len(drawn.in_loss) == len(drawn.documents) == 1025
        check_layout(torch.from_numpy(drawn.documents[None]), 16)
        firsts = np.unique(drawn.documents)
        padding = 0
        for first, end in itertools.pairwise([*firsts.tolist(), 1025]):
            own = drawn.tokens[first:end]
            # A document ends in EOS, after its last answer, and has no other one.
            length = own.tolist().index(EOS_ID) + 1
            assert (own[length - 1 :] == EOS_ID).all() and end - first - length < 16
            assert (
                drawn.in_loss[first + length - 2]
                and not drawn.in_loss[first + length - 1 : end].any()
            )
            padding += end - first - length
        assert padding == drawn.padding
        several += len(firsts) > 1
        # One document that fills the sequence is that of a mix without masks.
        tokens, in_loss, documents, none = packed.draw(number % 4, number)
        assert none == 0
        if len(firsts) == 1 and not documents.any():
            assert np.array_equal(tokens, drawn.tokens) and np.array_equal(in_loss, drawn.in_loss)
    assert several > 5


@pytest.mark.parametrize("workers", [0, 1])
def test_retrieval_documents_stand_among_the_text(folder: Path, workers: int) -> None:
    """They delay the text, as without masks, and resume with it."""
    job = masked(folder, seq_len=512, workers=workers)
    job.lighthouse.passkey_mix, job.lighthouse.passkey_tasks = 0.5, ["passkey"]
    found, state = [], None
    for stop in (3, 9):
        part = loader(job)
        if state:
            part.load_state_dict(state)
        found += rows(iter(part), stop)
        state = part.state_dict()
    mix = RetrievalMix(
        PromptEncoder(ByteTokenizer()), 0.5, 513, 2, ["passkey"], layout=layout_of(job, 512)
    )
    plain = masked(folder, seq_len=512)
    text = rows(iter(loader(plain)), 6)
    left = [text[0::2], text[1::2]]
    for number, (inputs, labels, documents, padding) in enumerate(found):
        stream, sequence = number % 2, number // 2
        if not mix.takes(stream, sequence):
            assert same([(inputs, labels, documents, padding)], [left[stream].pop(0)])
            continue
        drawn = mix.draw(stream, sequence)
        assert np.array_equal(inputs, drawn.tokens[:-1]) and padding == drawn.padding
        assert np.array_equal(documents, drawn.documents[:-1])
        assert np.array_equal(labels, np.where(drawn.in_loss, drawn.tokens, IGNORE_INDEX)[1:])
    assert len(left[0]) + len(left[1]) == 0
