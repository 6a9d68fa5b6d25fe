"""Bad configurations end in one message that names the key, the value and the fix."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import SMALL, Run, arguments

from torchtitan.models.llama3_lighthouse.checkpoints.record import RECORD_FILE, read_record
from torchtitan.models.llama3_lighthouse.checks import output
from torchtitan.models.llama3_lighthouse.checks.configuration import check_config
from torchtitan.models.llama3_lighthouse.checks.output import check_output
from torchtitan.models.llama3_lighthouse.checks.parallelism import check_device
from torchtitan.models.llama3_lighthouse.checks.text import check_vocabulary
from torchtitan.models.llama3_lighthouse.checks.unread import warnings_of
from torchtitan.models.llama3_lighthouse.errors import UserError, UserFileError, UserValueError
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.train import LighthouseTrainer


def check(tmp_path: Path, toml: str = "", **settings: Any) -> JobConfig:
    """Parse ``toml``, or else ``settings``, as the trainer would, and check the result."""
    line = arguments({"job.dump_folder": tmp_path / "dump", **SMALL, **settings})
    if toml:
        (tmp_path / "config.toml").write_text(toml)
        line = ["--job.config_file", str(tmp_path / "config.toml"),
                "--job.dump_folder", str(tmp_path / "dump")]  # fmt: skip
    config = LighthouseConfigManager().parse_args(line)
    check_config(config, flavors)
    return config


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("lighthouse.levels", 1, "levels"),
        ("lighthouse.pooling_factor", 3, "power of two"),
        ("lighthouse.top_k", 24, "picks_per_stratum"),
        ("lighthouse.top_k", 0, "top_k"),
        ("lighthouse.top_k", 256, "top_k"),
        ("lighthouse.picks_per_stratum", 15, "even"),
        ("lighthouse.dense_from_step", -1, "0 trains dense throughout"),
        ("lighthouse.dense_every", 1, "must be at least 2 (0 mixes"),
        ("lighthouse.log_selection_every", -1, "0 logs no selections"),
        ("lighthouse.passkey_mix", 1.1, "at least 0 and at most 1"),
        ("lighthouse.passkey_mix", -0.1, "at least 0 and at most 1"),
        ("lighthouse.passkey_mix", float("nan"), "at least 0 and at most 1"),
        ("lighthouse.passkey_tasks", ("passkey", "passkey"), "name each once"),
        ("lighthouse.dense_layers", (0, 6), "0 to 5"),
        ("lighthouse.dense_layers", (1, 1), "twice"),
        ("training.seq_len", 510, "training.seq_len"),
        ("model.flavor", "7B", "debugmodel"),
        ("training.local_batch_size", 0, "must be at least 1"),
        ("lighthouse.tokenizer", "hf", "--model.hf_assets_path"),
        ("parallelism.context_parallel_degree", 0, "must be at least 1"),
        ("parallelism.context_parallel_degree", 3, "must be a multiple of 6 chunks"),
        ("parallelism.pipeline_parallel_degree", 2, "training.local_batch_size = 1 must be"),
        ("optimizer.early_step_in_backward", True, "set it to false"),
        ("job.dump_folder", "/proc/nowhere", "--job.dump_folder"),
    ],
)
def test_message_names_key_value_and_fix(tmp_path: Path, key, value, fix) -> None:
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        check(tmp_path, **{key: value})
    message = str(caught.value)
    assert key.split(".")[1] in message
    shown = list(value) if isinstance(value, tuple) else value
    # Messages show booleans as TOML writes them.
    shown = str(value).lower() if isinstance(value, bool) else str(shown)
    assert shown in message
    assert fix in message


def test_files_that_are_no_toml_are_named_without_a_traceback(tmp_path: Path, caplog) -> None:
    file = tmp_path / "broken.toml"
    file.write_text("[training\n")
    for path, message in (
        (file, "broken.toml is not TOML: .*; mend it"),
        (tmp_path / "none.toml", "none.toml cannot be read .*; name a TOML file"),
        (tmp_path, "cannot be read .Is a directory.; name a TOML file"),
    ):
        for line in ([f"--job.config_file={path}"], ["--job.config-file", str(path)]):
            with pytest.raises(UserError, match=message):
                LighthouseConfigManager().parse_args(line)
    assert not caplog.records


def test_broken_records_of_checkpoints_are_named(tmp_path: Path) -> None:
    (tmp_path / RECORD_FILE).write_text('{"step": 3, ')
    with pytest.raises(UserValueError, match=f"{RECORD_FILE} cannot be read as .*; restore it"):
        read_record(tmp_path)


def test_outputs_that_cannot_be_written_to_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc/nowhere")):
        with pytest.raises(UserFileError, match=f"^--output {folder} cannot be .*pass --output"):
            check_output(folder)


def test_sequences_too_short_for_what_is_mixed_in_are_refused(tmp_path: Path) -> None:
    settings = {"training.seq_len": 192, "lighthouse.top_k": 8, "lighthouse.picks_per_stratum": 8}
    check(tmp_path, **settings)
    settings["lighthouse.passkey_mix"] = 0.5
    check(tmp_path, **settings, **{"lighthouse.passkey_tasks": ("passkey", "long_passkey")})
    with pytest.raises(ValueError, match="needs training.seq_len of at least 227, got 192; raise"):
        check(tmp_path, **settings)
    settings |= {"lighthouse.passkey_mix": 0.0, "lighthouse.repeat_mix": 0.5}
    with pytest.raises(ValueError, match="repeat_mix = 0.5 needs training.seq_len of at least 256"):
        check(tmp_path, **settings)


def test_pipelines_that_cannot_run_are_refused(tmp_path: Path) -> None:
    settings = {"parallelism.pipeline_parallel_degree": 2, "training.local_batch_size": 2}
    check(tmp_path, **settings)
    for changed, message in (
        ({"parallelism.pipeline_parallel_schedule": "ZBVZeroBubble"}, "'ZBVZeroBubble' is not"),
        ({"parallelism.pipeline_parallel_degree": 16, "training.local_batch_size": 16},
         "pipeline_parallel_degree = 16 makes 16 pipeline stages"),
        # Upstream would train without the first layer.
        ({"parallelism.module_fqns_per_model_part": ["tok_embeddings", "norm,output"]},
         r"'norm', 'output'\]\] must name tok_embeddings, layers.0 to layers"),
        ({"validation.enable": True, "validation.seq_len": 512},
         "validation.local_batch_size = 8 must equal training.local_batch_size = 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check(tmp_path, **{**settings, **changed})


def test_selections_are_not_recorded_across_pipeline_stages(tmp_path: Path) -> None:
    settings = {"lighthouse.log_selection_every": 5, "parallelism.pipeline_parallel_degree": 2}
    settings["training.local_batch_size"] = 2
    with pytest.raises(ValueError, match="log_selection_every = 5 .* set it to 0"):
        check(tmp_path, **settings)


def test_validation_lengths_are_checked_when_it_is_enabled(tmp_path: Path) -> None:
    check(tmp_path, **{"validation.seq_len": 510})
    with pytest.raises(ValueError, match=r"validation\.seq_len = 510"):
        check(tmp_path, **{"validation.seq_len": 510, "validation.enable": True})
    with pytest.raises(ValueError, match=r"validation\.seq_len = 1024 exceeds training"):
        check(tmp_path, **{"validation.seq_len": 1024, "validation.enable": True})


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[lighthouse]\ntop_q = 4", r"lighthouse\.top_q.*did you mean 'top_k'"),
        ("[lighthous]\ntop_k = 4", "lighthous.*did you mean 'lighthouse'"),
        ("[lighthouse]\ndocument_mask = true", "did you mean 'training.document_mask'"),
        ("steps = 3", "did you mean 'training.steps'"),
        ("[training]\nfoo = 1", r"training\.foo"),
        ('[lighthouse]\ntop_k = "many"', r"lighthouse\.top_k = 'many'"),
        ('[lighthouse]\nstage = "sparse"', r"lighthouse\.stage = 'sparse'"),
        ('[lighthouse]\nscorer = "chance"', r"lighthouse\.scorer = 'chance'"),
        ('[lighthouse]\ndense_layers = ["0"]', r"lighthouse\.dense_layers"),
        ("[training.dataloader]\nworkers = 1", r"training\.dataloader\.workers"),
        ("lighthouse = 3", r"write \[lighthouse\]"),
    ],
)
def test_bad_toml(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        check(tmp_path, toml)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lighthouse.top_k": 20}, "picks_per_stratum"),
        ({"training.dataset": "c4_local", "training.dataset_path": "/nowhere"}, "/nowhere"),
        # torchrun is called by the test itself here; test_launch.py calls our launcher.
        pytest.param({"training.dataset": "c5"}, "c5", marks=pytest.mark.slow),
    ],
)
def test_process_ends_with_one_message(tmp_path: Path, settings: dict, message: str) -> None:
    # With torchrun, the log still has one message: torchrun's last lines repeat it.
    run = Run(tmp_path, settings, torchrun=message == "c5")
    assert run.wait() != 0
    errors = [line for line in run.log.splitlines() if "  ERROR " in line]
    assert len(errors) == 1 and message in errors[0], run.log[-4000:]
    assert run.lines(0) == []


@pytest.mark.slow
def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, {"checkpoint.create_seed_checkpoint": True}).succeed()
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "dump/checkpoint").rglob("*"))
    other = Run(tmp_path, {"model.flavor": "270M", "training.steps": 1})
    assert other.wait() != 0
    assert "is of another model: its 'tok_embeddings.weight' has shape (320, 64)" in other.log
    again = Run(tmp_path, {"checkpoint.create_seed_checkpoint": True})
    assert again.wait() != 0
    assert "is not overwritten" in again.log
    assert before == sorted(p.stat().st_mtime_ns for p in (tmp_path / "dump/checkpoint").rglob("*"))


@pytest.mark.slow
def test_earlier_load_step_does_not_overwrite_later_ones(tmp_path: Path) -> None:
    Run(tmp_path, {"training.steps": 4, "checkpoint.interval": 2}).succeed()
    run = Run(tmp_path, {"training.steps": 4, "checkpoint.load_step": 2})
    assert run.wait() != 0
    assert "goes up to step 4" in run.log and "--checkpoint.initial_load_path" in run.log
    branch = {
        "training.steps": 4,
        "checkpoint.folder": "branch",
        "checkpoint.initial_load_path": tmp_path / "dump/checkpoint/step-2",
        "checkpoint.initial_load_model_only": False,
    }
    assert "Goes on from" in Run(tmp_path, branch).succeed().log


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_checkpoint.mode": "selective"}, "mode = 'selective'; set mode to"),
        ({"parallelism.tensor_parallel_degree": 2}, "tensor_parallel_degree = 2, which already"),
        ({"parallelism.pipeline_parallel_degree": 2, "training.local_batch_size": 2},
         "pipeline_parallel_degree = 2, which runs other"),
    ],
)  # fmt: skip
def test_offloading_that_cannot_work_is_refused(tmp_path: Path, settings, message) -> None:
    offload = {"activation_checkpoint.offload_inputs": True}
    for mode in ("lighthouse", "full"):
        check(tmp_path, **{**offload, "activation_checkpoint.mode": mode})
    with pytest.raises(ValueError, match=f"offload_inputs = true is .*{message}"):
        check(tmp_path, **{"activation_checkpoint.mode": "full", **offload, **settings})


def test_context_parallelism_of_gpus_takes_no_float32(tmp_path: Path) -> None:
    settings = {
        "job.dump_folder": tmp_path / "dump",
        **SMALL,
        "parallelism.context_parallel_degree": 2,
        "training.mixed_precision_param": "float32",
    }
    config = LighthouseConfigManager().parse_args(arguments(settings))
    check_device(config, "cpu")
    with pytest.raises(ValueError, match="mixed_precision_param = 'float32' .*pass .*bfloat16"):
        check_device(config, "cuda")


def test_offloading_needs_a_gpu(tmp_path: Path) -> None:
    settings = {
        "job.dump_folder": tmp_path / "dump",
        **SMALL,
        "activation_checkpoint.mode": "lighthouse",
        "activation_checkpoint.offload_inputs": True,
    }
    config = LighthouseConfigManager().parse_args(arguments(settings))
    check_device(config, "cuda")
    with pytest.raises(ValueError, match="needs a GPU .*is on 'cpu'; pass .*no-offload_inputs"):
        check_device(config, "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a GPU"):
            LighthouseTrainer(config)


def test_replicas_without_sharding_are_refused(tmp_path: Path) -> None:
    replicated = {"parallelism.data_parallel_replicate_degree": 2}
    check(tmp_path, **replicated)
    with pytest.raises(ValueError, match="data_parallel_replicate_degree = 2 without sharding"):
        check(tmp_path, **replicated, **{"parallelism.data_parallel_shard_degree": 1})


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_missing_logger_is_refused_at_the_start(tmp_path: Path, monkeypatch, package: str) -> None:
    key = f"metrics.enable_{package}"
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserValueError, match=rf"{key} = true needs the package {package}.*pip"):
        check(tmp_path, **{key: True})
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: name)
    check(tmp_path, **{key: True})


@pytest.mark.parametrize(("settings", "warned"), [
    ({"lighthouse.dense_from_step": 12}, True), ({"lighthouse.dense_from_step": 11}, False),
    ({"lighthouse.dense_from_step": 12, "lighthouse.stage": "lighthouse"}, False),
])  # fmt: skip
def test_run_that_never_gets_dense_is_warned_of(tmp_path: Path, settings, warned: bool) -> None:
    warnings = warnings_of(check(tmp_path, **settings), 1)
    assert len(warnings) == warned
    if warned:
        assert "lighthouse.dense_from_step = 12 is not below training.steps = 12" in warnings[0]


def test_validation_on_another_text_is_warned_of(tmp_path: Path) -> None:
    own = {"training.dataset": "c4_local", "training.dataset_path": str(tmp_path)}
    (tmp_path / "a.txt").write_text("Some text.")
    (tmp_path / "validation.txt").write_text("Some other text.")
    assert not warnings_of(check(tmp_path, **own), 1)
    own |= {"validation.enable": True, "validation.seq_len": 512}
    (warning,) = warnings_of(check(tmp_path, **own), 1)
    assert "validation.dataset = 'python_stdlib' is another text" in warning
    assert f"--validation.dataset c4_local --validation.dataset_path {tmp_path} for" in warning
    held_out = {"validation.dataset": "c4_local", "validation.dataset_path": str(tmp_path)}
    assert not warnings_of(check(tmp_path, **own, **held_out), 1)


@pytest.mark.parametrize("ids", [320, 321])
def test_a_tokenizer_of_more_ids_than_the_model_has_is_refused(tmp_path: Path, ids: int) -> None:
    config, tokenizer = check(tmp_path), SimpleNamespace(get_vocab_size=lambda: ids)
    if ids == 320:
        check_vocabulary(config, tokenizer)
        return
    with pytest.raises(UserValueError, match="the tokenizer has 321 ids but .* has 320 embeddings"):
        check_vocabulary(config, tokenizer)
