"""Measures of distance: planted models, what is drawn, and the command's output."""

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import exit_code_of
from text_data import config, write_jsonl
from torchtitan.components.loss import IGNORE_INDEX

from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.data.tokenizer import ByteTokenizer
from torchtitan.models.llama3_lighthouse.evaluation.bootstrap import bootstrap
from torchtitan.models.llama3_lighthouse.evaluation.distance import (
    DistanceSettings,
    _block_ends,
    flat,
    measure,
    plan_of,
    tokens_read,
    values_of,
)
from torchtitan.models.llama3_lighthouse.evaluation.distance_text import (
    held_out_sequences,
    repeat_passage,
)
from torchtitan.models.llama3_lighthouse.evaluation.inference import load_trained_model
from torchtitan.models.llama3_lighthouse.job_config import JobConfig

LENGTH = 2048
CHANCE = math.log(256)
# The planted models take what followed the last occurrence of so many bytes.
MATCHED = 4
SETTINGS = DistanceSettings(
    contexts=(512, 1024), distances=(256, 768, 1024, 1900), passage=(64, 96), batch_tokens=5000
)


def copier(reach: int | None = None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A model of bytes that copies what followed its last bytes where they stood before.

    It knows the next byte for certain where it finds one, and nothing about it elsewhere.

    Args:
        reach: bytes that it can look back; None: all.
    """

    def losses(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = torch.full(inputs.shape, CHANCE)
        for row, tokens in enumerate(inputs.tolist()):
            text, last = bytes(tokens), {}
            for place in range(MATCHED, len(text) + 1):
                matched = text[place - MATCHED : place]
                before = last.get(matched)
                # The first of the matched bytes must lie within reach as well.
                if before is not None and (reach is None or place - before + MATCHED <= reach):
                    right = text[before] == int(labels[row, place - 1])
                    found[row, place - 1] = 0.0 if right else 2 * CHANCE
                last[matched] = place
        return found.masked_fill(labels == IGNORE_INDEX, math.nan)

    return losses


def random_documents(period: int | None = None, count: int = 3) -> list[torch.Tensor]:
    """Documents of random bytes, two sequences each; with a period, they repeat themselves."""
    random = np.random.default_rng(0)
    documents = []
    for _ in range(count):
        rows = random.integers(256, size=(2, period or LENGTH + 1))
        rows = np.tile(rows, -(-(LENGTH + 1) // rows.shape[1]))[:, : LENGTH + 1]
        documents.append(torch.from_numpy(rows))
    return documents


def numbers(losses, documents: list[torch.Tensor]) -> dict[str, float]:
    return flat(list(values_of(losses, documents, plan_of(SETTINGS, LENGTH))))


def test_model_that_copies_has_no_loss_on_repeated_passages() -> None:
    found = numbers(copier(), random_documents())
    for distance in (256, 768, 1024, 1900):
        assert found[f"repeated/{distance}/loss"] == 0.0
        assert found[f"repeated/{distance}/first"] == pytest.approx(CHANCE, abs=0.03)
        assert found[f"repeated/{distance}/control"] == pytest.approx(CHANCE, abs=0.03)
        assert found[f"repeated/{distance}"] == pytest.approx(CHANCE, abs=0.03)
        # Two passages of 64 to 96 tokens in each of 3 documents, less an eighth.
        assert 6 * 56 <= found[f"repeated/{distance}/targets"] <= 6 * 84
        assert found[f"repeated/{distance}/documents"] == 3


def test_model_that_looks_512_tokens_back_has_chance_beyond() -> None:
    found = numbers(copier(512), random_documents())
    for distance in (768, 1024, 1900):
        assert found[f"repeated/{distance}"] == 0.0
        assert found[f"repeated/{distance}/low"] == found[f"repeated/{distance}/high"] == 0.0
        assert found[f"repeated/{distance}/loss"] == pytest.approx(CHANCE, abs=0.03)
    # The same model gains where the passage is near.
    assert found["repeated/256"] == pytest.approx(CHANCE, abs=0.03)
    assert found["repeated/256/loss"] == 0.0


def test_shortened_context_and_positions_tell_how_far_a_model_looks() -> None:
    """The text repeats itself after 700 tokens, so a context of 512 is worth nothing."""
    documents = random_documents(period=700)
    far = numbers(copier(), documents)
    assert far["context/full"] == 0.0
    assert far["context/512"] == far["beyond/512"] == pytest.approx(CHANCE, abs=0.03)
    assert far["context/1024"] == far["beyond/1024"] == 0.0
    assert far["position/512"] == pytest.approx(CHANCE, abs=0.03)
    assert far["position/2048"] == 0.0 < far["position/1024"] < CHANCE
    near = numbers(copier(512), documents)
    assert near["beyond/512"] == near["beyond/1024"] == 0.0
    for key in ("context/full", "context/512", "context/1024", "loss", "position/2048"):
        assert near[key] == pytest.approx(CHANCE, abs=0.03)
    assert near["context/full/targets"] == 3 * 2 * 8 * 128


def test_copying_is_worth_what_lies_within_its_context_to_the_token() -> None:
    """Of a block, each target is in reach if its own shortened context holds its source."""
    settings = DistanceSettings(contexts=(512,), distances=(1024,), passage=(64, 64))
    documents = random_documents(period=450, count=1)
    found = flat(list(values_of(copier(), documents, plan_of(settings, LENGTH))))
    # Targets have 385 to 512 tokens of context; a match takes the 450 and MATCHED before them.
    in_reach = 512 - (450 + MATCHED) + 1
    assert found["context/512"] == pytest.approx(CHANCE * (128 - in_reach) / 128, abs=0.06)
    assert found["context/full"] == 0.0


def test_targets_are_the_same_in_each_context_and_stand_at_its_end() -> None:
    documents = [torch.arange(LENGTH + 1).expand(2, -1)]
    of_token = torch.from_numpy(np.random.default_rng(0).random(LENGTH + 1))

    def by_label(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = of_token[labels.clamp(min=0)]
        return found.masked_fill(labels == IGNORE_INDEX, math.nan)

    def by_place(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = torch.arange(1.0, inputs.shape[1] + 1).repeat(len(inputs), 1)
        return found.masked_fill(labels == IGNORE_INDEX, math.nan)

    for context in (512, 1024):
        assert numbers(by_label, documents)[f"beyond/{context}"] == 0.0
        # Targets of a block have from 127 tokens less than the context to all of it.
        assert numbers(by_place, documents)[f"context/{context}"] == context - 127 / 2


@pytest.mark.parametrize("contexts", [(512, 1024), (1536,), (4, 1000), (1400, 1535)])
def test_blocks_have_enough_context_and_do_not_overlap(contexts: tuple[int, ...]) -> None:
    for seed in range(20):
        settings = DistanceSettings(contexts=contexts, seed=seed)
        plan = plan_of(settings, LENGTH)
        ends = _block_ends(plan, 0)
        assert len(ends) == min(8, (LENGTH - max(contexts)) // plan.block)
        starts = [end - plan.block for end in ends]
        assert starts[0] >= max(contexts) and ends[-1] <= LENGTH + 1
        assert all(start >= end for start, end in zip(starts[1:], ends, strict=False))
        assert plan.block == min(128, contexts[0] // 4)


def test_blocks_of_other_lengths_are_padded_with_text_that_tells_nothing() -> None:
    documents = random_documents()
    seen = []

    def recording(inputs, labels):
        seen.append(inputs.shape[1])
        return copier()(inputs, labels)

    def fit(length):
        return -(-length // 768) * 768

    plan = plan_of(SETTINGS, LENGTH)
    padded = flat(list(values_of(recording, documents, plan, fit)))
    plain = numbers(copier(), documents)
    assert set(seen) == {768, 1536, 2048} and padded.keys() == plain.keys()
    assert padded["beyond/512"] == pytest.approx(plain["beyond/512"], abs=0.03)
    read = []

    def counting(inputs, labels):
        read.append(inputs.numel())
        return copier()(inputs, labels)

    list(values_of(counting, documents, plan, fit))
    assert sum(read) == tokens_read(documents, plan, fit)


def test_passages_return_exactly_at_their_distance_and_nothing_is_lost() -> None:
    random = np.random.default_rng(1)
    drawn = set()
    for number in range(300):
        count = int(random.integers(80, 400))
        longest = int(random.integers(2, count // 4))
        shortest = int(random.integers(2, longest + 1))
        distance = int(random.integers(longest, count - longest))
        tokens = torch.from_numpy(random.permutation(count))
        if count - 2 * longest < 2 or distance > count - 1 - longest:
            continue
        each = repeat_passage(tokens, distance, (shortest, longest), number)
        assert shortest <= each.length <= longest and each.first >= 1
        assert each.again == each.first + distance and each.again + each.length <= count
        first = slice(each.first, each.first + each.length)
        again = slice(each.again, each.again + each.length)
        assert torch.equal(each.repeated[first], each.repeated[again])
        assert torch.equal(each.control[again], each.repeated[again])
        # The control is a rearrangement of the text; the other has a passage twice, and one less.
        assert torch.equal(each.control.sort().values, tokens.sort().values)
        assert not set(each.control[first].tolist()) & set(each.repeated.tolist())
        changed = torch.ones(count, dtype=torch.bool)
        changed[first] = False
        assert torch.equal(each.control[changed], each.repeated[changed])
        # Every passage is a stretch of the text.
        assert torch.equal(each.repeated[first], tokens[_find(tokens, each.repeated[first]) :][
            : each.length])  # fmt: skip
        assert each.repeated[0] == tokens[0]
        again = repeat_passage(tokens, distance, (shortest, longest), number)
        assert torch.equal(each.repeated, again.repeated)
        drawn.add((each.first, each.length))
    assert len(drawn) > 150


def _find(tokens: torch.Tensor, passage: torch.Tensor) -> int:
    return int((tokens == passage[0]).nonzero())


def with_text(folder: Path, lengths: list[int], seq_len: int = 100) -> JobConfig:
    texts = [(chr(65 + number) + "bcd") * length for number, length in enumerate(lengths)]
    texts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    job = config(path=write_jsonl(folder, {"train.jsonl": ["x"], "validation.jsonl": texts}))
    job.validation.enable, job.validation.seq_len = True, seq_len
    return job


def test_each_sequence_lies_in_one_long_document(tmp_path) -> None:
    job = with_text(tmp_path / "text", [98, 99, 1000, 20, 310, 5000])
    found = held_out_sequences(job, ByteTokenizer(), 16, 4)
    # With BOS and EOS, the second document has exactly 101 tokens.
    assert [tuple(each.shape) for each in found] == [(1, 101), (4, 101), (3, 101), (4, 101)]
    for rows, letter in zip(found, "BCEF", strict=True):
        for row in rows:
            letters = {chr(token) for token in row.tolist() if chr(token).isupper() and token < 256}
            assert letters == {letter}
    assert found[1][0, 0] == 256 and found[1][-1, -1] == 257
    assert len(held_out_sequences(job, ByteTokenizer(), 2, 1)) == 2
    job.validation.seq_len = 6000
    with pytest.raises(ValueError, match=r"none of 6 held-out documents .* has 6,001 tokens"):
        held_out_sequences(job, ByteTokenizer(), 16, 1)


def test_default_settings_by_length() -> None:
    for length, contexts, distances, passage in (
        (512, (), (64, 128, 256, 480), (16, 32)),
        (8192, (1024,), (1024, 2048, 4096, 7680), (256, 512)),
        (32768, (1024, 8192), (4096, 8192, 16384, 31744), (256, 1024)),
        (98304, (1024, 8192), (4096, 8192, 16384, 32768, 65536, 97280), (256, 1024)),
    ):
        plan = plan_of(DistanceSettings(), length)
        assert (plan.contexts, plan.distances, plan.passage) == (contexts, distances, passage)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"documents": 0}, "--documents 0 must be at least 1"),
        ({"batch_tokens": 0}, "--batch-tokens 0 must be at least 1"),
        ({"contexts": (1600,)}, "--contexts 1600 must lie between 4 and three quarters"),
        ({"distances": (2000,)}, "--distances 2000 must lie between 128, the longest passage"),
        ({"distances": (100,)}, "--distances 100 must lie between 128"),
        ({"passage": (90, 80)}, "--passage 90 80 must be two lengths, the shorter one first"),
        ({"passage": (1, 80)}, "--passage 1 80 must be"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(DistanceSettings(**settings), LENGTH)


def test_bootstrap_has_the_mean_and_the_spread_of_means() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    found = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)
    assert bootstrap(values) == found and bootstrap(values, seed=1) != found
    assert (bootstrap([3.0]).mean, bootstrap([3.0]).low) == (3.0, None)
    assert bootstrap([1.0, 1.0]).high == 1.0
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap([])


def test_measure_is_that_of_the_models_own_losses(run) -> None:
    """On a trained model, a short context is what the model says of that stretch of text alone."""
    trained = load_trained_model(run)
    settings = DistanceSettings(documents=2, contexts=(128,), distances=(256,), passage=(32, 32))
    parts = trained.model, trained.tokenizer, trained.config
    found = measure(*parts, "dense", settings)
    (first, *_), (second, *_) = held_out_sequences(trained.config, trained.tokenizer, 2, 1)
    losses = []
    for row in (first, second):
        logits = trained.model(row[None, :-1])[0]
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:]).item())
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["loss/documents"] == 2 and found["loss/targets"] == 1024
    assert found["beyond/128"] == pytest.approx(found["context/128"] - found["context/full"])
    gain = found["repeated/256/control"] - found["repeated/256/loss"]
    assert found["repeated/256"] == pytest.approx(gain) and abs(gain) < 1.0
    assert all(math.isfinite(value) for value in found.values())
    # Lighthouse takes no 128 tokens here but 512, and its losses are others.
    other = measure(*parts, "lighthouse", dataclasses.replace(settings, documents=1))
    assert other["loss"] != found["loss"] and "loss/low" not in other
    # One document has no interval.
    assert other.keys() == {key for key in found if not key.endswith(("/low", "/high"))}


def test_command_writes_tables_and_a_plot(run, tmp_path, monkeypatch, capsys) -> None:
    steps = [run / "checkpoint/step-2", run / "checkpoint/step-3"]
    line = ["--output", tmp_path / "out", "--device", "cpu", "--documents", 2]
    line += ["--distances", 384, "--contexts", 128]
    argv = ["lighthouse", "evaluate", "distance", *steps, *line]
    assert not exit_code_of(main, monkeypatch, *argv)
    with (tmp_path / "out/distance.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {(row["measure"], row["tokens"], row["quantity"]) for row in rows}
    parts = {("repeated", "384", part) for part in ("", "loss", "first", "control")}
    assert parts <= names and {("beyond", "128", ""), ("context", "", "full")} <= names
    assert {("loss", "", ""), ("position", "512", ""), ("context", "128", "")} <= names
    assert len(rows) == 2 * len(names)
    one, other = ([r for r in rows if r["checkpoint"] == f"dump, step {step}"] for step in (2, 3))
    with (tmp_path / "out/distance_documents.csv").open() as file:
        by_document = list(csv.DictReader(file))
    assert len(by_document) == 2 * len(rows)
    for before, after in zip(one, other, strict=True):
        assert before["minus first"] == "" and before["documents"] == "2"
        difference = float(after["value"]) - float(before["value"])
        assert float(after["minus first"]) == pytest.approx(difference, abs=1e-9)
        assert float(after["low"]) <= float(after["value"]) <= float(after["high"])
    record = json.loads((tmp_path / "out/distance.json").read_text())
    assert record["settings"]["distances"] == [384] and len(record["numbers"]) == len(rows)
    assert (tmp_path / "out/distance.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "a passage 384 tokens earlier is worth" in out and "from the first" in out
    argv[-1] = 500
    message = exit_code_of(main, monkeypatch, *argv)
    assert "--contexts 500 must lie between 4 and three quarters" in message


def test_run_without_validation_is_measured_on_its_held_out_split(
    run, tmp_path, monkeypatch, capsys
) -> None:
    step, other = run / "checkpoint/step-3", tmp_path / "step-3"
    other.mkdir()
    for file in step.iterdir():
        if file.name not in ("lighthouse.json", ".checksums"):
            (other / file.name).symlink_to(file)
    recorded = json.loads((step / "lighthouse.json").read_text())
    recorded["config"]["validation"]["enable"] = False
    (other / "lighthouse.json").write_text(json.dumps(recorded))
    argv = ["lighthouse", "evaluate", "distance", other, "--output", tmp_path / "out"]
    argv += ["--documents", 1, "--distances", 128, "--no-plots", "--device", "cpu"]
    assert not exit_code_of(main, monkeypatch, *argv)
    out = capsys.readouterr().out
    assert "left out: contexts of 1,024, 8,192 tokens (--contexts)" in out
    record = json.loads((tmp_path / "out/distance.json").read_text())
    assert record["text"]["validation.dataset"] == "python_stdlib"
    assert not (tmp_path / "out/distance.png").exists()
