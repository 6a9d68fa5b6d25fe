"""A model's architecture as ``config.json`` of Hugging Face's format describes it.

What such a file says is called a description here. ``described_arguments`` makes a model's
arguments of it, and ``architecture`` says in the same words what arguments compute.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserValueError
from ..job_config import Model
from .families import FAMILIES
from .flavors import flavors
from .model import LighthouseModelArgs
from .rope_scaling import LENGTH, NO_SCALING, checked_scaling, parse_scaling

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
# The files of a folder that a run keeps for its export.
DESCRIPTION_FILES = (CONFIG_FILE, GENERATION_FILE)

COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
NO_WINDOW = (
    "pass a checkpoint without a window, or set sliding_window to null and use_sliding_window to "
    "false if the model was trained dense"
)
# Entries that change what a model computes -> the values that change nothing, and advice. An entry
# that is not there, or null, changes nothing either.
PLAIN: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((False,), "pass a model whose attention has no biases"),
    "mlp_bias": ((False,), "pass a model whose feed-forward layers have no biases"),
    "hidden_act": (("silu", "swish"), "pass a model with SwiGLU, as Llama has"),
    "sliding_window": ((), NO_WINDOW),
    "use_sliding_window": ((False,), NO_WINDOW),
    "qk_norm": ((False,), "pass a model that does not norm queries and keys"),
    "use_qk_norm": ((False,), "pass a model that does not norm queries and keys"),
    "qk_layernorm": ((False,), "pass a model that does not norm queries and keys"),
    "attention_dropout": ((0,), "set it to 0, because this trainer has no dropout"),
    "rope_interleaved": ((False,), "convert the weights to Llama's order of columns first"),
    "partial_rotary_factor": ((1,), "pass a model that rotates whole heads"),
    "quantization_config": ((), "pass the weights before their quantization"),
}


def read_description(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder.

    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UserValueError(
            f"{folder} holds no {CONFIG_FILE}; pass a folder in Hugging Face's format, as "
            "lighthouse export-hf or save_pretrained of transformers write it"
        )
    return read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserValueError(f"{file} is not JSON: {error}; download or export it again") from None
    if not isinstance(content, dict):
        raise UserValueError(
            f"{file} must hold an object, got {str(content)[:50]}; download or export it again"
        )
    return content


def known_entries(description: dict[str, Any], name: str) -> dict[str, Any]:
    """The entries of ``architecture`` as a description gives them, and max_position_embeddings.

    Args:
        name: how messages name the description, such as its file.

    Raises:
        ValueError: it is of a model that cannot be trained here, or contradicts itself; the message
            names the entry, its value and what to do.
    """
    kind = description.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserValueError(
            f"{name}: model_type = {kind!r} cannot be trained here; pass a model whose type is "
            f"{' or '.join(map(repr, FAMILIES))}"
        )
    family = FAMILIES[kind]
    # Null is no value, and no default either.
    known = {k: v for k, v in {**family.defaults, **description}.items() if v is not None}
    if missing := [key for key in LighthouseModelArgs.defaults if key not in known]:
        raise UserValueError(f"{name}: {missing[0]} must not be null; correct it")
    if family.has_window_switch and known.get("use_sliding_window") is False:
        known.pop("sliding_window", None)
    _check_plain(known, {**PLAIN, **family.plain}, name)
    heads = known["num_attention_heads"]
    known.setdefault("num_key_value_heads", heads)
    _check_counts(known, name)
    known.setdefault("head_dim", known["hidden_size"] // heads)
    _check_heads(known, name)
    eps = known["rms_norm_eps"]
    if not isinstance(eps, float | int) or isinstance(eps, bool) or not 0 < eps < 1:
        raise UserValueError(
            f"{name}: rms_norm_eps = {eps!r} must be a number between 0 and 1; correct it"
        )
    if not isinstance(known["tie_word_embeddings"], bool):
        raise UserValueError(
            f"{name}: tie_word_embeddings = {known['tie_word_embeddings']!r} must be true or "
            "false; correct it"
        )
    theta, scaling = _rope(known, name)
    kept = {key: known[key] for key in (*COUNTS, "rms_norm_eps", "tie_word_embeddings")}
    return {"model_type": family.model_type} | kept | {"rope_theta": theta, "rope_scaling": scaling}


def _check_plain(
    known: dict[str, Any], plain: Mapping[str, tuple[tuple[Any, ...], str]], name: str
) -> None:
    for key, (values, advice) in plain.items():
        if key in known and known[key] not in values:
            raise UserValueError(f"{name}: {key} = {known[key]!r} cannot be trained here; {advice}")
    layers = known.get("layer_types") or []
    if not isinstance(layers, list):
        raise UserValueError(f"{name}: layer_types = {layers!r} must be a list; correct it")
    if other := next((each for each in layers if each != "full_attention"), None):
        raise UserValueError(
            f"{name}: layer_types has {other!r}, which cannot be trained here; pass a model whose "
            "layers are all 'full_attention'"
        )


def _check_counts(known: dict[str, Any], name: str) -> None:
    for key in COUNTS:
        # A feed-forward layer of width 1 is none, and a head needs a pair of columns.
        least = 2 if key in ("intermediate_size", "head_dim") else 1
        if key in known and (type(known[key]) is not int or known[key] < least):
            raise UserValueError(
                f"{name}: {key} = {known[key]!r} must be a whole number of at least {least}; "
                "correct it"
            )


def _check_heads(known: dict[str, Any], name: str) -> None:
    heads, groups = known["num_attention_heads"], known["num_key_value_heads"]
    if heads % groups:
        raise UserValueError(
            f"{name}: num_key_value_heads = {groups} must divide num_attention_heads = {heads}; "
            "correct it"
        )
    if known["head_dim"] % 2 or known["head_dim"] < 2:
        raise UserValueError(
            f"{name}: head_dim = {known['head_dim']} must be an even number, because rotary "
            "embedding turns pairs of columns; pass another model"
        )


def _rope(known: dict[str, Any], name: str) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary embedding; None where nothing is scaled.

    transformers 5 keeps both in one table, transformers 4 in two entries.
    """
    table = known.get("rope_scaling") or known.get("rope_parameters") or {}
    key = "rope_scaling" if known.get("rope_scaling") else "rope_parameters"
    if not isinstance(table, dict):
        raise UserValueError(f"{name}: {key} must be an object, got {table!r}; correct it")
    table = {key: value for key, value in table.items() if value is not None}
    kind = table.pop("type", "default")
    table.setdefault("rope_type", kind)
    theta = table.pop("rope_theta", known.get("rope_theta", 10000.0))
    number = isinstance(theta, float | int) and not isinstance(theta, bool)
    if not number or not 1 < theta <= sys.float_info.max:
        raise UserValueError(f"{name}: rope_theta = {theta!r} must be a number above 1; correct it")
    if (share := table.pop("partial_rotary_factor", 1)) != 1:
        raise UserValueError(
            f"{name}: partial_rotary_factor = {share!r} of {key} must be 1; "
            f"{PLAIN['partial_rotary_factor'][1]}"
        )
    length = known.get(LENGTH, known["max_position_embeddings"])
    if LENGTH in known and table["rope_type"] in ("llama3", "yarn"):
        table[LENGTH] = length
    scaling = checked_scaling(table, length, f"{name}: {key}")
    return float(theta), None if scaling == NO_SCALING else scaling


