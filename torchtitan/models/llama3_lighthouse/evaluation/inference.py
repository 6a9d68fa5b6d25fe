"""Load the trained model of a checkpoint without a trainer, for evaluation and export."""

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from ..checkpoints.folders import METADATA_FILE, Condition, checkpoints_in
from ..checkpoints.model_folder import model_arguments_of
from ..checkpoints.record import CheckpointRecord, read_record
from ..checkpoints.resume import scaled_at
from ..checkpoints.storage import check_shapes, in_one_process, load_state
from ..checks.configuration import check_model
from ..data.tokenizer import build_tokenizer
from ..errors import UserValueError
from ..job_config import JobConfig, LighthouseConfigManager
from ..model.flavors import flavors
from ..model.model import LighthouseModelArgs, LighthouseTransformer, leave_out_math_backend
from ..stages import stage_at, stages_of, with_method_of

# Keys that name Python code to import. A checkpoint may come from anyone, so such keys in its
# record are ignored. A user can still pass them.
NAMES_CODE = ("custom_config_module", "custom_args_module", "custom_import")


@dataclass
class TrainedModel:
    """A trained model with its tokenizer and configuration.

    Attributes:
        model: maps tokens [B, N] to logits [B, N, vocabulary]. It is in evaluation mode and under
            dense attention, which ``use_attention("lighthouse")`` changes.
        path: the step-N folder.
        record: what the trainer recorded; None if another trainer wrote the checkpoint.
    """

    model: LighthouseTransformer
    tokenizer: BaseTokenizer
    config: JobConfig
    path: Path
    record: CheckpointRecord | None


def find_checkpoint(path: str | Path) -> Path:
    """The step-N folder at ``path``, or the last complete one below it.

    Args:
        path: a step-N folder, a checkpoint folder, or a run's ``job.dump_folder``.

    Raises:
        ValueError: there is no complete checkpoint.
    """
    path = Path(path)
    if (path / METADATA_FILE).is_file():
        return path
    for folder in (path, path / "checkpoint"):
        found = checkpoints_in(folder).values()
        sound = [each for each in found if each.condition is not Condition.CUT_OFF]
        if sound and sound[-1].condition is Condition.WITHOUT_METADATA:
            raise UserValueError(
                f"{sound[-1].path} has no file {METADATA_FILE}; restore it, or pass the step-N "
                "folder to read"
            )
        if sound:
            return _in_dcp_format(sound[-1].path)
    if any(path.glob("*.safetensors")):
        return _in_dcp_format(path)
    raise UserValueError(
        f"{path} holds no complete checkpoint; pass a step-N folder, a folder of them, or a run's "
        "job.dump_folder"
    )


def checked_device(device: str | None) -> str:
    """The device to evaluate on: ``device``, or a GPU if there is one.

    Raises:
        ValueError: ``device`` is neither the CPU nor a GPU that torch finds.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or device.endswith(":") or (number and not number.isdigit()):
        raise UserValueError(f"--device {device} is not known; use cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(number or 0) >= count:
        raise UserValueError(
            f"--device {device}: torch finds {count} CUDA devices; use --device cpu"
        )
    return device


def labels_of(paths: list[Path]) -> list[str]:
    """Short names that tell checkpoints apart: run and step, or the whole path."""
    short = [f"{run_of(path).name}, {path.name.replace('-', ' ')}" for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a step-N folder."""
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoint" else folder


def _in_dcp_format(path: Path) -> Path:
    if not (path / METADATA_FILE).is_file():
        raise UserValueError(
            f"{path} is in Hugging Face's format; lighthouse import-hf makes a checkpoint of it"
        )
    return path


