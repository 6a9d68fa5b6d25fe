"""Retrieval: where prompts put things, what planted models score, and the command's output."""

import csv
import itertools
import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from matplotlib.figure import Figure
from retrieval_prompts import BYTES, QUESTION, answer_to, copying, text_of

from lighthouse import LighthouseAttention, LighthouseConfig
from lighthouse.geometry import PyramidGeometry, fitting_length
from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.checkpoints.record import RECORD_FILE, CheckpointRecord
from torchtitan.models.llama3_lighthouse.data.retrieval import (
    TASKS,
    PromptEncoder,
    evaluation_prompt,
    shortest_prompt,
)
from torchtitan.models.llama3_lighthouse.data.retrieval_mix import RetrievalMix
from torchtitan.models.llama3_lighthouse.data.tokenizer import (
    BOS_ID,
    PADDED_VOCABULARY_SIZE,
)
from torchtitan.models.llama3_lighthouse.evaluation import retrieval_report
from torchtitan.models.llama3_lighthouse.evaluation.inference import load_trained_model, logits_at
from torchtitan.models.llama3_lighthouse.evaluation.progress import Progress
from torchtitan.models.llama3_lighthouse.evaluation.retrieval_accuracy import (
    Cell,
    measure_cell,
    wilson_interval,
)
from torchtitan.models.llama3_lighthouse.job_config import JobConfig
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import LighthouseTransformer

METHOD = LighthouseConfig(levels=3, pooling_factor=2, top_k=32, picks_per_stratum=16)
FITTING = partial(fitting_length, METHOD)
DEPTHS = (0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0)
# The other tasks fill their prompts with a list, which has tests of its own.
WITH_STATEMENTS = [task.name for task in TASKS.values() if task.form == "statements"]


