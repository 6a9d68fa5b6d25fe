"""A trained model out of a checkpoint, without a trainer: for evaluation and export."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from lighthouse.scoring import SDPA_BACKENDS

from . import flavors
from .checkpoint import CheckpointRecord, check_shapes, checkpoints_in, read_record
from .checks import check_model
from .job_config import JobConfig, LighthouseConfigManager
from .model import LighthouseTransformer
from .tokenizer import build_tokenizer


@dataclass
class TrainedModel:
    model: LighthouseTransformer
    """In evaluation mode, under dense attention; ``set_stage("lighthouse")`` turns Lighthouse on.
    Maps tokens [B, N] to logits [B, N, vocabulary]."""
    tokenizer: BaseTokenizer
    config: JobConfig
    path: Path
    record: CheckpointRecord | None
    """None if the checkpoint has none, as one of torchtitan's own trainer."""


def find_checkpoint(path: str | Path) -> Path:
    """The step-N folder that ``path`` is, or the last complete one below it.

    Args:
        path: a step-N folder, a checkpoint folder, or a run's ``job.dump_folder``.

    Raises:
        ValueError: there is no complete checkpoint.
    """
    path = Path(path)
    if (path / ".metadata").is_file():
        return path
    for folder in (path, path / "checkpoint"):
        complete = [step for step, whole in checkpoints_in(folder).values() if whole]
        if complete:
            return complete[-1]
    raise ValueError(
        f"{path} holds no complete checkpoint; pass a step-N folder, a folder of them, or a run's "
        "job.dump_folder"
    )


def recorded_config(path: str | Path, overrides: list[str] | None = None) -> JobConfig:
    """The configuration that ``load_trained_model`` would use, with nothing loaded.

    Raises:
        ValueError, TypeError, OSError: as ``load_trained_model``.
    """
    path = find_checkpoint(path)
    config = _configuration(path, read_record(path), overrides or [])
    check_model(config, flavors)
    return config


def load_trained_model(
    path: str | Path,
    overrides: list[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    max_seq_len: int | None = None,
) -> TrainedModel:
    """Build the model that a checkpoint is of, and load its weights.

    Args:
        path: as in ``find_checkpoint``.
        overrides: flags of the trainer, ``--section.key value``, which win over the configuration
            in the checkpoint's record; a checkpoint without a record needs
            ``--job.config_file FILE`` or the like.
        max_seq_len: longest sequence it will see; default: the ``training.seq_len`` it was
            trained with.

    Raises:
        ValueError, TypeError, OSError: there is no such checkpoint, or it is of another model than
            the configuration says.
    """
    path = find_checkpoint(path)
    record = read_record(path)
    config = _configuration(path, record, overrides or [])
    check_model(config, flavors)
    args = dataclasses.replace(flavors[config.model.flavor])
    args.update_from_config(config)
    # A caller wants logits.
    args.chunked_loss = False
    args.max_seq_len = max_seq_len or args.max_seq_len
    with torch.device("meta"):
        model = LighthouseTransformer(args)
    model.to_empty(device=device)
    with torch.device(device):
        model.freqs_cis = model._precompute_freqs_cis()
    for module in model.modules():
        if isinstance(module, ScaledDotProductAttentionWrapper) and model.freqs_cis.is_cuda:
            module.sdpa_backends = SDPA_BACKENDS
    state = model.state_dict()
    check_shapes(path, state)
    dcp.load(state, checkpoint_id=str(path), no_dist=True)
    model.to(dtype).eval().requires_grad_(False)
    model.set_stage("dense")
    return TrainedModel(model, build_tokenizer(config), config, path, record)


class _RecordedConfigManager(LighthouseConfigManager):
    """Parses the command line over a recorded configuration, or over the file it names."""

    def __init__(self, recorded: dict[str, Any] | None) -> None:
        super().__init__()
        self.recorded = recorded

    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
        return super()._maybe_load_toml(args) or self.recorded


def _configuration(path: Path, record: CheckpointRecord | None, overrides: list[str]) -> JobConfig:
    if record is None and not overrides:
        raise ValueError(
            f"{path} has no record of its configuration, as it was not written by Lighthouse's "
            "trainer; pass that of its run with --job.config_file FILE"
        )
    return _RecordedConfigManager(record and record.config).parse_args(overrides)