def load_trained_model(
    path: str | Path,
    overrides: list[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    max_seq_len: int | None = None,
    masks: bool = False,
) -> TrainedModel:
    """Build the model of a checkpoint and load its weights.

    Args:
        path: as in ``find_checkpoint``.
        overrides: flags of the trainer, ``--section.key value``, which win over the configuration
            in the checkpoint's record. A checkpoint without a record needs
            ``--job.config_file FILE`` or the like.
        max_seq_len: longest sequence that the model will see; default: the ``training.seq_len`` it
            was trained with.
        masks: whether the caller passes documents to the model. If not, a warning says that a run
            had masks.

    Raises:
        ValueError, TypeError, OSError: there is no such checkpoint, or the configuration describes
            another model.
    """
    path = find_checkpoint(path)
    record = read_record(path)
    config, args = read_configuration(path, record, overrides or [])
    if config.training.document_mask and not masks:
        logger.warning(
            f"{path} was trained with training.document_mask = true; here each sequence is one "
            "document, and nothing is masked"
        )
    args.max_seq_len = max_seq_len or args.max_seq_len
    with torch.device("meta"):
        model = LighthouseTransformer(args)
    model.to_empty(device=device)
    if args.tied:
        model.tie()
    with torch.device(device):
        model.freqs_cis = model._precompute_freqs_cis()
    if model.freqs_cis.is_cuda:
        leave_out_math_backend(model)
    state = model.state_dict()
    check_shapes(path, state)
    with in_one_process():
        load_state(state, path, no_dist=True)
    model.to(dtype).eval().requires_grad_(False)
    model.use_attention("dense")
    return TrainedModel(model, build_tokenizer(config), config, path, record)


def recorded_config(path: str | Path, overrides: list[str] | None = None) -> JobConfig:
    """The configuration that ``load_trained_model`` would use, with nothing loaded.

    Raises:
        ValueError, TypeError, OSError: as ``load_trained_model``.
    """
    path = find_checkpoint(path)
    return read_configuration(path, read_record(path), overrides or [])[0]


def logits_at(model: LighthouseTransformer, tokens: torch.Tensor, positions: slice) -> torch.Tensor:
    """Logits [B, positions, vocabulary] for tokens [B, N]; no others are computed."""
    with without_output(model) as output:
        hidden = model(tokens)
    return output(hidden[:, positions])


@contextmanager
def without_output(model: LighthouseTransformer) -> Generator[nn.Module, None, None]:
    """Let the model return hidden states, and yield its output projection."""
    output = model.output
    # pyrefly: ignore[bad-assignment]  torchtitan's forward skips an output that is None.
    model.output = None
    try:
        yield output
    finally:
        model.output = output


def read_configuration(
    path: Path, record: CheckpointRecord | None, overrides: list[str]
) -> tuple[JobConfig, LighthouseModelArgs]:
    """The configuration of a checkpoint's run, and the arguments of its model.

    Args:
        path: a step-N folder, which messages name.
        overrides: as in ``load_trained_model``.

    Raises:
        ValueError, TypeError, OSError: there is no configuration, or it breaks a rule.
    """
    if record is None and not overrides:
        raise UserValueError(
            f"{path} has no record of its configuration, as it was not written by Lighthouse's "
            "trainer; pass that of its run with --job.config_file FILE"
        )
    recorded = record.config if record else None
    scheduled = (recorded or {}).get("lighthouse", {}).get("schedule")
    if record and scheduled:
        # The method is that of the last steps that used it, at whatever length.
        config = with_method_of(parse_over(record.config, []), record.last_lighthouse_step or 1)
        recorded = scaled_at(record.config, record.step)
        recorded = {**recorded, "lighthouse": dataclasses.asdict(config.lighthouse)}
    if recorded and recorded.get("model", {}).get("hf_folder"):
        # The folder may have changed or gone since, and the checkpoint has a copy of what it said.
        recorded = {**recorded, "model": {**recorded["model"], "hf_folder": str(path)}}
    config = parse_over(recorded, overrides)
    _use_scaling_of_last_step(config, path, record)
    return config, model_arguments(config)


def _use_scaling_of_last_step(
    config: JobConfig, path: Path, record: CheckpointRecord | None
) -> None:
    """Give ``config`` the scaling of the checkpoint's stage, if it has a schedule with its own.

    It then comes from a file or an argument, as the record's has been dealt with.

    Raises:
        ValueError: nothing says which stage the checkpoint is of, or the model was scaled before.
    """
    stages = stages_of(config)
    if not any(stage.has_own_scaling for stage in stages):
        return
    if record is None or config.model.rope_scaling not in ("", "none"):
        raise UserValueError(
            f"lighthouse.schedule scales the rotary embedding in a later stage, and {path} "
            + ("does not say which stage it is of" if record is None else "has its scaling already")
            + "; pass --lighthouse.schedule none, and the checkpoint's scaling as "
            "--model.rope_scaling, such as 'yarn factor=12 original_max_position_embeddings=8192'"
        )
    config.model.rope_scaling = stage_at(record.step or 1, stages).config.model.rope_scaling
    config.lighthouse = with_method_of(config, record.last_lighthouse_step or 1).lighthouse


def parse_over(recorded: dict[str, Any] | None, overrides: list[str]) -> JobConfig:
    """Apply ``overrides`` to the file that they name, or else to a recorded configuration.

    Raises:
        ValueError, TypeError, OSError: a value breaks a rule.
    """
    return _RecordedConfigManager(recorded).parse_args(overrides)


def model_arguments(config: JobConfig) -> LighthouseModelArgs:
    """The arguments of the model that ``config`` describes, set so that it returns logits.

    Raises:
        ValueError, TypeError: ``config`` breaks a rule.
    """
    check_model(config, flavors)
    args = model_arguments_of(config)
    args.update_from_config(config)
    args.chunked_loss = False
    return args


class _RecordedConfigManager(LighthouseConfigManager):
    """Parses the command line over a recorded configuration, or over the file it names."""

    def __init__(self, recorded: dict[str, Any] | None) -> None:
        super().__init__()
        self.recorded = {
            section: {key: value for key, value in values.items() if key not in NAMES_CODE}
            for section, values in (recorded or {}).items()
        }

    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
        return super()._maybe_load_toml(args) or self.recorded
