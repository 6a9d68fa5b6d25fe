"""A schedule that cannot run ends in one message, which names the stage, the value and the fix."""

import re
from pathlib import Path
from typing import Any

import pytest
from launch import SMALL, arguments

from torchtitan.models.llama3_lighthouse.checks.configuration import check_launch
from torchtitan.models.llama3_lighthouse.checks.parallelism import check_device
from torchtitan.models.llama3_lighthouse.checks.unread import warnings_of
from torchtitan.models.llama3_lighthouse.errors import UserError, UserValueError
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.stages import stages_of
from torchtitan.models.llama3_lighthouse.studies.settings import command_line, with_settings

STEPS, LENGTH = 12, 512
# Its defaults, which a schedule asks for.
BASE = {**SMALL, "lighthouse.dense_from_step": 10000}
FINEST = {"lighthouse.combine": "finest"}
NUL = "dense\0"
SHORT = "dense until=4 seq_len=128"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> JobConfig:
    line = {"job.dump_folder": tmp_path_factory.mktemp("dump"), **BASE}
    return LighthouseConfigManager().parse_args(arguments(line))


def scheduled(base: JobConfig, *stages: str, **settings: Any) -> JobConfig:
    return with_settings(base, {**settings, "lighthouse.schedule": list(stages)})


def check(config: JobConfig, processes: int = 1) -> None:
    """Check ``config`` as the launcher and the trainer do before anything is built."""
    check_launch(config, flavors, processes)
    check_device(config, "cpu")


