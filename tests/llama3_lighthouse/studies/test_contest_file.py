"""A contest's file and its record beside the results: what is refused."""

import json

import pytest
import torch
from contest_cases import with_start
from pages import ROOT

from torchtitan.models.llama3_lighthouse.errors import UserError
from torchtitan.models.llama3_lighthouse.studies.contest_file import fix, read_contest


def test_a_changed_file_is_refused_beside_old_results(call, faked, path) -> None:
    call()
    path.write_text(path.read_text().replace("margin = 0.01", "margin = 0.001"))
    for line in ((), ("--list",), ("--report-only",)):
        _, message = call(*line)
        assert "has changed since the results" in message and "\n" not in message


def test_other_overrides_are_refused_beside_old_results(call, faked, tmp_path) -> None:
    call("--training.max_norm", "0.5")
    record = json.loads((tmp_path / "out/contest.json").read_text())
    assert record["overrides"] == ["--training.max_norm", "0.5"]
    trained = len(faked.trained)
    for line in ((), ("--list",), ("--training.max_norm", "0.7")):
        _, message = call(*line)
        assert "were begun with overrides ['--training.max_norm', '0.5']" in message
    changed = record | {"text": record["text"] | {"training": "another"}}
    (tmp_path / "out/contest.json").write_text(json.dumps(changed))
    _, message = call("--training.max_norm", "0.5")
    assert "were begun with text {'training': 'another'" in message
    assert record["environment"]["torch"] == torch.__version__
    _, message = call("--report-only", "--training.max_norm", "0.5")
    assert "leave out --training.max_norm 0.5" in message
    assert "pass one of them" in call("--list", "--only-times")[1]
    assert len(faked.trained) == trained


def test_damaged_records_are_named(call, faked, tmp_path) -> None:
    call("--widen")
    for name in ("contest.json", "dense,lr=0.001,seed=1/measures.json"):
        path = tmp_path / "out" / name
        before = path.read_text()
        path.write_text(before[:5])
        _, message = call()
        assert f"{name} cannot be read" in message and "restore or remove it" in message
        path.write_text(before)
    (tmp_path / "out/contest.json").unlink()
    for line in ((), ("--report-only",)):
        assert "but no contest.json that says whose it is" in call(*line)[1]


def test_a_changed_base_is_refused_too(path, tmp_path) -> None:
    base = tmp_path / "base.toml"
    base.write_text((ROOT / "train_configs/debug_schedule_cpu.toml").read_text())
    text = path.read_text().replace(f"{ROOT}/train_configs/debug_schedule_cpu.toml", "base.toml")
    path.write_text(text)
    fix(read_contest(path), tmp_path / "out")
    base.write_text(base.read_text() + "\n# another\n")
    with pytest.raises(UserError, match="or its base has changed"):
        fix(read_contest(path), tmp_path / "out")


