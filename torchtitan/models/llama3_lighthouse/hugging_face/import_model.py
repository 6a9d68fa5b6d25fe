"""Make a checkpoint of step 0 out of a model in Hugging Face's format, to train on from."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer

from ..checkpoints.checksums import write_checksums
from ..checkpoints.folders import SEALED_FILES
from ..checkpoints.model_folder import (
    files_to_keep,
    model_arguments_of,
    named_model,
    write_files,
)
from ..checkpoints.record import CheckpointRecord, write_record
from ..checkpoints.storage import in_one_process
from ..data.tokenizer import build_tokenizer
from ..errors import UserValueError
from ..evaluation.inference import model_arguments, parse_over
from ..job_config import BYTE_TOKENIZER_FOLDER, JobConfig
from ..model.architecture import CONFIG_FILE, differences, known_entries, read_description
from ..model.flavors import flavors
from ..model.model import LighthouseModelArgs
from .format import (
    DTYPES,
    INDEX_FILE,
    WEIGHTS_FILE,
    adapter,
    model_state,
    new_folder,
    require_safetensors,
    time_left,
    write_tokenizer,
)

TOKENIZER_FOLDER = "tokenizer"
# A model whose two are tied may have one or both in its files.
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def import_model(
    folder: str | Path,
    output: str | Path,
    overrides: list[str] | None = None,
    dtype: torch.dtype | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Write ``output``/checkpoint/step-0, which a run with that ``job.dump_folder`` starts from.

    All weights are in memory at once.

    Args:
        folder: ``config.json`` of a model that can be trained here, and its weights as safetensors.
        output: a folder that is empty or not there.
        overrides: flags of the trainer, ``--section.key value``, for the checkpoint's record. They
            win over the file that --job.config_file names. Without such a file they win over a
            dense configuration with the folder's model, length and tokenizer.
        dtype: dtype of the weights; None leaves them as they are stored.

    Returns:
        The step-0 folder.

    Raises:
        ValueError, TypeError, OSError: safetensors is missing; the folder holds no such model, or
            does not fit the configuration; or ``output`` is in use.
    """
    require_safetensors()
    folder, output = Path(folder).resolve(), Path(output).resolve()
    with new_folder(output) as temporary:
        known = known_entries(read_description(folder), str(folder / CONFIG_FILE))
        flavor = matching_flavor(known)
        overrides = overrides or []
        own = _own_configuration(folder, output, flavor, known)
        config = parse_over(own, overrides)
        _check_same(config, own["model"]["flavor"], folder, known)
        args = model_arguments(config)
        tokenizer = build_tokenizer(config)
        kind = config.lighthouse.tokenizer
        of_a_flavor = f" of model.flavor '{flavor}'" if flavor else ""
        report(f"{folder} is a model{of_a_flavor}, lighthouse.tokenizer '{kind}'")
        state = _read_weights(folder, args, dtype, report)
        if config.model.hf_assets_path == str(folder):
            # The run needs its tokenizer when the folder has gone.
            (temporary / TOKENIZER_FOLDER).mkdir()
            write_tokenizer(temporary / TOKENIZER_FOLDER, tokenizer, str(folder))
            config.model.hf_assets_path = str(output / TOKENIZER_FOLDER)
        step = temporary / "checkpoint" / "step-0"
        write_record(step, CheckpointRecord(0, 0, config.to_dict()))
        write_files(step, files_to_keep(config))
        report("writing the checkpoint")
        with in_one_process():
            dcp.save(state, checkpoint_id=str(step), no_dist=True)
        write_checksums(step, SEALED_FILES)
    return output / "checkpoint" / "step-0"


def matching_flavor(known: dict[str, Any]) -> str | None:
    """The flavor that computes the same as a folder's model; ``known`` is its architecture."""
    return next((name for name, args in flavors.items() if not differences(known, args)), None)


def _check_same(config: JobConfig, own_flavor: str, folder: Path, known: dict[str, Any]) -> None:
    """Check that a configuration is of the folder's model; base and scaling may be others.

    Args:
        own_flavor: ``model.flavor`` as it is unless the user gives another.
    """
    if config.model.flavor != own_flavor:
        # It was given to be read.
        config.model.hf_folder = ""
    apart = differences(known, model_arguments_of(config))
    for key in ("rope_theta", "rope_scaling"):
        if getattr(config.model, key):
            apart.pop(key, None)
    if not apart:
        return
    listed = "; ".join(f"{key} is {theirs}, not {ours}" for key, (theirs, ours) in apart.items())
    raise UserValueError(
        f"{named_model(config)} but {folder} is another model: {listed}; leave model.flavor out, "
        f"or pass --model.hf_folder {folder}"
    )