# The stages, of which the one with the number in the middle is named, and the rest of the message.
FAULTS: list[tuple[list[str], int, str]] = [
    (["lighthouse until=8", "dense until=4"], 1,
     "ends at step 4, and the stage before it at step 8; let until rise from stage to stage"),
    (["lighthouse until=4", "window until=4 window=8", "dense"], 1,
     "ends at step 4, and the stage before it at step 4;"),
    (["lighthouse", "dense"], 0,
     "ends at the run's last step, 12, and a stage follows; give it an earlier until"),
    (["dense until=12 seq_len=128", "lighthouse", "dense"], 0, "ends at the run's last step, 12,"),
    (["dense until=13"], 0,
     "ends at step 13, after training.steps = 12; write until=12 or less, or set "
     "training.steps to 13"),
    (["lighthouse until=30", "dense"], 0, "ends at step 30, after training.steps = 12;"),
    (["lighthouse until=4", "dense until=8"], 1,
     "ends at step 8, before training.steps = 12; leave its until out, or add a stage"),
    (["lighthouse until=0", "dense"], 0, "until = 0 must be at least 1; raise it"),
    (["lighthouse until=-4", "dense"], 0, "until = '-4' is no whole number"),
    (["lighthouse until=1e3", "dense"], 0,
     "until = '1e3' is no whole number of at most 18 digits; write until=NUMBER"),
    (["lighthouse until=4.0", "dense"], 0, "until = '4.0' is no whole number"),
    (["lighthouse until=", "dense"], 0, "until = '' is no whole number"),
    (["lighthouse until=²", "dense"], 0, "until = '²' is no whole number"),
    ([f"lighthouse until={'9' * 5000}", "dense"], 0, "until = '9999"),
    ([""], 0, "'' is no attention; begin with one of lighthouse, window, dense"),
    (["   "], 0, "'' is no attention;"),
    ([NUL], 0, r"'dense\x00' is no attention;"),
    (["sparse until=4", "dense"], 0, "'sparse' is no attention; begin with one of"),
    (["Dense"], 0, "'Dense' is no attention;"),
    (["NONE"], 0, "window, dense, or give none by itself, in small letters, for no schedule"),
    (["none", "dense"], 0, "or give none by itself"),
    (["until=4 dense", "dense"], 0, "'until=4' is no attention;"),
    (["lighthouse until=4 top_q=32", "dense"], 0,
     "'top_q=32' is not understood; write last, or KEY=VALUE with one of until, seq_len,"),
    (["lighthouse until=4 lr=1", "dense"], 0, "'lr=1' is not understood;"),
    (["lighthouse until 4", "dense"], 0, "'until' is not understood;"),
    (["lighthouse until = 4", "dense"], 0, "'until' is not understood;"),
    (["lighthouse until=4 dense_layers=0", "dense"], 0, "'dense_layers=0' is not understood;"),
    (["lighthouse until=4 until=5", "dense"], 0, "until stands there twice; leave one of them out"),
    (["lighthouse last last"], 0, "last stands there twice; leave one of them out"),
    (["dense until=4 seq_len=0", "dense"], 0, "seq_len = 0 must be at least 1;"),
    (["dense until=4 seq_len=128k", "dense"], 0, "seq_len = '128k' is no whole number"),
    (["dense until=4 seq_len=192", "dense"], 0,
     "seq_len = 192 does not divide the 512 tokens of a local batch of 1 x 512; write a "
     "length that does, or local_batch_size=SEQUENCES too"),
    (["dense until=4 seq_len=1024", "dense"], 0,
     "seq_len = 1024 exceeds training.seq_len = 512, the longest sequence that the model is "
     "built for; lower it, or set training.seq_len to 1024"),
    (["dense until=4 local_batch_size=0", "dense"], 0, "local_batch_size = 0 must be at least 1;"),
    (["dense until=4 top_k=32", "dense"], 0,
     "top_k is not read under attention 'dense'; leave it out"),
    (["dense until=4 window=32", "dense"], 0, "window is not read under attention 'dense';"),
    (["window until=4 window=32 top_k=32", "dense"], 0,
     "top_k is not read under attention 'window';"),
    (["dense until=4 seq_len=128 skip_positions=1024", "dense"], 0,
     "skip_positions = 1024 exceeds training.seq_len = 512, the positions that the model is built "
     "for; lower it, or set training.seq_len to 1024"),
    (["dense until=4 seq_len=128 skip_positions=128", "dense"], 0,
     "skip_positions = 128 leaves sequences of 128 tokens nothing to skip; write more positions "
     "than seq_len, or leave it out"),
    (["dense until=4 skip_positions=512", "dense"], 0, "leaves sequences of 512 tokens nothing"),
    (["lighthouse"], 0,
     "comes last and is not dense, so export refuses its checkpoints; add a dense stage, or "
     "the word last"),
    (["dense until=4", "window window=32"], 1, "comes last and is not dense,"),
    (["lighthouse until=4 last", "dense"], 0, "says last, and a stage follows; leave last out"),
    # The following are faults of the configuration that the stage makes.
    (["dense until=4", "lighthouse until=8 seq_len=64", "dense"], 1,
     "training.seq_len = 64 does not fit [lighthouse]: "),
    (["lighthouse until=4 top_k=24", "dense"], 0,
     "[lighthouse] top_k must be a positive multiple of picks_per_stratum = 16, got top_k = "
     "24; round it to 32; the stage itself says top_k=24, so change that"),
    (["lighthouse until=4 top_k=0", "dense"], 0,
     "[lighthouse] top_k must be a positive multiple of picks_per_stratum = 16, got top_k = 0;"),
    (["lighthouse until=4 top_k=4096", "dense"], 0,
     "training.seq_len = 512 does not fit [lighthouse]: "),
    (["lighthouse until=4 pooling_factor=3", "dense"], 0,
     "[lighthouse] pooling_factor must be a power of two, at least 2, got pooling_factor = 3"),
    (["lighthouse until=4 levels=1", "dense"], 0,
     "[lighthouse] levels must be at least 2, got levels = 1"),
    (["lighthouse until=4 scorer=magic", "dense"], 0, "lighthouse.scorer = 'magic'"),
    (["lighthouse until=4 window=32 combine=sum", "dense"], 0, "[lighthouse] window = 32 "),
    (["window until=4", "dense"], 0,
     "lighthouse.attention = 'window' needs lighthouse.window = 0 to be at least 1; pass "
     "--lighthouse.window N"),
    (["window until=4 window=0", "dense"], 0,
     "lighthouse.attention = 'window' needs lighthouse.window = 0"),
    (["window until=4 window=9999999999", "dense"], 0,
     "lighthouse.window = 9999999999 must be at least 0 and at most"),
    (["dense until=4 local_batch_size=9999999999", "dense"], 0,
     "training.local_batch_size = 9999999999 must be at least 1 and at most"),
    (["dense until=4 seq_len=1 local_batch_size=512", "dense"], 0,
     "training.seq_len = 1 must be a multiple of 2 x "),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stages", "number", "words"), FAULTS, ids=[" | ".join(each[0])[:60] for each in FAULTS]
)
def test_message_names_stage_value_and_fix(base: JobConfig, stages, number, words) -> None:
    with pytest.raises(UserError) as caught:
        check(scheduled(base, *stages))
    message = str(caught.value)
    text = stages[number]
    shown = repr(text if len(text) <= 100 else f"{text[:100]}...")
    assert message.startswith(f"lighthouse.schedule, stage {shown}: ")
    assert words in message
    assert len(message) < 700 and "\n" not in message