@pytest.mark.parametrize("attention", ["dense", "lighthouse"])
@pytest.mark.parametrize("name", TASKS)
def test_copying_model_scores_one(name: str, attention: str) -> None:
    fit = FITTING if attention == "lighthouse" else int
    for length, depth in ((231, 0.0), (230, 0.4), (400, 1.0)):
        cell = measure_cell(
            copying, BYTES, TASKS[name], length, depth, 20, attention, fit, batch_tokens=2000
        )
        assert cell.accuracy == cell.digit_accuracy == cell.high == 1.0
        assert cell.low == pytest.approx(wilson_interval(20, 20)[0]) and cell.low < 0.85
        assert (cell.length, cell.text_bytes, cell.depth) == (length, length - 1, depth)
        steps = length + TASKS[name].digits - 1
        assert cell.sequence_length == (steps if attention == "dense" else -(-steps // 4) * 4)


def test_wrong_digit_fails_the_key_and_counts_as_one_digit() -> None:
    def nearly(tokens, places):
        logits = copying(tokens, places)
        logits[:, 3] = logits[:, 3].roll(1, dims=-1)
        # The guessed digit is one more than the right one, or no digit at all.
        logits[:, 3, ord("x")] = 9.0
        return logits

    cell = measure_cell(nearly, BYTES, TASKS["long_passkey"], 128, 0.5, 200)
    # A 9 turned into no digit; all ten tie then, and 0 wins, which is wrong too.
    assert cell.accuracy == 0.0 and cell.digit_accuracy == pytest.approx(0.8)


@pytest.mark.parametrize("name", ["passkey", "several_keys", "variables"])
def test_guessing_model_scores_a_tenth(name: str) -> None:
    """Chance lies in about 95% of the intervals over 50 trials, and in the one over 1500."""
    generator = torch.Generator().manual_seed(7)

    def guessing(tokens, places):
        shape = len(tokens), places.stop - places.start, PADDED_VOCABULARY_SIZE
        return torch.randn(shape, generator=generator)

    cells = [
        measure_cell(guessing, BYTES, TASKS[name], 160, depth, 50, seed=seed)
        for depth in (0.0, 0.5, 1.0)
        for seed in range(10)
    ]
    assert all(cell.chance == pytest.approx(0.1) for cell in cells)
    # On average 28.5 of 30 intervals hold it; fewer than 25 do once in 300 times.
    assert sum(cell.low < 0.1 < cell.high for cell in cells) >= 25
    mean = np.mean([cell.accuracy for cell in cells])
    assert abs(mean - 0.1) < 3 * (0.09 / 1500) ** 0.5


def test_wilson_interval_against_its_definition() -> None:
    """The result lies 1.96 standard deviations from each bound, taken as the true probability."""
    for right, trials in ((0, 50), (5, 50), (31, 60), (50, 50)):
        low, high = wilson_interval(right, trials)
        assert 0 <= low < high <= 1
        for bound in (low, high):
            if 0 < bound < 1:
                deviation = (bound * (1 - bound) / trials) ** 0.5
                assert abs(right / trials - bound) / deviation == pytest.approx(1.959964)
    # Newcombe (1998), table I: 15 of 148.
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


@pytest.mark.parametrize("kind", ["bytes", "merging"])
@pytest.mark.parametrize("name", WITH_STATEMENTS)
def test_length_and_depth_are_exact_on_tokens(name: str, kind: str, merging) -> None:
    encoder = BYTES if kind == "bytes" else PromptEncoder(merging)
    task = TASKS[name]
    shortest = shortest_prompt(encoder, task)
    digits = set(encoder.digits.tolist())
    bos = len(encoder.bos)
    assert bos == 1
    for length in (shortest, shortest + 1, shortest + 7, 301, 1024):
        for depth in DEPTHS:
            for trial in range(3):
                prompt = evaluation_prompt(encoder, task, length, depth, trial)
                assert prompt.tokens.shape == (length,) and prompt.tokens.dtype == np.int32
                assert prompt.tokens[0] == encoder.bos[0]
                assert not np.any(prompt.tokens[1:] == encoder.bos[0])
                if name == "variables":
                    # Three assignments of the chain stand between the needle and the question.
                    equals, end = encoder.encode(" = "), encoder.encode("; ")
                    link = len(encoder.encode(" ")) + 2 + len(equals) + len(end)
                    needle, others = link + 1, 2 * (link + 2)
                    question = len(encoder.encode(" ")) + 2 + len(equals)
                else:
                    parts = (" The pass key is ",)
                    if name == "several_keys":
                        parts = (" The pass key of ", "??", " is ")
                    question = sum(2 if p == "??" else len(encoder.encode(p)) for p in parts)
                    needle = question + task.digits + len(encoder.encode(". "))
                    others = 0
                room = length - bos - question - needle - others
                assert prompt.needle == bos + round(depth * room)
                statement = prompt.tokens[prompt.needle : prompt.needle + needle]
                shown = [int(token) for token in statement if int(token) in digits]
                assert shown == encoder.digits[prompt.answer].tolist()
                assert prompt.needle in prompt.statements
                assert list(prompt.statements) == sorted(prompt.statements)
                if name in ("passkey", "long_passkey"):
                    assert np.array_equal(statement[:question], prompt.tokens[-question:])
    with pytest.raises(ValueError, match=f"takes {shortest}; use a length of at least that"):
        evaluation_prompt(encoder, task, shortest - 1, 0.5, 0)


@pytest.mark.parametrize("name", WITH_STATEMENTS)
def test_prompts_hold_one_answer_and_distractors_that_differ(name: str) -> None:
    task, answers = TASKS[name], []
    for trial in range(200):
        prompt = evaluation_prompt(BYTES, task, 300, (trial % 11) / 10, trial)
        text = text_of(prompt.tokens)
        answers.append(answer_to(text))
        assert answers[-1] == "".join(map(str, prompt.answer))
        count = task.keys * max(task.links, 1)
        assert len(prompt.statements) == count
        # The question itself is no statement.
        assert len(QUESTION.findall(text)) == count + 1
        values = re.findall(r"(?:is|=) (\d+)[.;] ", text)
        assert len(values) == len(set(values)) == task.keys
        filler = QUESTION.sub("", re.sub(r" (?:The pass|[A-Z]{2} =)[^.;]*[.;] ", "", text))
        assert filler.isascii() and filler.isalnum()
    counts = [sum(answer[0] == str(digit) for answer in answers) for digit in range(10)]
    # Each digit comes 20 times in 200 on average, with a standard deviation of 4.2.
    assert min(counts) > 5 and max(counts) < 37


def test_every_checkpoint_sees_the_same_prompts_whatever_is_asked_around_them() -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    def recording(name):
        def predict(tokens, places):
            seen.setdefault(name, []).extend(tokens[:, : places.start + 1])
            return torch.zeros(len(tokens), places.stop - places.start, PADDED_VOCABULARY_SIZE)

        return predict

    task = TASKS["several_keys"]
    measure_cell(recording("one"), BYTES, task, 222, 0.3, 12, batch_tokens=500)
    measure_cell(recording("between"), BYTES, task, 300, 0.3, 3)
    measure_cell(recording("other"), BYTES, task, 222, 0.3, 12, "lighthouse", FITTING)
    measure_cell(recording("more"), BYTES, task, 222, 0.3, 30)
    measure_cell(recording("seed"), BYTES, task, 222, 0.3, 12, seed=1)
    one = torch.stack(seen["one"])
    assert torch.equal(one, torch.stack(seen["other"]))
    assert torch.equal(one, torch.stack(seen["more"])[:12])
    assert len(torch.unique(torch.stack(seen["more"]), dim=0)) == 30
    assert (one != torch.stack(seen["seed"])).any(dim=1).all()


def test_padding_follows_the_prompt_and_holds_no_answer() -> None:
    rows = []

    def recording(tokens, places):
        rows.extend(tokens)
        assert places == slice(228, 233)
        return torch.zeros(len(tokens), 5, PADDED_VOCABULARY_SIZE)

    measure_cell(recording, BYTES, TASKS["long_passkey"], 229, 0.5, 10, "lighthouse", FITTING)
    for number, row in enumerate(rows):
        prompt = evaluation_prompt(BYTES, TASKS["long_passkey"], 229, 0.5, number)
        assert row.shape == (236,) and np.array_equal(row[:229], prompt.tokens)
        assert text_of(row[229:233]) == "".join(map(str, prompt.answer[:4]))
        assert text_of(row[233:]).isalnum()


@pytest.mark.parametrize("scorer", ["norm", "dilated"])
def test_fitting_length_is_the_least_that_fits(scorer: str) -> None:
    config = LighthouseConfig(
        levels=3, pooling_factor=2, top_k=32, picks_per_stratum=16, scorer=scorer, dilation=6
    )

    def fits(length: int) -> bool:
        try:
            return PyramidGeometry(config, length).sequence_length == length
        except ValueError:
            return False

    for shortest in (1, 127, 128, 129, 133, 300):
        least = next(n for n in range(shortest, 1000) if fits(n))
        assert fitting_length(config, shortest) == least


def test_tokenizer_without_single_digits_is_refused() -> None:
    class Pairs:
        def encode(self, text, add_bos, add_eos):
            return [0, *text.encode()]

    with pytest.raises(ValueError, match="'0' alone is one token, this one makes 2"):
        PromptEncoder(Pairs())


def test_training_documents_of_a_merging_tokenizer_fill_their_sequences(merging) -> None:
    encoder = PromptEncoder(merging)
    mix = RetrievalMix(encoder, 0.5, 513, streams=2)
    (bos,), (eos,) = encoder.bos, encoder.eos
    digits = 0
    for number in range(40):
        tokens, in_loss = mix.sequence(number % 2, number)
        assert tokens.shape == (513,) and tokens[0] == bos and tokens[-1] == eos
        ends = np.flatnonzero(tokens == eos)
        assert np.array_equal(np.flatnonzero(tokens == bos)[1:], ends[:-1] + 1)
        assert np.isin(tokens[in_loss], encoder.digits).all() and in_loss[ends - 1].all()
        digits += len(ends)
    assert digits > 60
    # There are fewer tokens than bytes; otherwise the tokenizer merged nothing above.
    assert len(merging.decode(mix.sequence(0, 0)[0].tolist()).encode()) > 530


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of an untrained model, with the record of a trainer."""
    job = JobConfig()
    job.model.flavor, job.training.seq_len = "debugmodel", 512
    section = job.lighthouse
    section.pooling_factor, section.top_k, section.picks_per_stratum = 2, 32, 16
    section.dense_layers = [0, 5]
    arguments = flavors["debugmodel"]
    arguments.update_from_config(job)
    torch.manual_seed(3)
    model = LighthouseTransformer(arguments)
    with torch.no_grad():
        model.init_weights()
    folder = tmp_path_factory.mktemp("run") / "checkpoint/step-8"
    dcp.save(model.state_dict(), checkpoint_id=str(folder), no_dist=True)
    record = CheckpointRecord(8, 6, job.to_dict())
    (folder / RECORD_FILE).write_text(json.dumps(asdict(record)))
    return folder


def test_logits_at_places_are_those_of_the_whole_output(checkpoint: Path) -> None:
    model = load_trained_model(checkpoint).model
    tokens = torch.randint(256, (2, 512), generator=torch.Generator().manual_seed(0))
    outputs = {}
    for attention in ("dense", "lighthouse"):
        model.use_attention(attention)
        whole = outputs[attention] = model(tokens)
        part = logits_at(model, tokens, slice(300, 303))
        torch.testing.assert_close(part, whole[:, 300:303], rtol=1e-5, atol=1e-5)
        assert torch.equal(model(tokens), whole)
    assert not torch.equal(outputs["dense"], outputs["lighthouse"])


def evaluate_niah(*line: object) -> None:
    """Run ``lighthouse evaluate niah``."""
    main(["evaluate", "niah", *map(str, line)])


def test_command_writes_tables_and_heat_maps(checkpoint, tmp_path, capsys, monkeypatch) -> None:
    lighthouse_on = []

    def recording(model, tokens, places):
        modules = [m for m in model.modules() if isinstance(m, LighthouseAttention)]
        assert len(modules) == 4
        lighthouse_on.append([module.enabled for module in modules])
        return logits_at(model, tokens, places)

    monkeypatch.setattr(retrieval_report, "logits_at", recording)
    counts = []
    advance = Progress.advance
    monkeypatch.setattr(
        Progress,
        "advance",
        lambda bar, count, detail: [counts.append(count), advance(bar, count, "")],
    )
    line = [checkpoint.parent, "--output", tmp_path, "--tasks", "passkey", "variables"]
    line += ["--lengths", "100", "200", "--depths", "0", "50", "100", "--trials", "2"]
    evaluate_niah(*line, "--attention", "dense", "lighthouse", "--device", "cpu")
    record = json.loads((tmp_path / "results.json").read_text())
    (evaluated,) = record["checkpoints"]
    assert (evaluated["step"], evaluated["dense_steps"]) == (8, 2)
    assert evaluated["path"] == str(checkpoint)
    assert record["settings"]["depths"] == [0, 50, 100] and record["date"] and record["torch"]
    assert "revision" in record
    # Every cell is one batch, and all dense cells come first.
    assert lighthouse_on == [[False] * 4] * 12 + [[True] * 4] * 12
    cells = evaluated["cells"]
    assert len(cells) == 2 * 2 * 2 * 3
    # Progress is told after every batch: a cell takes minutes on a CPU.
    assert counts == [2 * cell["sequence_length"] for cell in cells]
    trained = load_trained_model(checkpoint)
    trained.model.use_attention("lighthouse")
    expected = measure_cell(
        lambda tokens, places: trained.model(tokens)[:, places],
        BYTES,
        TASKS["variables"],
        200,
        0.5,
        2,
        "lighthouse",
        FITTING,
    )
    assert asdict(expected) in cells
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [cell["accuracy"] for cell in cells]
    assert [row["sequence_length"] for row in rows[:4]] == ["100"] * 3 + ["200"]
    maps = sorted(path.name for path in tmp_path.glob("*.png"))
    assert maps == ["passkey.png", "variables.png"]
    assert "100% done" in capsys.readouterr().out


def test_heat_maps_show_every_cell_of_every_checkpoint(tmp_path, monkeypatch) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    evaluated = [retrieval_report.Evaluated(name, tmp_path, 8, 2, 200) for name in ("one", "two")]
    expected = {}
    for number, each in enumerate(evaluated):
        for attention in ("dense", "lighthouse"):
            panel = expected[f"{each.label}\n{attention} attention"] = {}
            for task, depth, length in itertools.product(TASKS, (1.0, 0.0), (200, 100)):
                accuracy = (len(panel) + 4 * number + 10 * (attention == "dense")) / 100
                cell = Cell(task, attention, length, length - 1.0, length, depth, 50, accuracy,
                            0, 1, accuracy, 0.1)  # fmt: skip
                each.cells.append(cell)
                if task == "passkey":
                    panel[f"{100 * depth:g}", str(length)] = f"{accuracy:.0%}"
    retrieval_report.plot(tmp_path, evaluated, "passkey")
    *panels, _ = figures[0].axes
    found = {}
    for axis in panels:
        lengths, depths = ([label.get_text() for label in side.get_ticklabels()]
                           for side in (axis.xaxis, axis.yaxis))  # fmt: skip
        places = [tuple(map(int, text.get_position())) for text in axis.texts]
        found[axis.get_title()] = {
            (depths[y], lengths[x]): text.get_text()
            for (x, y), text in zip(places, axis.texts, strict=True)
        }
    assert found == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tasks", "passkeys"], "'passkeys' is not known; use passkey, long_passkey"),
        (["--lengths", "30"], "30 tokens is too short for task 'passkey'"),
        (["--depths", "101"], "--depths must lie between 0 and 100 percent, got 101"),
        (["--trials", "0"], "--trials 0 must be at least 1"),
        (["--device", "cuda"], "torch finds 0 CUDA devices; use --device cpu"),
        (["--model.flavor", "7B"], "model.flavor = '7B' is not known"),
    ],
)
def test_mistakes_end_with_one_line(checkpoint, tmp_path, monkeypatch, change, message) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        evaluate_niah(checkpoint, "--output", tmp_path / "out", "--trials", "1", *change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_checkpoint_and_misspelt_flag(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="holds no complete checkpoint"):
        evaluate_niah(tmp_path, "--output", tmp_path / "out")
    with pytest.raises(SystemExit):
        evaluate_niah(tmp_path, "--output", tmp_path / "out", "--trails", "3")
    assert "unknown argument --trails" in capsys.readouterr().err


def test_bos_is_known() -> None:
    assert BYTES.bos.tolist() == [BOS_ID]
