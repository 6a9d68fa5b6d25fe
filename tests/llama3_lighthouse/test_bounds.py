"""Every key of a configuration has bounds, and one message says which it breaks."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from launch import SMALL, arguments

from torchtitan.models.llama3_lighthouse.checks.bounds import BOUNDS, check_bounds
from torchtitan.models.llama3_lighthouse.checks.configuration import check_config, check_launch
from torchtitan.models.llama3_lighthouse.checks.parallelism import check_device
from torchtitan.models.llama3_lighthouse.checks.unread import (
    A_STAGE,
    ITS_ATTENTION,
    READ_WHEN,
    warnings_of,
)
from torchtitan.models.llama3_lighthouse.errors import UserError, UserTypeError, UserValueError
from torchtitan.models.llama3_lighthouse.job_config import (
    JobConfig,
    Leaf,
    LighthouseConfigManager,
    leaves,
)
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.run_stages import is_too_much_for_a_cpu
from torchtitan.models.llama3_lighthouse.studies.settings import with_settings
from torchtitan.models.llama3_lighthouse.train import LighthouseTrainer

KEYS = list(leaves(JobConfig()))
TOO_LARGE = 2**70
# Rules of a row that no type shows, each with a value that trained, or ended in a traceback, once.
BROKEN: dict[str, Any] = {
    "activation_checkpoint.selective_ac_option": "²",
    "activation_checkpoint.determinism_check": "sometimes",
    "activation_checkpoint.memory_budget": 1.5,
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": ["attention"],
    "checkpoint.exclude_from_loading": ["optimiser"],
    "checkpoint.folder": "",
    "checkpoint.interval": 0,
    "checkpoint.keep_latest_k": 1,
    "checkpoint.load_step": -2,
    "comm.init_timeout_seconds": 10**13,
    "compile.backend": "magic",
    "compile.components": ["modle"],
    "lr_scheduler.decay_ratio": -0.1,
    "lr_scheduler.min_lr_factor": -1.0,
    "lr_scheduler.total_steps": 0,
    "lr_scheduler.warmup_steps": -1,
    "metrics.log_freq": 0,
    "model.converters": ["float7"],
    "model.name": "llama3",
    "optimizer.beta1": 1.0,
    "optimizer.eps": 0.0,
    "optimizer.lr": -1e-3,
    "optimizer.name": "SGD",
    "optimizer.weight_decay": -0.1,
    "parallelism.data_parallel_shard_degree": 0,
    "parallelism.module_fqns_per_model_part": [["tok_embeddings", "layers.00"]],
    "parallelism.pipeline_parallel_degree": 0,
    "parallelism.tensor_parallel_degree": -1,
    "profiling.profile_freq": 0,
    "training.dataloader.num_workers": 2,
    "training.dataloader.prefetch_factor": 0,
    "training.gc_freq": 0,
    "training.global_batch_size": -5,
    "training.local_batch_size": 0,
    "training.max_norm": 0.0,
    "training.seq_len": 10**13,
    "training.steps": -5,
    "validation.freq": 0,
    "validation.steps": 0,
}  # fmt: skip
# Settings of upstream's that nothing in this trainer reads, or that fail where they are read.
IGNORED: dict[str, Any] = {
    "checkpoint.enable_ft_dataloader_checkpoints": False,
    "checkpoint.last_save_in_hf": True,
    "checkpoint.initial_load_in_hf_quantized": True,
    "comm.mode": "fake_backend",
    "debug.moe_force_load_balance": True,
    "experimental.custom_args_module": "mine",
    "fault_tolerance.enable": True,
    "fault_tolerance.group_size": 2,
    "memory_estimation.enable": True,
    "parallelism.context_parallel_rotate_method": "allgather",
    "parallelism.expert_parallel_degree": 2,
    "quantize.grouped_mm.mx.fqns": ["experts"],
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> JobConfig:
    line = {"job.dump_folder": tmp_path_factory.mktemp("dump"), **SMALL}
    return LighthouseConfigManager().parse_args(arguments(line))


def refusal(config: JobConfig, check: Callable[..., None] = check_bounds, **settings: Any) -> str:
    """The message with which ``check`` refuses ``settings``."""
    arguments = () if check is check_bounds else (flavors,)
    with pytest.raises(UserError) as caught:
        check(with_settings(config, settings), *arguments)
    return str(caught.value)


def test_every_key_has_a_row() -> None:
    keys = {leaf.key for leaf in KEYS}
    assert keys == BOUNDS.keys(), "give each key a row in checks/bounds.py: decide on its bounds"
    unknown = [key for key in READ_WHEN if not any(name.startswith(key) for name in keys)]
    assert not unknown
    conditions = {condition.key for each in READ_WHEN.values() for condition in each}
    assert conditions <= keys | {A_STAGE, ITS_ATTENTION}


@pytest.mark.parametrize("key", BROKEN)
def test_values_out_of_bounds_are_refused(config: JobConfig, key: str) -> None:
    shown = re.escape(repr(BROKEN[key]))
    message = refusal(config, **{key: BROKEN[key]})
    assert re.fullmatch(rf"{key} = {shown} (must|is not|names) .*; pass --{key} .*", message)


@pytest.mark.parametrize("key", IGNORED)
def test_settings_that_nothing_reads_are_refused(config: JobConfig, key: str) -> None:
    message = refusal(config, **{key: IGNORED[key]})
    assert message.startswith(f"{key} = ") and "; " in message


def hostile(leaf: Leaf) -> list[tuple[Any, type[UserError]]]:
    """Values that no key of this type means, and the error for each."""
    kinds = set(get_args(leaf.kind) or [leaf.kind]) - {type(None)}
    found: list[tuple[Any, type[UserError]]] = [(object(), UserTypeError)]
    if bool not in kinds:
        found.append((True, UserTypeError))
    if float in kinds:
        found += [(float(value), UserValueError) for value in ("nan", "inf", "-inf")]
    if kinds & {int, float}:
        found += [(TOO_LARGE, UserValueError), ("many", UserTypeError)]
    if str in kinds and get_origin(leaf.kind) is not list:
        found.append(("a\0b", UserValueError))
    if get_origin(leaf.kind) is list:
        return [([value], error) for value, error in found]
    return found


@pytest.mark.parametrize("leaf", KEYS, ids=lambda leaf: leaf.key)
def test_no_key_takes_what_its_type_does_not_mean(config: JobConfig, leaf: Leaf) -> None:
    for value, error in hostile(leaf):
        with pytest.raises(error, match=f"^{re.escape(leaf.key)} = "):
            check_bounds(with_settings(config, {leaf.key: value}))


@pytest.mark.parametrize(("key", "value", "words"), [
    ("training.steps", "many", "training.steps = 'many' must be a whole number; pass --training.s"),
    ("training.max_norm", "x", "training.max_norm = 'x' must be a number; pass --training.max"),
    ("training.mixed_precision_reduce", "x", "_reduce = 'x' must be 'float32'; pass --training"),
    ("debug.seed", "x", "debug.seed = 'x' must be a whole number; pass --debug.seed N"),
    ("parallelism.module_fqns_per_model_part", [3],
     "= [3] must be a list, each item a list, each item a text in quotes; pass --"),
    ("activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns", 1,
     "= 1 must be a list, each item a text in quotes; pass --"),
])  # fmt: skip
def test_wrong_types_are_named_in_one_line(config: JobConfig, key: str, value, words: str) -> None:
    message = refusal(config, **{key: value})
    assert words in message and "\n" not in message


def test_bounds_themselves_are_taken(config: JobConfig) -> None:
    for key, value in (
        ("checkpoint.keep_latest_k", 0), ("checkpoint.keep_latest_k", 2),
        ("validation.steps", -1), ("training.global_batch_size", -1), ("debug.seed", -1),
        ("debug.seed", None), ("lr_scheduler.warmup_steps", 0), ("lr_scheduler.decay_ratio", 1),
        ("optimizer.lr", 1.0), ("activation_checkpoint.selective_ac_option", "op"),
        ("compile.backend", "eager"), ("lighthouse.passkey_mix", 1),
    ):  # fmt: skip
        check_bounds(with_settings(config, {key: value}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.steps": 14, "lr_scheduler.total_steps": 8},
         "lr_scheduler.total_steps = 8 is below training.steps = 14: .*total_steps 14 or more"),
        ({"training.dataset": "c4_locl"},
         "training.dataset = 'c4_locl' is not known; use one of c4, c4_local, python_stdlib"),
        ({"training.dataset": "c4_local"},
         "training.dataset = 'c4_local' needs a folder; pass --training.dataset_path FOLDER"),
        ({"training.dataset_path": "books"},
         "training.dataset_path = 'books' is not read by training.dataset = 'python_stdlib'"),
        ({"validation.enable": True, "validation.dataset_path": "books", "validation.seq_len": 512},
         "validation.dataset_path = 'books' is not read"),
        ({"checkpoint.enable": False, "checkpoint.load_step": 4},
         "checkpoint.load_step = 4 needs checkpoint.enable = true, .*--checkpoint.enable"),
        ({"checkpoint.enable": False, "checkpoint.initial_load_path": "step-4"},
         "checkpoint.initial_load_path = 'step-4' needs checkpoint.enable"),
        ({"checkpoint.load_step": 4}, "checkpoint.load_step = 4 but .* holds no checkpoint; leave"),
        ({"activation_checkpoint.mode": "lighthouse", "activation_checkpoint.debug": True},
         "activation_checkpoint.debug = true does not go .*pass --activation_checkpoint.no-debug"),
        ({"checkpoint.last_save_in_hf": True}, "last_save_in_hf = true fails .*export-hf"),
        ({"checkpoint.initial_load_in_hf": True, "checkpoint.initial_load_model_only": False},
         "checkpoint.initial_load_in_hf = true loads weights alone"),
        ({"checkpoint.initial_load_in_hf": True},
         "initial_load_in_hf = true reads model.hf_assets_path = .* no .safetensors file; pass"),
        ({"checkpoint.initial_load_path": "/proc/no"},
         "checkpoint.initial_load_path = '/proc/no' is not a folder"),
        ({"activation_checkpoint.mode": "memory_budget"}, "'memory_budget' is a mode of the comp"),
        ({"profiling.enable_profiling": True, "profiling.profile_freq": 3},
         "profiling.profile_freq = 3 must be at least .*pass --profiling.profile_freq 4 or more"),
        ({"optimizer.weight_decay": 2, "optimizer.lr": 1}, "optimizer.weight_decay = 2 with"),
        ({"experimental.custom_import": "no.such"}, "custom_import = 'no.such' is no module"),
        ({"metrics.enable_tensorboard": True, "metrics.save_tb_folder": "/proc/no"},
         "metrics.save_tb_folder = '/proc/no' cannot be written to"),
        ({"checkpoint.folder": "./metrics.jsonl"}, "'./metrics.jsonl' is in the place of"),
        ({"job.save_config_file": "."}, "job.save_config_file = '.' is a folder"),
        ({"lighthouse.levels": 10**7}, "levels = 10000000 with pooling_factor = 2 would pool"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(config, settings, message) -> None:
    assert re.search(message, refusal(config, check_config, **settings))


def test_a_trainer_that_is_started_alone_checks_its_degrees(config: JobConfig, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    two = with_settings(config, {"parallelism.tensor_parallel_degree": 2})
    with pytest.raises(UserValueError, match="needs a multiple of 2 processes"):
        LighthouseTrainer(two)


def test_steps_that_fill_memory_are_refused(config: JobConfig) -> None:
    settings = {"training.global_batch_size": 2**30}
    with pytest.raises(UserValueError, match="global_batch_size = 1073741824 .* tokens a step"):
        check_launch(with_settings(config, settings), flavors, 1)


@pytest.mark.parametrize("key", [
    "profiling.enable_profiling", "profiling.enable_memory_snapshot",
    "training.enable_cpu_offload", "training.gc_debug",
])  # fmt: skip
def test_what_needs_a_gpu_is_refused_without_one(config: JobConfig, key: str) -> None:
    given = with_settings(config, {key: True})
    check_device(given, "cuda")
    name = key.rpartition(".")[2]
    with pytest.raises(UserValueError, match=rf"^{key} = true .*on 'cpu'; pass .*\.no-{name}"):
        check_device(given, "cpu")


def test_runs_for_gpus_are_told_from_those_for_a_cpu(config: JobConfig) -> None:
    assert not is_too_much_for_a_cpu(config)
    # Both stages of such a length attend for a minute in their dense layers.
    assert is_too_much_for_a_cpu(with_settings(config, {"training.seq_len": 65536}))
    assert is_too_much_for_a_cpu(with_settings(config, {"training.global_batch_size": 4096}))
    # All stages count, each with its length.
    short = "dense until=2 seq_len=512 local_batch_size=1"
    schedule = {"training.seq_len": 65536, "training.steps": 2, "lighthouse.schedule": [short],
                "lighthouse.dense_from_step": 10000}  # fmt: skip
    assert not is_too_much_for_a_cpu(with_settings(config, schedule))
    schedule |= {"training.steps": 3, "lighthouse.schedule": [short, "dense"]}
    assert is_too_much_for_a_cpu(with_settings(config, schedule))
    # So do dense steps between those of Lighthouse.
    between = {"training.seq_len": 32768, "training.global_batch_size": 1,
               "lighthouse.dense_from_step": 10000, "lighthouse.dense_layers": []}  # fmt: skip
    assert not is_too_much_for_a_cpu(with_settings(config, between))
    between["lighthouse.dense_every"] = 2
    assert is_too_much_for_a_cpu(with_settings(config, between))


def test_sequences_that_no_memory_holds_are_refused_on_a_cpu(config: JobConfig) -> None:
    given = with_settings(config, {"training.seq_len": 2**31 - 512})
    check_device(given, "cuda")
    with pytest.raises(UserValueError, match="seq_len = 2147483136 .* 2,048 GiB for the input"):
        check_device(given, "cpu")


def test_pinned_memory_is_refused_without_a_gpu(config: JobConfig) -> None:
    given = with_settings(config, {"checkpoint.async_mode": "async_with_pinned_mem"})
    check_device(given, "cuda")
    with pytest.raises(UserValueError, match="async_with_pinned_mem' copies from a GPU"):
        check_device(given, "cpu")


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"activation_checkpoint.keep_products": ["wo"]}, "keep_products = ['wo'] has no effect"),
        ({"lighthouse.dilation": 8, "lighthouse.scorer": "random"},
         "dilation = 8 has no effect: it is read when lighthouse.scorer is 'dilated' or 'gla'"),
        ({"activation_checkpoint.keep_products": ["wo"],
          "activation_checkpoint.mode": "lighthouse"}, None),
        ({"quantize.linear.float8.filter_fqns": ["output"]}, "when model.converters is given"),
        ({"checkpoint.export_dtype": "float16"}, "checkpoint.last_save_model_only is true"),
        ({"parallelism.pipeline_parallel_schedule": "GPipe"}, "pipeline_parallel_degree is above"),
        ({"lighthouse.dense_every": 2}, None),
        ({"lighthouse.dense_every": 2, "lighthouse.stage": "dense"},
         "lighthouse.dense_every = 2 has no effect: it is read when a stage is not dense"),
        ({"lighthouse.log_selection_every": 3, "lighthouse.dense_from_step": 0},
         "lighthouse.log_selection_every = 3 has no effect: it is read when a stage is not dense"),
        ({"lighthouse.dense_every": 2, "lighthouse.dense_from_step": 10000,
          "lighthouse.schedule": ["dense until=4 seq_len=128", "dense"]}, "dense_every = 2 has no"),
        ({"lighthouse.dense_every": 2, "lighthouse.dense_from_step": 10000,
          "lighthouse.schedule": ["window until=4 window=8", "dense"], "lighthouse.top_k": 1024,
          "lighthouse.pooling_factor": 4, "lighthouse.picks_per_stratum": 128,
          "training.mixed_precision_param": "bfloat16"},
         "lighthouse.top_k = 1024 has no effect: it is read when lighthouse.schedule has a stage"),
        ({"training.document_mask": True, "lighthouse.window": 3, "lighthouse.combine": "finest",
          "training.mixed_precision_param": "bfloat16", "lighthouse.levels": 3,
          "lighthouse.pooling_factor": 2},
         "lighthouse.window = 3 with training.document_mask is less than pooling_factor^(levels "),
        ({"training.document_mask": True, "lighthouse.window": 4, "lighthouse.combine": "finest",
          "training.mixed_precision_param": "bfloat16", "lighthouse.levels": 3,
          "lighthouse.pooling_factor": 2}, None),
        ({"training.document_mask": True, "lighthouse.attention": "window", "lighthouse.window": 1,
          "training.mixed_precision_param": "bfloat16", "lighthouse.top_k": 1536,
          "lighthouse.pooling_factor": 4, "lighthouse.picks_per_stratum": 128}, None),
        ({"training.document_mask": True, "lighthouse.window": 4, "lighthouse.combine": "finest",
          "training.mixed_precision_param": "bfloat16", "lighthouse.levels": 2,
          "lighthouse.pooling_factor": 2, "training.steps": 6,
          "lighthouse.dense_from_step": 10000,
          "lighthouse.schedule": ["lighthouse until=4 levels=4", "dense"]},
         "stage 'lighthouse until=4 levels=4': lighthouse.window = 4 with training.document_mask"),
        # A dense run may carry the method's settings.
        ({"lighthouse.top_k": 64, "lighthouse.dense_layers": [], "lighthouse.stage": "dense"},
         None),
        ({}, None),
    ],
)  # fmt: skip
def test_settings_without_effect_are_warned_of(config: JobConfig, settings, warned) -> None:
    found = warnings_of(with_settings(config, settings), world_size=2)
    assert len(found) == (warned is not None)
    assert warned is None or warned in found[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--training.stepz", "3"], "unknown key '--training.stepz' .*did you mean 'training.step"),
        (["--lighthouse.document_mask"], "did you mean 'training.document_mask'"),
        (["--lighthouse.no-document_mask"], "did you mean 'training.document_mask'"),
        (["--lighthouse.steps", "3"], "did you mean 'training.steps'"),
        (["--complie.enable"], "did you mean 'compile.enable'"),
        (["--checkpoint.no-enabel"], "unknown key '--checkpoint.no-enabel'.*did you mean 'check"),
        (["--x"], "unknown key '--x' on the command line; lighthouse train --list-keys"),
        (["--training.steps", "many"], "--training.steps: .*'many'; lighthouse train --list-keys"),
        (["--training.steps", "1", "2"], "Unrecognized options: 2, after --training.steps"),
        *(
            (
                words,
                f"{words[0].partition('=')[0]} takes no value, got '{value}'; pass "
                "--training.document_mask, or --training.no-document_mask for false",
            )
            for words, value in [
                (["--training.document_mask", "false", "--training.steps", "3"], "false"),
                (["--training.document-mask=true"], "true"),
                (["--training.no-document_mask", "yes"], "yes"),
                (["--training.document_mask", "-3"], "-3"),
            ]
        ),
        (
            ["--lighthouse.scorer", "best"],
            "'best'.*Expected one of .'norm', 'dilated', 'gla', 'random'",
        ),
        (["--job.config_file"], "--job.config_file.*name a TOML file"),
        (["--job.custom_config_module", "nowhere"], "job.custom_config_module.*'nowhere'"),
        (["--job.config_file", "a\0b"], "embedded null byte.*name a TOML file"),
    ],
)
def test_command_lines_that_cannot_be_read_end_in_one_line(line, message, capsys) -> None:
    with pytest.raises(UserError, match=message) as caught:
        LighthouseConfigManager().parse_args(line)
    assert "\n" not in str(caught.value)
    printed = capsys.readouterr()
    assert not printed.out and not printed.err


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            "[training]\nsteps = true",
            "training.steps = True in the TOML file is no value of this key; write a whole number$",
        ),
        ("[optimizer]\nlr = true", "optimizer.lr = True"),
        (
            "[training]\ndocument_mask = 'true'",
            "training.document_mask = 'true' in the TOML file .*; write true or false$",
        ),
        (
            "[lighthouse]\ndense_layers = [true]",
            r"dense_layers = \[True\] .*; write a list, each item a whole number$",
        ),
        (
            "[lighthouse]\nschedule = ['dense until=5', 3]",
            "schedule = .* 3.* in the TOML file .*; write a list, each item a text in quotes$",
        ),
        ("[debug]\nseed = 'x'", "debug.seed = 'x' in the TOML file .*; write a whole number$"),
        ("[lighthouse]\nstage = 'sparse'", "; write one of 'auto', 'lighthouse', 'dense'$"),
        ("[model]\nconverters = 3", "each item a text in quotes"),
        ("[training]\nsteps = 3\nsteps = 4", "is not TOML: .*; mend it"),
        ("a = " + "[" * 5000, "is nested too deeply; mend it"),
        ("[training]\nsteps = " + "9" * 5000, "is not TOML: .*; mend it"),
        (b"\xff\xfe", "is not TOML: .*; mend it"),
    ],
)
def test_toml_that_no_run_can_use_is_named(tmp_path: Path, toml: str | bytes, message: str) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(toml.encode() if isinstance(toml, str) else toml)
    with pytest.raises(UserError, match=message):
        LighthouseConfigManager().parse_args(["--job.config_file", str(file)])