@pytest.mark.parametrize(("stages", "number", "settings", "processes", "words"), [
    ([SHORT, "dense"], None, {"lighthouse.stage": "dense"}, 1,
     "lighthouse.stage = 'dense' does not go with lighthouse.schedule, .*; leave one of the two "
     "out: --lighthouse.schedule none turns the schedule off, --lighthouse.stage auto keeps it"),
    ([SHORT, "dense"], None, {"lighthouse.dense_from_step": 6}, 1,
     "lighthouse.dense_from_step = 6 does not go with lighthouse.schedule"),
    ([SHORT, "dense"], None, {"lighthouse.attention": "window"}, 1,
     "lighthouse.attention = 'window' does not go with lighthouse.schedule, .*attention lighth"),
    (["dense"], None, {"lighthouse.skip_positions": 512}, 1,
     "lighthouse.skip_positions = 512 is for stages whose sequences are shorter, and .* has none.*"
     "leave this key out; stages that are to skip may say skip_positions=512 themselves"),
    ([SHORT, "dense"], 0, {"lighthouse.skip_positions": 1024}, 1,
     "skip_positions = 1024 exceeds training.seq_len = 512"),
    ([SHORT, "dense"], 0, {"lighthouse.skip_positions": 512, "training.document_mask": True}, 1,
     "skip_positions = 512 does not go with training.document_mask, .*leave one of"),
    (["dense until=4 seq_len=128 skip_positions=0", "dense"], None,
     {"lighthouse.skip_positions": 512}, 1,
     "lighthouse.skip_positions = 512 is for stages whose sequences are shorter, and .* has none.*"
     "leave this key out; stages that are to skip may say skip_positions=512 themselves"),
    ([SHORT, "dense"], None, {"training.global_batch_size": 3, "training.local_batch_size": 2}, 1,
     "training.global_batch_size = 3 must be a multiple of training.local_batch_size = 2"),
    (["lighthouse until=4 window=130", "dense"], 0,
     {**FINEST, "parallelism.context_parallel_degree": 2, "lighthouse.top_k": 64}, 2,
     "lighthouse.window = 130 does not fit training.seq_len = 512 and .*at most 129.*says window"),
    (["dense until=4", "window until=8 window=40 seq_len=128", "dense"], 1,
     {"parallelism.context_parallel_degree": 2}, 2,
     "lighthouse.window = 40 does not fit training.seq_len = 128 and .*at most 33.*says window"),
    (["dense until=4 seq_len=4", "dense"], 0, {"parallelism.context_parallel_degree": 4}, 4,
     "training.seq_len = 4 must be a multiple of 2 x .* = 8, .*; the stage itself says seq_len=4"),
    (["dense until=4 seq_len=2", "dense"], 0, {"parallelism.tensor_parallel_degree": 2}, 2,
     "training.seq_len = 2 must be a multiple of 2 x .* = 4"),
    (["dense until=4", "lighthouse until=8 pooling_factor=4", "dense"], 1,
     {"parallelism.context_parallel_degree": 3, "training.seq_len": 768}, 3,
     "parallelism.context_parallel_degree = 3 does not fit training.seq_len = 768 and"),
    ([SHORT, "dense"], 1,
     {"parallelism.pipeline_parallel_degree": 2, "training.local_batch_size": 2}, 2,
     "a pass of 2 x 512 tokens follows stages of 8 x 128 tokens, and the parts of a pipeline "
     r".parallelism.pipeline_parallel_degree = 2. .*; set the degree to 1"),
    (["dense until=4 local_batch_size=3", "dense"], 0,
     {"parallelism.pipeline_parallel_degree": 2, "training.local_batch_size": 2}, 2,
     "training.local_batch_size = 3 must be .*; the stage itself says local_batch_size=3"),
    (["dense until=4 seq_len=256 local_batch_size=3", "dense"], 0,
     {"training.local_batch_size": 2}, 1,
     "the 3 sequences of a step cannot be shared by the text's 2 streams "
     r"\(lighthouse.data_streams = 0\); set lighthouse.data_streams to 6, which the batches"),
    (["lighthouse until=4 pooling_factor=4 top_k=16", "dense"], 0,
     {"validation.enable": True, "validation.seq_len": 508, "lighthouse.pooling_factor": 2}, 1,
     r"validation.seq_len = 508 does not fit \[lighthouse\]"),
    (["dense until=4 seq_len=128", "dense"], 0, {"lighthouse.passkey_mix": 0.5}, 1,
     "needs training.seq_len of at least 227, got 128; raise it"),
    (["window until=4 window=8", "dense"], 0, {"lighthouse.log_selection_every": 2}, 1,
     "lighthouse.log_selection_every = 2 does not go with lighthouse.attention = 'window'"),
    (["dense until=4 local_batch_size=2000000000", "dense"], 0, {}, 1,
     "training.local_batch_size = 2000000000 give each rank .*lower them to"),
    (["dense until=4 local_batch_size=4000000", "dense"], 0, {}, 1,
     "training.seq_len = 512 and training.local_batch_size = 4000000 take .* GiB for the input"),
])  # fmt: skip
def test_schedules_that_the_rest_does_not_fit_are_refused(
    base: JobConfig, stages, number, settings, processes, words
) -> None:
    with pytest.raises(UserValueError) as caught:
        check(scheduled(base, *stages, **settings), processes)
    message = str(caught.value)
    beginning = "" if number is None else f"lighthouse.schedule, stage '{stages[number]}': "
    assert re.match(re.escape(beginning) + f".*{words}", message), message