def described_arguments(
    section: Model, description: dict[str, Any] | None, name: str = ""
) -> LighthouseModelArgs:
    """A model's arguments: those of a description, or of the flavor where there is none.

    ``rope_theta`` and ``rope_scaling`` of the configuration win over both.

    Args:
        name: how messages name the description.

    Raises:
        ValueError: as ``known_entries``; or a setting of the configuration breaks a rule.
    """
    if description is None:
        args = dataclasses.replace(flavors[section.flavor])
        length = args.rope_scaling[LENGTH]
    else:
        known = known_entries(description, name)
        args = _arguments(known)
        length = (known["rope_scaling"] or {}).get(LENGTH, known["max_position_embeddings"])
    if section.rope_theta is not None:
        args.rope_theta = section.rope_theta
    if section.rope_scaling:
        args.rope_scaling = parse_scaling(section.rope_scaling, length)
    return args


def _arguments(known: dict[str, Any]) -> LighthouseModelArgs:
    dim, width = known["hidden_size"], known["intermediate_size"]
    return FAMILIES[known["model_type"]](
        dim=dim,
        n_layers=known["num_hidden_layers"],
        n_heads=known["num_attention_heads"],
        n_kv_heads=known["num_key_value_heads"],
        own_head_dim=known["head_dim"],
        vocab_size=known["vocab_size"],
        # Upstream takes this share of 8 dim / 3, cuts it to a whole number and rounds it up to a
        # multiple of the width. Half below the width, it becomes just that.
        multiple_of=width,
        ffn_dim_multiplier=(width - 0.5) / int(8 * dim / 3),
        norm_eps=known["rms_norm_eps"],
        rope_theta=known["rope_theta"],
        rope_scaling=known["rope_scaling"] or NO_SCALING,
        tied=known["tie_word_embeddings"],
    )


def architecture(args: LighthouseModelArgs) -> dict[str, Any]:
    """The entries of ``config.json`` that say what a model computes."""
    return {
        "model_type": args.model_type,
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_width,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "rope_theta": float(args.rope_theta),
        "rope_scaling": None if args.rope_scaling == NO_SCALING else dict(args.rope_scaling),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": args.tied,
    }


def differences(
    known: dict[str, Any], args: LighthouseModelArgs
) -> dict[str, tuple[object, object]]:
    """Entries in which a model differs from ``args``: (the model's, ours).

    Args:
        known: from ``known_entries`` or ``architecture``.
    """
    return {
        key: (known[key], value)
        for key, value in architecture(args).items()
        if key in known and known[key] != value
    }