def check_refusal(call, path, old: str, new: str, message: str) -> None:
    """With ``new`` for ``old`` in the file, the contest ends in one line."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    _, line = call()
    assert message in line and "\n" not in line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rate = 5e-4", "rate = 0.0", "start.rate = 0.0 must be a learning rate"),
        (
            "rate = 5e-4",
            "rate = 5e-4\ntraining.stepz = 3",
            "contest.toml: unknown key 'training.stepz'",
        ),
        ("training.steps = 12", "", "[start] names no training.steps"),
        (
            'rate = 5e-4\ntraining.steps = 12\nlighthouse.schedule = ["dense seq_len=128"]\n',
            "",
            "start.rate = None must be a learning rate",
        ),
        ("seq_len=128", "seq_len=1024", "contest.toml, start: lighthouse.schedule"),
        ("rate = 5e-4", "rate = 5e-4\noptimizer.lr = 1e-3", "start sets optimizer.lr, which runs"),
        ("rate = 5e-4", 'rate = 5e-4\nmodel.flavor = "17M"', "model.flavor, which all runs share"),
        ("rates = [2e-3]", 'rates = [2e-3]\nmodel.flavor = "17M"', "flavor, which all runs share"),
        ("rate = 5e-4", "rate = 5e-4\nmodel.rope_theta = 1e6", "rope_theta, which all runs share"),
        (
            "rates = [2e-3]",
            'rates = [2e-3]\nmodel.rope_scaling = "yarn"',
            "arms.window: model.rope_scaling",
        ),
        (
            "training.max_norm = 1",
            'checkpoint.initial_load_path = "x"',
            "settings sets checkpoint.initial_load_path, which runs vary",
        ),
    ],
)
def test_a_bad_start_ends_in_one_line(call, path, old: str, new: str, message: str) -> None:
    path.write_text(path.read_text().replace("[settings]", "[settings]\ntraining.max_norm = 1"))
    with_start(path)
    check_refusal(call, path, old, new, message)


def test_arms_of_a_start_may_change_its_rotary_embedding(call, path, tmp_path) -> None:
    with_start(path)
    own = 'rates = [2e-3]\nmodel.rope_scaling = "yarn factor=2"\nmodel.rope_theta = 4e6'
    path.write_text(path.read_text().replace("rates = [2e-3]", own, 1))
    assert not call()[1]
    found = {
        name: json.loads((tmp_path / "out" / name / "config.json").read_text())["model"]
        for name in ("start,seed=1", "window,lr=0.002,seed=1", "lighthouse,lr=0.002,seed=1")
    }
    shown = [(each["rope_scaling"], each["rope_theta"]) for each in found.values()]
    assert shown == [("", None), ("yarn factor=2", 4e6), ("", None)]


def test_steps_beside_seconds_are_refused(call, path) -> None:
    path.write_text("gpu_seconds = 40\n" + path.read_text().replace("until=6", "until=75%"))
    assert "settings sets training.steps, which runs vary" in call()[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds = [1, 1] must be different"),
        ("seeds = [1, 2]", "seeds = [0, 1]", "must be different numbers from 1 on"),
        ('direction = "lower"', 'direction = "down"', "direction = 'down'; use lower or higher"),
        ('direction = "lower"', "", "names no direction"),
        ('direction = "lower"', 'direction = "higher"', "but lower is better in primary = 'loss'"),
        ('primary = "loss"', 'primary = "retrieval/passkey/512"', 'write direction = "higher"'),
        ('primary = "loss"', 'primary = "repeated/480"', 'write direction = "higher"'),
        ("margin = 0.01", "margin = -1", "margin = -1 must be at least 0"),
        ('["window", "dense"]', '["windw", "dense"]', "compare names 'windw'; the arms are dense"),
        ('["window", "dense"]', '["dense", "dense"]', "sets 'dense' against itself"),
        ("rates = [2e-3]", "rates = []", "must be different learning rates"),
        ("training.steps = 8", "training.step = 8", "did you mean 'steps'?"),
        ("training.steps = 8", "debug.seed = 3", "settings sets debug.seed, which runs vary"),
        ("prompts = 5", "prompt = 5", "'prompt' is not known"),
        ("documents = 4", "document = 4", "distance.document is not known"),
        ("documents = 4", 'documents = "all"', "distance.documents = 'all' must be a whole"),
        ("documents = 4", "passage = [1, 2, 3]", "= [1, 2, 3] must be a list of 2 items, each"),
        ('["passkey"]', '["pass"]', "retrieval = ['pass']: task 'pass' is not known"),
        (
            "margin = 0.01",
            'margin = 0.01\nseed_keys = ["debug.sed"]',
            "= ['debug.sed']: unknown",
        ),
        ('"window until=6", "dense"', '"window until=6", 3', "each item a text in quotes"),
        ("window until=6", "window until=7..5%", "arms.window says until=7..5%; write a share of"),
        ("rates = [2e-3]", "rate = [2e-3]", "names no rates; add rates = [1e-3, 2e-3]"),
        ("margin = 0.01", 'margin = "1"', "margin = '1' must be a number"),
        ("margin = 0.01", "margin = 0.01\nseed_keys = [1]", "seed_keys = [1] must name keys"),
        ("margin = 0.01", 'margin = 0.01\nseed_keys = ["optimizer.lr"]', "must name keys that"),
        ("margin = 0.01", "margin = 0.01\nrate_seed = [1, 1]", "rate_seed = [1, 1] must be diff"),
        ("seeds = [1, 2]", "seeds = [[1], 2]", "seeds = [[1], 2] must be different numbers"),
        ("rates = [2e-3]", "rates = [1e-3, 1.0000001e-3]", "must be different learning rates"),
        ("rates = [2e-3]", "rates = [nan]", "must be different learning rates"),
        ('["passkey"]', '["passkey", "passkey"]', "names a task twice"),
        ('["window", "dense"]', '["dense", "lighthouse"]', "must hold pairs of arms, each once"),
        ("training.steps = 8", 'job.dump_folder = "x"', "settings sets job.dump_folder, which"),
        ("training.steps = 8", "metrics.log_freq = 10", "settings sets metrics.log_freq, which"),
        ("rates = [2e-3]", "rates = [2e-3]\nvalidation.steps = 1", "steps, which all runs share"),
        ("documents = 4", "documents = 0", "contest.toml: distance.documents = 0 must be at least"),
        ("documents = 4", "contexts = 5", "distance.contexts = 5 must be a list, each"),
        ("[settings]", '[settings]\nvalidation.dataset_path = "/none"', "/none"),
        ("margin = 0.01", "margin = nan", "margin = nan must be at least 0"),
        ("seeds = [1, 2]", "seeds = 1", "seeds = 1 must be a list in [ ]"),
        ("margin = 0.01", "margin = 0.01\nseed_keys = []", "seed_keys = [] makes all seeds one"),
        ("margin = 0.01", "margin = 0.01\nlevel = 1", "level = 1 must be from 0.5 to below 1"),
        (
            "until=6",
            "until=150%",
            "arms.window says until=150%; write a share of the steps above 0%",
        ),
        ("until=6", "until=x%", "arms.window says until=x%; write a share of"),
    ],
)
def test_a_bad_contest_ends_in_one_line(call, path, old: str, new: str, message: str) -> None:
    check_refusal(call, path, old, new, message)


@pytest.mark.parametrize(
    "primary",
    ["validation", "position/512", "context/full", "repeated/256/first", "repeated/256/control"],
)
def test_the_worse_side_of_every_loss_is_refused(call, path, primary: str) -> None:
    path.write_text(path.read_text().replace('"lower"', '"higher"'))
    message = f"but lower is better in primary = '{primary}'"
    check_refusal(call, path, 'primary = "loss"', f'primary = "{primary}"', message)