@pytest.mark.parametrize(("stages", "settings"), [
    (["dense"], {}),
    (["lighthouse last"], {}),
    (["lighthouse last until=12"], {}),
    (["dense until=3 seq_len=2", "lighthouse until=9 scorer=gla dilation=2", "dense"], {}),
    (["window until=3 window=8 seq_len=128", "lighthouse until=9 window=40", "dense"], FINEST),
    (["dense until=3 seq_len=128 local_batch_size=1", "dense"], {}),
    ([" dense   until=3 ", "dense\tuntil=12"], {}),
    # No stage selects, so that no geometry has to fit.
    (["dense"], {"training.seq_len": 510}),
])  # fmt: skip
def test_good_schedules_are_taken(base: JobConfig, stages, settings) -> None:
    check(scheduled(base, *stages, **settings))


def test_the_launcher_and_toml_read_the_same_stages(tmp_path: Path) -> None:
    stages = [SHORT, "lighthouse until=8 top_k=64", "dense"]
    file = tmp_path / "config.toml"
    file.write_text(f"[lighthouse]\nschedule = {stages}\n")
    by_toml = LighthouseConfigManager().parse_args(["--job.config_file", str(file)])
    by_line = LighthouseConfigManager().parse_args(["--lighthouse.schedule", ",".join(stages)])
    assert by_toml.lighthouse.schedule == by_line.lighthouse.schedule == stages
    spaced = LighthouseConfigManager().parse_args(["--lighthouse.schedule", ", ".join(stages)])
    assert spaced.lighthouse.schedule == stages


def test_none_turns_the_schedule_of_a_file_off(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[lighthouse]\nschedule = ['lighthouse until=4', 'dense']\n")
    line = ["--job.config_file", str(file), "--lighthouse.stage", "dense"]
    given = LighthouseConfigManager().parse_args(line)
    with pytest.raises(UserValueError, match="--lighthouse.schedule none turns the schedule off"):
        stages_of(given)
    for off in (["--lighthouse.schedule", "none"], command_line({"lighthouse.schedule": []})):
        found = LighthouseConfigManager().parse_args([*line, *off])
        assert found.lighthouse.schedule == []
        assert [stage.attention for stage in stages_of(found)] == ["dense"]


def test_a_window_as_long_as_a_stage_is_warned_of(base: JobConfig) -> None:
    def warned(schedule: list[str]) -> list[str]:
        config = scheduled(base, *schedule, **{"training.mixed_precision_param": "bfloat16"})
        # The rest says that no stage reads the settings of the method.
        return [line for line in warnings_of(config, 1) if "has no effect" not in line]

    short = "window until=4 seq_len=128 window=128"
    (found,) = warned([short, "window until=8 window=128", "dense"])
    assert found.startswith(f"lighthouse.schedule, stage '{short}': lighthouse.window = 128 holds ")
    assert not warned(["window until=8 window=128", "dense"])


@pytest.mark.parametrize("wrong", [5, ["dense"], None])
def test_stages_are_strings(base: JobConfig, wrong: Any) -> None:
    with pytest.raises(TypeError, match="lighthouse.schedule = .* each item a text in quotes"):
        check(scheduled(base, SHORT, wrong, "dense"))


def test_too_many_stages_are_refused_at_once(base: JobConfig) -> None:
    stages = [f"dense until={step}" for step in range(1, 2000)]
    with pytest.raises(ValueError, match="lighthouse.schedule has 1,999 stages; write 100 or"):
        check(scheduled(base, *stages))


def test_dense_steps_within_a_stage_are_counted(base: JobConfig) -> None:
    stages = ["lighthouse until=7", "dense"]
    first, last = stages_of(scheduled(base, *stages, **{"lighthouse.dense_every": 3}))
    assert (first.dense_steps, last.dense_steps) == (2, 5)
    first, last = stages_of(scheduled(base, *stages))
    assert (first.dense_steps, last.dense_steps) == (0, 5)
