"""Frequencies of rotary embedding: plain, and scaled for sequences longer than a model's first.

A scaling is a table as ``config.json`` of Hugging Face's format has under ``rope_scaling``: its
kind under "rope_type", and its settings. The formulas are those of ``transformers``, operation by
operation in float32, because a rounding of a frequency grows with the position that it multiplies.
"""

import math
import sys
from typing import Any

import torch

from ..errors import UserValueError

# Scaling of Llama 3.1, which torchtitan gives every Llama 3.
LLAMA_3_1: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NO_SCALING: dict[str, Any] = {"rope_type": "default"}
# Settings of each kind, with their defaults. None: it has none, and must be given. ``ABSENT`` ones
# may be missing.
ABSENT = object()
LENGTH = "original_max_position_embeddings"
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: None},
    "yarn": {
        "factor": None,
        LENGTH: None,
        **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), ABSENT),
        **dict.fromkeys(("mscale", "mscale_all_dim", "truncate"), ABSENT),
    },
}
# YaRN's defaults: turns over the first length of the columns where its ramp begins and ends.
BETA_FAST, BETA_SLOW = 32, 1
FORMS = "'none', 'linear factor=2', 'llama3 factor=8' or 'yarn factor=4'"


def checked_scaling(found: dict[str, Any], length: int, name: str) -> dict[str, Any]:
    """A scaling with all its settings, in a fixed order.

    Args:
        found: its kind and those settings that are given.
        length: ``original_max_position_embeddings`` where it is not given.
        name: how messages name the scaling.

    Raises:
        ValueError: its kind is unknown, or a setting is missing, unknown or no number of its kind.
    """
    kind = found.get("rope_type")
    if not isinstance(kind, str) or kind not in SETTINGS:
        raise UserValueError(
            f"{name} is of type {kind!r}, which is not known here; use {', '.join(SETTINGS)}"
        )
    known = SETTINGS[kind] | ({LENGTH: length} if LENGTH in SETTINGS[kind] else {})
    unknown = [key for key in found if key not in known and key != "rope_type"]
    if unknown:
        raise UserValueError(
            f"{name} of type '{kind}' has {unknown[0]} = {found[unknown[0]]!r}, which that type "
            f"does not read; remove it, or use {', '.join(known) or 'no settings'}"
        )
    settings = {
        key: value
        for key, value in (known | found).items()
        if key in known and value is not ABSENT and (value is not None or known[key] is not ABSENT)
    }
    for key, value in settings.items():
        _check_setting(name, kind, key, value)
    if kind == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise UserValueError(
            f"{name}: low_freq_factor = {settings['low_freq_factor']} must be below "
            f"high_freq_factor = {settings['high_freq_factor']}; lower it"
        )
    if kind == "yarn":
        fast, slow = settings.get("beta_fast", BETA_FAST), settings.get("beta_slow", BETA_SLOW)
        if fast < slow:
            raise UserValueError(
                f"{name}: beta_fast = {fast} must not be below beta_slow = {slow}; raise it"
            )
    return {"rope_type": kind, **settings}


def _check_setting(name: str, kind: str, key: str, value: Any) -> None:
    if key == "truncate":
        sound, must = isinstance(value, bool), "be true or false"
    elif key == LENGTH:
        sound, must = type(value) is int and value >= 1, "be a whole number of at least 1"
    else:
        # A factor below 1 would squeeze positions together.
        least = 1 if key == "factor" else 0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # A whole number of JSON may be too large for a float.
        finite = number and value <= sys.float_info.max
        sound = finite and (value > 0 if least == 0 else value >= 1)
        must = "be a number of at least 1" if least else "be a number above 0"
    if value is None:
        raise UserValueError(f"{name} of type '{kind}' lacks {key}, which must {must}; add it")
    if not sound:
        raise UserValueError(f"{name} of type '{kind}': {key} = {value!r} must {must}; correct it")


def parse_scaling(text: str, length: int) -> dict[str, Any]:
    """The scaling that ``model.rope_scaling`` names, such as "yarn factor=4".

    Args:
        length: as in ``checked_scaling``.

    Raises:
        ValueError: the text has another form, or a setting breaks a rule.
    """
    name = f"model.rope_scaling = '{text}'"
    kind, *words = text.split() or [""]
    found: dict[str, Any] = {"rope_type": {"none": "default"}.get(kind, kind)}
    if found["rope_type"] not in SETTINGS:
        raise UserValueError(f"{name} is not known; use {FORMS}")
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key in found:
            raise UserValueError(
                f"{name}: '{word}' is no setting, or its second value; use {FORMS}"
            )
        found[key] = _value(value)
    return checked_scaling(found, length, name)


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def frequencies(head_dim: int, theta: float, scaling: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Angles per position, and the factor that scales cosines and sines.

    Args:
        head_dim: D, an even number.
        theta: the base.
        scaling: from ``checked_scaling``.

    Returns:
        float32 [D / 2] and a number, which is 1 except for "yarn".
    """
    powers = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    plain = 1.0 / powers
    match scaling["rope_type"]:
        case "linear":
            return plain / scaling["factor"], 1.0
        case "llama3":
            return _llama3(plain, scaling), 1.0
        case "yarn":
            return _yarn(powers, head_dim, theta, scaling), attention_factor(scaling)
    return plain, 1.0


def _llama3(plain: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's: waves longer than the first length are stretched, short ones are left."""
    factor, length = scaling["factor"], scaling[LENGTH]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * math.pi / plain
    long = waves > length / low
    stretched = torch.where(long, plain / factor, plain)
    share = (length / waves - low) / (high - low)
    between = (1 - share) * stretched / factor + share * stretched
    return torch.where(~(waves < length / high) & ~long, between, stretched)


def _yarn(
    powers: torch.Tensor, head_dim: int, theta: float, scaling: dict[str, Any]
) -> torch.Tensor:
    """YaRN's (arXiv 2309.00071): a ramp over the columns from plain to stretched frequencies."""

    def column(rotations: float) -> float:
        turns = scaling[LENGTH] / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    first, last = (
        column(scaling.get(*beta)) for beta in (("beta_fast", BETA_FAST), ("beta_slow", BETA_SLOW))
    )
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # A ramp of no width would divide by zero.
    width = (last + 0.001 if first == last else last) - first
    ramp = ((torch.arange(head_dim // 2).float() - first) / width).clamp(0, 1)
    plain, stretched = 1.0 / powers, 1.0 / (scaling["factor"] * powers)
    left = 1 - ramp
    return stretched * (1 - left) + plain * left


def attention_factor(scaling: dict[str, Any]) -> float:
    """The factor of cosines and sines under YaRN, which sharpens attention over longer texts."""

    def grown(scale: float) -> float:
        factor = scaling["factor"]
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(mscale) / grown(all_dim) if mscale and all_dim else grown(1.0)


def rotary_turns(head_dim: int, length: int, theta: float, scaling: dict[str, Any]) -> torch.Tensor:
    """The turn of each pair of columns at each position, complex64 [length, D / 2]."""
    per_position, factor = frequencies(head_dim, theta, scaling)
    angles = torch.outer(torch.arange(length, device=per_position.device), per_position).float()
    return torch.polar(torch.full_like(angles, factor), angles)
