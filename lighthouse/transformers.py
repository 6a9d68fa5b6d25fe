"""Lighthouse attention in models of Hugging Face's ``transformers``.

    from lighthouse.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lighthouse")
    ...
    model.set_attn_implementation("sdpa")  # the dense stage

``transformers`` hands a model's masks to the implementation's own mask function, and leaves out the
masks of an implementation that has none. So there is one here, which refuses every mask but the
causal one. Whatever else Lighthouse does not compute is refused too. In place of a mask it returns
``CAUSAL``, which fails in a model that computes attention by code of its own: such a model would
otherwise go on without any mask, and see later tokens.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from .attention import lighthouse_attention
from .config import LighthouseConfig

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"lighthouse.transformers needs transformers 5 or later, found {transformers.__version__}; "
        "run pip install -U transformers"
    )

NAME = "lighthouse"
# The method with a window beside the selection.
RECOMMENDED = LighthouseConfig(window=256)
# A model's own settings, as an attribute of its configuration: fields of LighthouseConfig, and
# "dense_layers".
SETTINGS = "lighthouse"
DENSE_LAYERS = "dense_layers"
# The compiler writes messages into C++ and Triton, where a double quote would end them.
DENSE = "model.set_attn_implementation('sdpa') computes it"
# Arguments of an attention call that change its result -> what they ask for.
REFUSED = {
    "softcap": "caps its scores",
    "sliding_window": "has a sliding window",
    "s_aux": "has attention sinks",
    "sinks": "has attention sinks",
    "indices": "attends over keys that it selects itself",
    "block_indices": "attends over keys that it selects itself",
    "position_bias": "adds a bias to its scores",
    "head_mask": "masks heads",
    "output_attentions": "returns its attention weights",
    "cu_seq_lens_q": "packs several sequences into one",
    "cu_seq_lens_k": "packs several sequences into one",
    "cu_seqlens_q": "packs several sequences into one",
}
# Names that models give their norms of queries and keys.
NORMS = {
    "q_norm",
    "k_norm",
    "qk_norm",
    "q_layernorm",
    "k_layernorm",
    "query_layernorm",
    "key_layernorm",
}


@dataclass(frozen=True)
class Settings:
    """The settings of a model.

    Attributes:
        config: the method's.
        dense_layers: numbers of the layers that stay dense.
    """

    config: LighthouseConfig
    dense_layers: frozenset[int]


class CausalMask:
    """Stands for the causal mask, which ``attend`` needs no tensor for.

    Raises:
        AttributeError, TypeError: a model uses it as a tensor.
    """

    message = (
        "this model uses its mask in code of its own, which Lighthouse attention does not replace. "
        + DENSE
    )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(self.message)

    def __getitem__(self, _: Any) -> NoReturn:
        raise TypeError(self.message)

    __add__ = __radd__ = __mul__ = __rmul__ = __getitem__

    @classmethod
    def __torch_function__(cls, *_: Any) -> NoReturn:
        raise TypeError(cls.message)


CAUSAL = CausalMask()
_registered: Settings | None = None
# The positions of the last forward pass, if they are still there, and how often they had been
# changed in place. All layers get the same tensor.
_in_order: tuple[weakref.ref[torch.Tensor], int] | None = None


def register(config: LighthouseConfig | None = None, dense_layers: Iterable[int] = ()) -> None:
    """Make ``attn_implementation="lighthouse"`` valid for models of ``transformers``.

    Calling it again changes the settings of all models that have none of their own. A model has its
    own in ``model.config.lighthouse``, a dict of the settings of ``LighthouseConfig`` and
    "dense_layers". It is saved and loaded with the model.

    Args:
        config: settings of the method; by default ``RECOMMENDED``.
        dense_layers: layers with dense attention, counted from 0.

    Raises:
        TypeError: ``config`` is no LighthouseConfig, or ``dense_layers`` no layer numbers.
    """
    global _registered
    if config is not None and not isinstance(config, LighthouseConfig):
        raise TypeError(
            f"config must be a LighthouseConfig, got {type(config).__name__}; pass "
            "LighthouseConfig(...)"
        )
    _registered = Settings(config or RECOMMENDED, _layers(dense_layers))
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, check_mask)


def settings_for(config: LighthouseConfig, dense_layers: Iterable[int] = ()) -> dict[str, Any]:
    """A model's own settings, to be put into ``model.config.lighthouse``."""
    return {**asdict(config), DENSE_LAYERS: sorted(_layers(dense_layers))}