def _own_configuration(
    folder: Path, output: Path, flavor: str | None, known: dict[str, Any]
) -> dict[str, Any]:
    """A configuration, by section, for a dense model as ``config.json`` describes it."""
    config = JobConfig()
    config.job.dump_folder = str(output)
    config.model.hf_folder = str(folder)
    if flavor:
        config.model.flavor = flavor
    # Even the smallest pyramid takes an even length.
    length = known["max_position_embeddings"]
    config.training.seq_len = max(4, length - length % 2)
    section = config.lighthouse
    section.stage = "dense"
    section.dense_layers = list(range(known["num_hidden_layers"]))
    # No layer has a pyramid.
    section.levels = section.pooling_factor = section.top_k = section.picks_per_stratum = 2
    if not _has_byte_tokenizer(folder):
        section.tokenizer = "hf"
        config.model.hf_assets_path = str(folder)
    return config.to_dict()


def _has_byte_tokenizer(folder: Path) -> bool:
    """Whether a folder has the built-in tokenizer; one without any counts too."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return not any((folder / name).is_file() for name in ("vocab.json", "vocab.txt"))
    try:
        vocabulary = Tokenizer.from_file(str(file)).get_vocab()
    # The library raises no narrower exception.
    except Exception as error:
        raise UserValueError(f"{file} is no tokenizer: {error}; mend or remove it") from None
    own = Tokenizer.from_file(str(Path(BYTE_TOKENIZER_FOLDER, "tokenizer.json")))
    return vocabulary == own.get_vocab()


def _read_weights(
    folder: Path,
    args: LighthouseModelArgs,
    dtype: torch.dtype | None,
    report: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """Read a folder's weights as our state dict."""
    from safetensors import SafetensorError, safe_open

    expected = adapter(args).to_hf(model_state(args))
    found: dict[str, torch.Tensor] = {}
    output = None
    files, start = _weight_files(folder), time.monotonic()
    for number, file in enumerate(files, 1):
        try:
            opened = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise UserValueError(
                f"{file} is broken: {error}; download or export it again"
            ) from None
        with opened:
            names = [name for name in opened.keys() if "rotary_emb.inv_freq" not in name]
            for name in names:
                tensor = opened.get_tensor(name)
                if args.tied and name == OUTPUT:
                    output = tensor
                    continue
                _check_tensor(file, name, tensor, expected, args.model_type)
                found[name] = tensor.to(dtype or tensor.dtype)
        report(
            f"{file.name} ({number} of {len(files)}): {len(names)} tensors"
            f"{time_left(start, number, len(files))}"
        )
    if missing := sorted(expected.keys() - found.keys()):
        raise UserValueError(
            f"{folder} lacks {len(missing)} tensors of a model of type '{args.model_type}', "
            f"'{missing[0]}' among them; is a file of weights missing?"
        )
    if output is not None and not torch.equal(output.to(dtype or output.dtype), found[EMBEDDING]):
        raise UserValueError(
            f"{folder}: tie_word_embeddings = true in {CONFIG_FILE}, but '{OUTPUT}' differs from "
            f"'{EMBEDDING}'; set it to false if the model has both, or remove '{OUTPUT}'"
        )
    return {name: tensor.contiguous() for name, tensor in adapter(args).from_hf(found).items()}


def _check_tensor(
    file: Path,
    name: str,
    tensor: torch.Tensor,
    expected: dict[str, torch.Tensor],
    family: str,
) -> None:
    if name not in expected:
        raise UserValueError(
            f"{file} holds '{name}', which a model of type '{family}' does not have; pass the "
            "folder of another model"
        )
    if tensor.shape != expected[name].shape:
        raise UserValueError(
            f"{file}: '{name}' has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)} "
            f"as {CONFIG_FILE} says; correct {CONFIG_FILE}, or pass the weights that belong to it"
        )
    if tensor.dtype not in DTYPES.values():
        raise UserValueError(
            f"{file}: '{name}' is stored as {tensor.dtype}; save the model in one of "
            f"{', '.join(DTYPES)} first"
        )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    files = _indexed_files(index) if index.is_file() else [folder / WEIGHTS_FILE]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserValueError(
            f"{folder} holds no {missing[0]}; weights must be safetensors, as save_pretrained of "
            "transformers writes them"
        )
    return files


def _indexed_files(index: Path) -> list[Path]:
    """The files beside ``index`` that it names.

    Raises:
        ValueError: it cannot be read, or names something that does not lie beside it.
    """
    advice = "download or export it again"
    try:
        whole = json.loads(index.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserValueError(f"{index} is not JSON: {error}; {advice}") from None
    entries = whole.get("weight_map") if isinstance(whole, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise UserValueError(
            f"{index} has no 'weight_map' that says which file holds each tensor; {advice}"
        )
    for tensor, name in entries.items():
        if not isinstance(name, str) or not _lies_beside(name):
            raise UserValueError(
                f"{index} says that '{tensor}' is in {name!r}, which is no name of a file beside "
                f"it; {advice}"
            )
    return [index.parent / name for name in sorted(set(entries.values()))]


def _lies_beside(name: str) -> bool:
    """Whether a name is a file's alone, without a folder that leads elsewhere."""
    return name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)
