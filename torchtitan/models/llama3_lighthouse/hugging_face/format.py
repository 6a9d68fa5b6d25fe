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
from ..model.model import LighthouseModelArgs, LighthouseTransformer
from ..model.state_dict_adapter import LighthouseStateDictAdapter

CONFIG_FILE = "config.json"
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


def architecture(args: LighthouseModelArgs) -> dict[str, Any]:
    """The entries of ``config.json`` that say what a model computes."""
    scaling = args.rope_scaling_args
    return {
        "model_type": "llama",
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": model_state(args)["layers.0.feed_forward.w1.weight"].shape[0],
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
        "head_dim": args.dim // args.n_heads,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "rope_theta": float(args.rope_theta),
        # torchtitan scales the frequencies at every length, as Llama 3.1 does.
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": scaling.scaling_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def special_ids(tokenizer: BaseTokenizer) -> dict[str, int | None]:
    """Ids of the special tokens; None for one that the tokenizer lacks."""
    return {
        f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")
    }


def write_configuration(
    folder: Path, args: LighthouseModelArgs, tokenizer: BaseTokenizer, dtype: torch.dtype
) -> None:
    """Write ``config.json`` and ``generation_config.json`` for a model of ``args``.

    The keys are those of transformers 4.43 and later; 5 reads them too.
    """
    ids = special_ids(tokenizer)
    config = {
        "architectures": ["LlamaForCausalLM"],
        **architecture(args),
        "max_position_embeddings": args.max_seq_len,
        "attention_dropout": 0.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Missing ids are written as null, because transformers would assume others.
        **ids,
    }
    given = {name: token for name, token in ids.items() if token is not None}
    for name, content in ((CONFIG_FILE, config), ("generation_config.json", given)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def read_architecture(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the ``config.json`` of a folder.

    Returns:
        Everything in it, and the entries that ``architecture`` gives for our models. Entries that
        are not there have the values that transformers gives them.

    Raises:
        ValueError: there is no such file, or it does not describe a Llama.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserValueError(
            f"{folder} holds no {CONFIG_FILE}; pass a folder in Hugging Face's format, as "
            "lighthouse export-hf or save_pretrained of transformers write it"
        )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except json.JSONDecodeError as error:
        raise UserValueError(f"{folder / CONFIG_FILE} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserValueError(f"{folder / CONFIG_FILE} must hold an object, got {str(config)[:50]}")
    if config.get("model_type") != "llama":
        raise UserValueError(
            f"{folder} is a model of type '{config.get('model_type')}', not 'llama'; pass a Llama, "
            "because no other model can be trained here"
        )
    # transformers 5 keeps everything about RoPE in one table, transformers 4 in two entries.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserValueError(
            f"{folder / CONFIG_FILE}: rope_scaling must be an object, got {rope!r}"
        )
    rope = {"rope_type": rope.get("type", "default"), **rope}
    theta = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    rope.pop("type", None)
    heads = config.get("num_attention_heads")
    known = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **config,
        "rope_theta": float(theta),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config.get("hidden_size", 0) // (heads or 1),
    }
    return config, known


def differences(
    args: LighthouseModelArgs, known: dict[str, Any]
) -> dict[str, tuple[object, object]]:
    """Entries in which a folder's architecture differs from that of ``args``: (folder's, ours)."""
    return {
        key: (known.get(key), value)
        for key, value in architecture(args).items()
        if known.get(key) != value
    }


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