def settings_of(module: nn.Module) -> Settings:
    """The settings that a model's attention layer runs with.

    Raises:
        ValueError, TypeError: the model's own settings are wrong, or there are none at all.
    """
    own = getattr(getattr(module, "config", None), SETTINGS, None)
    if own is None:
        if _registered is None:
            raise ValueError("call lighthouse.transformers.register() first")
        return _registered
    if not isinstance(own, dict):
        raise TypeError(
            f"config.{SETTINGS} must be a dict of settings, got {type(own).__name__}; see "
            "settings_for"
        )
    settings = dict(own)
    layers = _layers(settings.pop(DENSE_LAYERS, ()))
    try:
        return Settings(LighthouseConfig(**settings), layers)
    except (TypeError, ValueError) as error:
        raise type(error)(f"config.{SETTINGS}: {error}") from None


def _layers(numbers: Iterable[int]) -> frozenset[int]:
    found = list(numbers) if isinstance(numbers, Iterable) else None
    if found is None or not all(type(number) is int and number >= 0 for number in found):
        raise TypeError(
            f"dense_layers must be layer numbers from 0 on, such as [0, 1], got {numbers!r}; leave "
            "it out for none"
        )
    return frozenset(found)


def _is_dense(module: nn.Module, dense_layers: frozenset[int]) -> bool:
    """Whether a layer is among ``dense_layers``.

    Raises:
        ValueError: the layer has no number, or ``dense_layers`` numbers that the model has not.
    """
    if not dense_layers:
        return False
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ValueError(
            f"dense_layers = {sorted(dense_layers)} cannot be told apart, because "
            f"{type(module).__name__} has no layer_idx; leave dense_layers out"
        )
    layers = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    if layers is not None and max(dense_layers) >= layers:
        raise ValueError(
            f"dense_layers = {sorted(dense_layers)} must be layers of the model, which are 0 to "
            f"{layers - 1}; leave out the others"
        )
    return layer in dense_layers


def check_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> CausalMask:
    """Check that a model asks for the causal mask alone; ``transformers`` calls it before layers.

    Raises:
        ValueError: it asks for another one, as for padding, or attends over a cache; in compiled
            code RuntimeError.
    """
    _refuse_cache(q_length, kv_length)
    if attention_mask is not None:
        if attention_mask.shape[-1] != kv_length:
            raise ValueError(
                f"an attention_mask of {attention_mask.shape[-1]} positions does not fit "
                f"{kv_length}; leave it out"
            )
        # Within a compiled graph nobody can look at a mask.
        if torch.compiler.is_compiling() or not bool(attention_mask.all()):
            raise ValueError(
                "Lighthouse attention takes no attention_mask: it attends over all earlier "
                "positions, padding included. Fill sequences up with text and leave the mask out; "
                + DENSE
            )
    if mask_function is not causal_mask_function:
        message = (
            "Lighthouse attention is causal over one sequence, and this model asks for another "
            "mask: a sliding window, both directions, blocks, or position_ids that start anew "
            "within a row. " + DENSE
        )
        if not torch.compiler.is_compiling():
            raise ValueError(message)
        _assert_causal(mask_function, batch_size, q_length, device, message)
    return CAUSAL


def _assert_causal(
    mask_function: Callable[..., Any],
    batch_size: int,
    length: int,
    device: torch.device | str,
    message: str,
) -> None:
    """Check within a compiled graph, where no mask is known by name.

    The compiler cannot tell whether positions run on, so transformers hands it a mask for packed
    sequences in any case. A mask is taken for causal if every position sees the first one and none
    sees the next.
    """
    rows = torch.arange(batch_size, device=device)[:, None]
    places = torch.arange(length, device=device)[None]
    first = torch.zeros_like(places)
    sees_first = mask_function(rows, first, places, first)
    sees_next = mask_function(rows, first, places[:, :-1], places[:, 1:])
    torch._assert_async(sees_first.all() & ~sees_next.any(), message)


