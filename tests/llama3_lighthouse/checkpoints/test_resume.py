"""Messages and refusals when settings differ from the checkpoint's."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
from launch import Run

from torchtitan.models.llama3_lighthouse.checkpoints.record import (
    CheckpointRecord,
    read_record,
    write_record,
)
from torchtitan.models.llama3_lighthouse.checkpoints.resume import (
    METHOD,
    check_settings,
    differences,
)
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.job_config import JobConfig
from torchtitan.models.llama3_lighthouse.studies.settings import with_settings

PATH = Path("run/checkpoint/step-20")


def recorded(**settings: Any) -> dict[str, Any]:
    """A configuration by section; keywords are section__key."""
    by_key = {name.replace("__", "."): value for name, value in settings.items()}
    return with_settings(JobConfig(), by_key).to_dict()


def check(
    present: dict[str, Any],
    last_lighthouse_step: int | None = 20,
    elsewhere: bool = False,
    weights_only: bool = False,
) -> None:
    record = CheckpointRecord(20, last_lighthouse_step, recorded())
    check_settings(PATH, record, present, elsewhere, weights_only)


def test_same_settings_say_nothing(caplog) -> None:
    caplog.set_level(logging.INFO)
    elsewhere = recorded(job__dump_folder="other", metrics__log_freq=1, checkpoint__interval=3)
    check(elsewhere)
    assert not caplog.records


@pytest.mark.parametrize(("key", "value"), [
    ("lighthouse__levels", 4), ("lighthouse__pooling_factor", 2), ("lighthouse__top_k", 4096),
    ("lighthouse__picks_per_stratum", 64), ("lighthouse__scorer", "gla"),
    ("lighthouse__dilation", 2), ("lighthouse__entry_score", "mean"),
    ("lighthouse__combine", "mean"), ("lighthouse__dense_layers", [0]),
    ("lighthouse__attention", "window"), ("lighthouse__window", 512),
])  # fmt: skip
def test_every_setting_of_the_method_is_refused_while_lighthouse_is_ahead(key, value) -> None:
    name = key.replace("__", ".")
    assert name in METHOD
    with pytest.raises(UserValueError) as caught:
        check(recorded(**{key: value}))
    message = str(caught.value)
    assert f"{name} = {value!r} (checkpoint: " in message
    assert f"--checkpoint.initial_load_path {PATH}" in message and "\n" not in message


def test_a_window_that_stands_alone_reads_no_more_of_the_method(caplog) -> None:
    caplog.set_level(logging.INFO)
    alone = {"lighthouse__attention": "window", "lighthouse__window": 64}
    record = CheckpointRecord(20, 20, recorded(**alone))

    def go_on(**changed: Any) -> None:
        check_settings(PATH, record, recorded(**alone | changed), False, False)

    go_on(lighthouse__top_k=4096, lighthouse__combine="finest")
    (info,) = caplog.records
    assert info.levelno == logging.INFO
    assert "lighthouse.top_k = 4096 (checkpoint: 1536)" in info.message
    for key, value in (("window", 65), ("dense_layers", [0]), ("attention", "lighthouse")):
        with pytest.raises(UserValueError, match=f"another model of .*: lighthouse.{key} = "):
            go_on(**{f"lighthouse__{key}": value})


def test_method_is_free_where_it_is_not_used(caplog) -> None:
    """A dense stage ahead does not use it, and a run that was dense so far has not used it."""
    caplog.set_level(logging.INFO)
    check(recorded(lighthouse__top_k=4096, lighthouse__stage="dense"))
    warning, info = caplog.records
    assert warning.levelno == logging.WARNING and "top_k" not in warning.message
    assert "lighthouse.stage = 'dense' (checkpoint: 'auto')" in warning.message
    assert "lighthouse.top_k = 4096 (checkpoint: 1536)" in info.message
    caplog.clear()
    check(recorded(lighthouse__top_k=4096), last_lighthouse_step=0)
    (warning,) = caplog.records
    assert "other settings: lighthouse.top_k = 4096 (checkpoint: 1536)" in warning.message
    with pytest.raises(UserValueError):
        check(recorded(lighthouse__top_k=4096), last_lighthouse_step=None)


STAGES = ["dense until=10", "lighthouse until=30 top_k=1024", "lighthouse until=40", "dense"]


def go_on(
    before: dict[str, Any] | list[str], now: dict[str, Any] | list[str], step: int = 20
) -> None:
    """Compare two runs, of which each is given by its schedule or by other settings."""
    settings = [
        each if isinstance(each, dict) else {"lighthouse__schedule": each} for each in (before, now)
    ]
    configs = [recorded(training__steps=50, **each) for each in settings]
    record = CheckpointRecord(step, step if step > 10 else 0, configs[0])
    check_settings(PATH, record, configs[1], elsewhere=False, weights_only=False)


def test_a_seed_checkpoint_has_begun_no_stage() -> None:
    go_on(["lighthouse until=30 top_k=1024", "dense"], ["lighthouse until=30 top_k=64", "dense"], 0)


@pytest.mark.parametrize(("now", "words"), [
    ([STAGES[0], "lighthouse until=30 top_k=2048", *STAGES[2:]],
     "lighthouse until=30 top_k=2048': lighthouse.top_k = 2048 (checkpoint: 1024)"),
    ([STAGES[0], "window until=30 window=64", *STAGES[2:]], "lighthouse.attention = 'window' (ch"),
    # The present stage becomes the next one early.
    ([STAGES[0], "lighthouse until=15 top_k=1024", *STAGES[2:]], "lighthouse.top_k = 1536 (check"),
    ({"lighthouse__schedule": STAGES, "lighthouse__scorer": "gla"}, "lighthouse.scorer = 'gla'"),
    ({"lighthouse__dense_from_step": 30}, "lighthouse.top_k = 1536 (checkpoint: 1024)"),
])  # fmt: skip
def test_another_method_in_a_stage_that_has_begun_is_refused(now, words: str) -> None:
    with pytest.raises(UserValueError) as caught:
        go_on(STAGES, now)
    assert "would make another model of" in str(caught.value) and words in str(caught.value)


def test_a_schedule_takes_the_place_of_the_short_form_where_it_means_the_same(caplog) -> None:
    short = {"lighthouse__dense_from_step": 30, "lighthouse__top_k": 1024}
    go_on(short, ["lighthouse until=30 top_k=1024", "dense"])
    with pytest.raises(UserValueError, match="top_k = 512 .checkpoint: 1024"):
        go_on(short, ["lighthouse until=30 top_k=512", "dense"])
    go_on(STAGES, {**short, "lighthouse__dense_from_step": 40})
    assert {each.levelno for each in caplog.records} == {logging.WARNING}


@pytest.mark.parametrize(("now", "step"), [
    # The next stage has not begun.
    ([*STAGES[:2], "lighthouse until=40 top_k=512", "dense"], 20),
    ([*STAGES[:2], "lighthouse until=40 top_k=512", "dense"], 30),
    ([STAGES[0], "lighthouse until=30 top_k=512", *STAGES[2:]], 10),
    # The present one goes on as long as another did, or gives way to dense attention.
    ([STAGES[0], "lighthouse until=45 top_k=1024", "dense"], 20),
    ([STAGES[0], "lighthouse until=20 top_k=1024", "dense"], 20),
    ([STAGES[0], "lighthouse until=30 top_k=512", "dense"], 40),
])  # fmt: skip
def test_what_steps_ahead_do_is_warned_of(now: list[str], step: int, caplog) -> None:
    go_on(STAGES, STAGES, step)
    assert not caplog.records
    go_on(STAGES, now, step)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "with other settings: lighthouse.schedule = [" in warning.message


def test_spaces_in_the_schedule_of_an_older_record_are_no_change(caplog) -> None:
    go_on([STAGES[0], f" {STAGES[1]}", " lighthouse  until=40", " dense"], STAGES)
    assert not caplog.records


@pytest.mark.parametrize(("key", "value"), [
    ("model__flavor", "15M"), ("model__converters", ["float8"]), ("lighthouse__tokenizer", "hf"),
])  # fmt: skip
def test_model_is_refused_in_every_stage(key: str, value: Any) -> None:
    with pytest.raises(UserValueError, match="would make another model of"):
        check(recorded(**{key: value}, lighthouse__stage="dense"))


def test_training_is_warned_of_and_the_rest_is_told(caplog) -> None:
    caplog.set_level(logging.INFO)
    check(recorded(
        optimizer__lr=1.0, training__steps=7, lr_scheduler__decay_ratio=0.5,
        training__gc_freq=3, parallelism__context_parallel_degree=2, compile__enable=True,
    ))  # fmt: skip
    warning, info = caplog.records
    for part in ("optimizer.lr = 1.0 (checkpoint: 0.0008)", "training.steps = 7",
                 "lr_scheduler.decay_ratio = 0.5 (checkpoint: None)"):  # fmt: skip
        assert part in warning.message
    for part in ("gc_freq = 3", "context_parallel_degree = 2", "compile.enable = True"):
        assert part in info.message and part not in warning.message


def test_another_place_may_hold_another_model(caplog) -> None:
    present = recorded(lighthouse__top_k=4096, optimizer__lr=1.0)
    check(present, elsewhere=True)
    assert ["was trained as another model" in r.message for r in caplog.records] == [True, False]
    caplog.clear()
    # A new training from old weights has settings of its own.
    check(present, elsewhere=True, weights_only=True)
    (warning,) = caplog.records
    assert "lighthouse.top_k" in warning.message and "optimizer.lr" not in warning.message


def test_record_of_an_older_version_has_fewer_keys() -> None:
    older = copy.deepcopy(recorded())
    del older["lighthouse"]["dilation"], older["validation"]
    assert differences(older, recorded()) == []
    (found,) = differences(older, recorded(lighthouse__dilation=8))
    assert (found.key, found.recorded, found.present) == ("lighthouse.dilation", 4, 8)


def test_the_oldest_records_are_of_the_papers_settings(tmp_path: Path) -> None:
    """They name neither of the two, whose defaults are others now."""
    older = copy.deepcopy(recorded())
    del older["lighthouse"]["entry_score"], older["lighthouse"]["combine"]
    write_record(tmp_path, CheckpointRecord(2, 2, older))
    found = read_record(tmp_path)
    assert found is not None
    section = found.config["lighthouse"]
    assert (section["entry_score"], section["combine"]) == ("max", "sum")
    apart = [str(each) for each in differences(found.config, recorded())]
    assert apart == [
        "lighthouse.entry_score = 'first' (checkpoint: 'max')",
        "lighthouse.combine = 'finest' (checkpoint: 'sum')",
    ]


def test_resumed_run_compares_itself_with_its_checkpoint(tmp_path: Path) -> None:
    Run(tmp_path, {"training.steps": 2, "checkpoint.interval": 2}).succeed()
    refused = Run(tmp_path, {"training.steps": 3, "lighthouse.top_k": 8})
    assert refused.wait() != 0
    assert "step-2: lighthouse.top_k = 8 (checkpoint: 16)" in (refused.log)
    going_on = Run(tmp_path, {"training.steps": 3, "optimizer.lr": 1e-4})
    going_on.succeed()
    assert "other settings: optimizer.lr = 0.0001 (checkpoint: 0.0008), training.steps = 3" in (
        going_on.log
    )


SCALED = [
    "dense until=10 seq_len=128",
    "dense until=20 seq_len=128 skip_positions=512 yarn_factor=4",
    "dense yarn_factor=4",
]


def scheduled(*stages: str, steps: int = 30, scaling: str = "none") -> dict[str, Any]:
    return recorded(
        lighthouse__schedule=list(stages),
        training__steps=steps,
        training__seq_len=512,
        model__rope_scaling=scaling,
    )


@pytest.mark.parametrize("step", [15, 20, 25])
@pytest.mark.parametrize(
    "stages",
    [
        [each.partition(" yarn")[0] for each in SCALED],
        [each.replace("factor=4", "factor=8") for each in SCALED],
        [each.replace("seq_len=128", "seq_len=64") for each in SCALED],
        [],
    ],
    ids=["no YaRN", "another factor", "another length", "no schedule"],
)
def test_a_scaling_stays_once_a_stage_has_brought_it(step: int, stages: list[str]) -> None:
    """At the end of a stage too, where all other settings of the next one are free."""
    record = CheckpointRecord(step, 0, scheduled(*SCALED))
    check_settings(PATH, record, scheduled(*SCALED), False, False)
    with pytest.raises(UserValueError, match="would make another model .*model.rope_scaling = "):
        check_settings(PATH, record, scheduled(*stages), False, False)


def test_a_scaling_may_come_with_a_stage_that_has_not_begun() -> None:
    later = ["dense until=10 seq_len=128", "dense yarn_factor=4"]
    ends = CheckpointRecord(10, 0, scheduled("dense until=10 seq_len=128", "dense"))
    check_settings(PATH, ends, scheduled(*later), False, False)
    # A run that has finished can be given a further stage.
    finished = CheckpointRecord(10, 0, scheduled("dense seq_len=128", steps=10))
    check_settings(PATH, finished, scheduled(*later), False, False)
    under_way = CheckpointRecord(9, 0, scheduled("dense until=10 seq_len=128", "dense"))
    earlier = [later[0].replace("10", "5"), later[1]]
    with pytest.raises(UserValueError, match="model.rope_scaling = 'yarn factor=4 original_max"):
        check_settings(PATH, under_way, scheduled(*earlier), False, False)


def test_a_launch_by_hand_with_the_scaling_of_the_stage_says_nothing(caplog) -> None:
    record = CheckpointRecord(15, 0, scheduled(*SCALED))
    by_hand = scheduled(scaling="yarn factor=4 original_max_position_embeddings=128")
    check_settings(PATH, record, by_hand, elsewhere=True, weights_only=False)
    assert not any("model.rope_scaling = ''" in each.getMessage() for each in caplog.records)
