"""Hugging Face's format of a model: config.json, tensors and tokenizer."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from ..console import duration
from ..data.tokenizer import ByteTokenizer, save_hugging_face_tokenizer
from ..errors import UserValueError
from ..model.architecture import (
    CONFIG_FILE,
    GENERATION_FILE,
    architecture,
    differences,
    known_entries,
    read_description,
    read_object,
)
from ..model.model import LighthouseModelArgs, LighthouseTransformer
from ..model.rope_scaling import LENGTH, NO_SCALING
from ..model.state_dict_adapter import LighthouseStateDictAdapter

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def time_left(start: float, number: int, count: int) -> str:
    """The end of a line of progress: the time that the other files take; nothing after the last.

    Args:
        start: ``time.monotonic()`` before the first file.
        number: files that are done, of ``count``.
    """
    seconds = (time.monotonic() - start) / number * (count - number)
    return f", {duration(seconds)} left" if number < count else ""


def require_safetensors() -> None:
    """Check that weights can be read and written.

    Raises:
        ValueError: safetensors is missing; the message says how to install it.
    """
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise UserValueError(
            "safetensors, the format of Hugging Face's weights, is not installed; run pip install "
            "'lighthouse-attention[export]', or pip install -e '.[export]' in a clone"
        ) from None


def model_state(args: LighthouseModelArgs) -> dict[str, torch.Tensor]:
    """The state dict of a model as checkpoints hold it, on the meta device."""
    with torch.device("meta"):
        return LighthouseTransformer(dataclasses.replace(args, chunked_loss=False)).state_dict()


def adapter(args: LighthouseModelArgs) -> LighthouseStateDictAdapter:
    """Converts between our tensors and Hugging Face's, which permute rows of queries and keys."""
    return LighthouseStateDictAdapter(args, None)


def special_ids(tokenizer: BaseTokenizer) -> dict[str, int | None]:
    """Ids of the special tokens; None for one that the tokenizer lacks."""
    return {
        f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")
    }


def write_configuration(
    folder: Path,
    args: LighthouseModelArgs,
    tokenizer: BaseTokenizer,
    dtype: torch.dtype,
    described: Path | None = None,
) -> None:
    """Write ``config.json`` and ``generation_config.json`` for a model of ``args``.

    The keys are those of transformers 4.43 and later; 5 reads them too.

    Args:
        described: the folder that describes the model. Its entries are written as they are, but
            for those in which the model now differs.
    """
    ids = special_ids(tokenizer)
    generation: dict[str, Any] = {name: token for name, token in ids.items() if token is not None}
    if described is None:
        config = {
            "architectures": [args.causal_model],
            **architecture(args),
            "max_position_embeddings": _length(args),
            "attention_dropout": 0.0,
            "torch_dtype": str(dtype).removeprefix("torch."),
            # Missing ids are written as null, because transformers would assume others.
            **ids,
        }
    else:
        config = updated(read_description(described), args, dtype)
        given = described / GENERATION_FILE
        generation = read_object(given) if given.is_file() else {}
    for name, content in ((CONFIG_FILE, config), (GENERATION_FILE, generation)):
        if content:
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _length(args: LighthouseModelArgs) -> int:
    """The number of positions that a model is made for."""
    if args.rope_scaling["rope_type"] == "yarn":
        # transformers 4 takes the quotient of the two lengths for the factor.
        return round(args.rope_scaling["factor"] * args.rope_scaling[LENGTH])
    return args.max_seq_len


def updated(
    description: dict[str, Any], args: LighthouseModelArgs, dtype: torch.dtype
) -> dict[str, Any]:
    """A description with the base, scaling, length and dtype that its model has now.

    An entry keeps its name and its value where that is still true. The length only grows.
    """
    known = known_entries(description, CONFIG_FILE)
    changed = {name: ours for name, (_, ours) in differences(known, args).items()}
    new = dict(description)
    for name in ("dtype", "torch_dtype"):
        if name in new:
            new[name] = str(dtype).removeprefix("torch.")
    length = known["max_position_embeddings"]
    if args.rope_scaling["rope_type"] != "yarn":
        length = max(length, _length(args))
    elif "rope_scaling" in changed:
        length = _length(args)
    if length != known["max_position_embeddings"]:
        new["max_position_embeddings"] = length
    if not changed:
        return new
    assert changed.keys() <= {"rope_theta", "rope_scaling"}
    # This entry would win over the one in the table.
    new.pop(LENGTH, None)
    scaling = None if args.rope_scaling == NO_SCALING else dict(args.rope_scaling)
    if new.get("rope_parameters") and not new.get("rope_scaling"):
        new["rope_parameters"] = {**args.rope_scaling, "rope_theta": args.rope_theta}
        for name in ("rope_theta", "rope_scaling"):
            new.pop(name, None)
        return new
    new.pop("rope_parameters", None)
    return new | {"rope_theta": args.rope_theta, "rope_scaling": scaling}


def write_tokenizer(folder: Path, tokenizer: BaseTokenizer, assets: str) -> None:
    """Write the files from which ``transformers.AutoTokenizer`` reads the tokenizer of a run.

    Args:
        assets: the run's ``model.hf_assets_path``. Files are copied from it unless the tokenizer
            is the built-in one.
    """
    if isinstance(tokenizer, ByteTokenizer):
        save_hugging_face_tokenizer(folder)
        return
    for name in TOKENIZER_FILES:
        if Path(assets, name).is_file():
            shutil.copy(Path(assets, name), folder / name)
    if not (folder / "tokenizer.json").is_file():
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    if not (folder / "tokenizer_config.json").is_file():
        # Without this file, AutoTokenizer would derive the tokenizer's type from the model's.
        content = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(output: str | Path) -> Generator[Path, None, None]:
    """Yield a folder to fill; it becomes ``output`` if all goes well and is deleted if not.

    Raises:
        ValueError: ``output`` is there and is not an empty folder.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserValueError(
            f"{output} is there already and is not overwritten; name a new folder, or move that "
            "one away"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        folder = Path(temporary, output.name)
        folder.mkdir()
        yield folder
        folder.replace(output)