def _refuse_cache(q_length: int, kv_length: int) -> None:
    if q_length != kv_length:
        raise ValueError(
            f"Lighthouse attention does not decode with a cache: {q_length} queries over "
            f"{kv_length} keys. For generation {DENSE}"
        )


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | CausalMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of one layer, as ``transformers`` calls it.

    Args:
        module: the layer's attention, whose ``layer_idx`` says whether it stays dense.
        query: [B, Hq, N, D].
        key, value: [B, Hkv, N, D].
        attention_mask, dropout, is_causal: None or ``CAUSAL``, 0.0, and not False.
        scaling: factor of the scores before the softmax.
        options: whatever else the model hands over.

    Returns:
        [B, N, Hq, D], and None for the attention weights.

    Raises:
        ValueError, TypeError: the model asks for what Lighthouse does not compute, or its settings
            do not fit N.
    """
    _refuse_cache(query.shape[2], key.shape[2])
    if attention_mask is not None and attention_mask is not CAUSAL:
        raise ValueError(f"Lighthouse attention takes no attention_mask; leave it out. {DENSE}")
    if key.shape[-1] != value.shape[-1]:
        raise ValueError(
            "Lighthouse attention needs values as wide as keys, and this model has keys of "
            f"{key.shape[-1]} and values of {value.shape[-1]} columns. {DENSE}"
        )
    if dropout:
        raise ValueError(
            f"Lighthouse attention has no dropout, got {dropout}; set attention_dropout = 0.0 in "
            "the model's config, or what it calls the dropout of its attention"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise ValueError(f"Lighthouse attention is causal, and this layer is not. {DENSE}")
    for name, meaning in REFUSED.items():
        asked = options.get(name)
        if asked is not None and asked is not False:
            raise ValueError(
                f"Lighthouse attention does not take {name}: this model {meaning}. {DENSE}"
            )
    if (positions := options.get("position_ids")) is not None:
        _check_positions(positions)
    settings = settings_of(module)
    if _is_dense(module, settings.dense_layers):
        return sdpa_attention_forward(
            module, query, key, value, None, scaling=scaling, is_causal=True
        )
    _check_scorer(module, settings.config.scorer, query.shape[-1])
    out = lighthouse_attention(query, key, value, settings.config, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _check_scorer(module: nn.Module, scorer: str, head_dim: int) -> None:
    """Check that the scorer can tell positions apart.

    Raises:
        ValueError: it ranks by norms that the layer has made equal.
    """
    if scorer != "norm":
        return
    for name, norm in module.named_children():
        if name not in NORMS:
            continue
        # A norm over all heads together leaves each head's norms apart.
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.shape[-1] == head_dim:
            raise ValueError(
                "scorer = 'norm' ranks positions by the norms of their queries and keys, and "
                f"{name} of {type(module).__name__} makes these nearly equal; register a "
                "LighthouseConfig with scorer = 'gla' or 'dilated'"
            )


def _check_positions(positions: torch.Tensor) -> None:
    """Check that positions [B or 1, N] run on by one.

    Raises:
        ValueError: they do not, as where sequences are packed; RuntimeError in compiled code.
    """
    global _in_order
    message = (
        "Lighthouse attention takes one sequence a row, and these position_ids do not run on by "
        "one: rows that pack several sequences, or pad them, are not supported. " + DENSE
    )
    if torch.compiler.is_compiling():
        torch._assert_async((positions.diff(dim=-1) == 1).all(), message)
        return
    # Looking into a tensor holds up the host, so the first layer does it for all. Tensors of
    # inference mode do not count their changes, and are looked into every time.
    version = None if positions.is_inference() else positions._version
    if version is not None and _in_order is not None:
        known, known_version = _in_order
        if known() is positions and known_version == version:
            return
    if not bool((positions.diff(dim=-1) == 1).all()):
        raise ValueError(message)
    _in_order = None if version is None else (weakref.ref(positions), version)
