"""The Llama-3 model with Lighthouse or a window as the inner attention of most of its layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, cast
from unittest.mock import patch

import torch
from torch import nn
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.llama3.model import model as upstream
from torchtitan.models.llama3.model.args import TransformerModelArgs

from lighthouse import LighthouseAttention, LighthouseConfig, StridedAttention, WindowAttention
from lighthouse.documents import gathered_documents
from lighthouse.geometry import PyramidGeometry, fitting_length
from lighthouse.inner_attention import InnerAttention
from lighthouse.precision import SDPA_BACKENDS
from lighthouse.scoring import flops_per_position
from lighthouse.strided import strided_pairs
from lighthouse.window import window_pairs

from ..errors import UserValueError
from ..job_config import JobConfig, Lighthouse
from .loss import factored, is_chunked
from .rope_scaling import LLAMA_3_1, rotary_turns
from .rotary import RotaryAttention, table_of


def lighthouse_config(section: Lighthouse) -> LighthouseConfig:
    """The method's own configuration, taken from the [lighthouse] section.

    It has no window where the window stands alone.

    Raises:
        ValueError, TypeError: a setting breaks a rule of the method.
    """
    names = [setting.name for setting in fields(LighthouseConfig)]
    settings = {name: getattr(section, name) for name in names}
    if section.attention == "window":
        settings["window"] = 0
    return LighthouseConfig(**settings)


def selecting_config(section: Lighthouse) -> LighthouseConfig | None:
    """The method's configuration if stage "lighthouse" selects entries, as a window does not.

    Raises:
        ValueError, TypeError: as ``lighthouse_config``.
    """
    return lighthouse_config(section) if section.attention == "lighthouse" else None


def fitting(section: Lighthouse, attention: str) -> Callable[[int], int]:
    """The least length from a given one on that an attention takes.

    Args:
        attention: "lighthouse", as the section has it, or "dense", which takes every length.
    """
    if attention != "lighthouse":
        return lambda length: length
    if method := selecting_config(section):
        return partial(fitting_length, method)
    # A window takes every length too.
    step = section.key_stride or 1
    return lambda length: -(-length // step) * step


@dataclass
class LighthouseModelArgs(TransformerModelArgs):
    """Arguments of a Llama.

    Another family derives its own from them. It sets those class variables in which it is no Llama,
    and has a row in ``model/families.py``.
    """

    model_type: ClassVar[str] = "llama"
    """The name in config.json of this family, or of another one that computes the same."""
    causal_model: ClassVar[str] = "LlamaForCausalLM"
    """The class of transformers that loads an export."""
    attention_class: ClassVar[type[RotaryAttention]] = RotaryAttention
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    """Values that transformers gives to entries which are not in config.json."""
    plain: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}
    """Entries of config.json to check beside those of ``PLAIN`` in ``model/architecture.py``, or
    otherwise."""
    has_window_switch: ClassVar[bool] = True
    """Whether use_sliding_window = false in config.json says that sliding_window is not read."""
    own_weights: ClassVar[Mapping[str, str]] = {}
    """Weights of a block that a Llama does not have: their names in Hugging Face's block -> in
    ours."""
    column_weights: ClassVar[tuple[str, ...]] = ()
    """Those among them, by our names, with an element for each column of heads that are rotated.
    Hugging Face has these columns in another order."""
    lighthouse: LighthouseConfig = LighthouseConfig()
    window: int = 0
    """Positions of the window that stands alone in stage "lighthouse"; 0 if Lighthouse attention
    runs, whose own window is a setting of the method."""
    key_stride: int = 0
    """Positions of which one key stands for all, before that window; 0 if there are none."""
    dense_layers: list[int] = field(default_factory=list)
    own_head_dim: int = 0
    """D where it is not dim / n_heads; 0 where it is."""
    rope_scaling: dict[str, Any] = field(default_factory=lambda: dict(LLAMA_3_1))
    """Scaling of the rotary frequencies, from ``checked_scaling``. It takes the place of upstream's
    ``rope_scaling_args``."""
    tied: bool = False
    """Whether the embedding is the output projection too."""
    chunked_loss: bool = False
    """Whether the model returns the factors of its logits, for a loss in chunks of tokens."""

    # pyrefly: ignore[bad-override]  The trainer hands over the overlay's configuration.
    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        # Upstream warns of a length beyond its default, which is no limit: the rotary embedding is
        # made for the length of the run.
        self.max_seq_len = job_config.training.seq_len
        super().update_from_config(job_config, **kwargs)
        section = job_config.lighthouse
        self.lighthouse = lighthouse_config(section)
        self.window = section.window if section.attention == "window" else 0
        self.key_stride = section.key_stride if self.window else 0
        self.dense_layers = list(job_config.lighthouse.dense_layers)
        self.chunked_loss = is_chunked(job_config, self.vocab_size)

    @property
    def head_dim(self) -> int:
        """D, the columns of a head."""
        return self.own_head_dim or self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    @property
    def attention_width(self) -> int:
        """Columns of all heads of queries together, H D, which need not be dim."""
        return self.n_heads * self.head_dim

    @property
    def ffn_width(self) -> int:
        """Columns of a feed-forward layer, as upstream rounds them."""
        width = int(8 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    @property
    def selects(self) -> bool:
        """Whether stage "lighthouse" runs Lighthouse attention, and not the window alone."""
        return not self.window

    def check_scorer(self, section: Lighthouse) -> None:
        """Check that the scorer of a stage "lighthouse" can tell positions of this model apart.

        Raises:
            ValueError: it ranks by norms that the model has made nearly equal.
        """
        ranks = section.attention == "lighthouse" and len(set(section.dense_layers)) < self.n_layers
        if ranks and section.scorer == "norm" and self.attention_class.norms_heads:
            raise UserValueError(equal_norms(self.model_type))

    def gathered_length(self, seq_len: int) -> int:
        """Length of the sequence that attention runs on in the sparse layers of stage "lighthouse".

        It is S under Lighthouse attention, and N under the window, which gathers nothing.
        """
        if not self.selects:
            return seq_len
        return PyramidGeometry(self.lighthouse, seq_len).gathered_length

    def stage_one_attention(self, dense: nn.Module) -> InnerAttention:
        """The inner attention of stage "lighthouse", around that of the dense stage."""
        if self.selects:
            return LighthouseAttention(self.lighthouse, dense)
        if self.key_stride:
            return StridedAttention(self.window, self.key_stride, dense)
        return WindowAttention(self.window, dense)

    def pairs_near(self, seq_len: int) -> int:
        """Pairs of a query and a key in one head that attend in stage "lighthouse", ungathered."""
        window = self.window or self.lighthouse.window
        if self.key_stride:
            return strided_pairs(seq_len, window, self.key_stride)
        return window_pairs(seq_len, window) if window else 0

    def _stage_one_flops(self, seq_len: int) -> float:
        """FLOPs per token of one layer's attention in stage "lighthouse", forward and backward."""
        pairs, scoring = self.pairs_near(seq_len), 0.0
        if self.selects:
            gathered = self.gathered_length(seq_len)
            pairs += window_pairs(gathered, gathered)
            scoring = flops_per_position(self.lighthouse, seq_len, self.n_heads, self.head_dim)
        return 12 * self.attention_width * pairs / seq_len + scoring

    def flops_per_token(self, matmul_parameters: int, seq_len: int, attention: str) -> float:
        """FLOPs of forward and backward per token, counting what runs.

        A parameter that multiplies costs 6 per token. Attention over a causal sequence of length
        M has M (M + 1) / 2 pairs, and over a window of W positions W N - W (W - 1) / 2; those of a
        window with far keys are counted by ``strided_pairs``. A pair costs 2 products of 2 D in
        each head forward, and twice that backward. M is S in the layers under Lighthouse attention,
        to which a window adds its own, and N in dense ones. Scorers run forward only;
        ``lighthouse.scoring`` counts their operations. Recomputation, pooling and picking are not
        counted.
        """
        sparse_layers = self.n_layers - len(self.dense_layers) if attention == "lighthouse" else 0
        dense_flops = 12 * self.attention_width * window_pairs(seq_len, seq_len) / seq_len
        flops = 6 * matmul_parameters + (self.n_layers - sparse_layers) * dense_flops
        return flops + (sparse_layers * self._stage_one_flops(seq_len) if sparse_layers else 0.0)

    def flops_saved_by_masks(self, documents: torch.Tensor, attention: str) -> float:
        """FLOPs per token that ``flops_per_token`` counts beyond those within documents.

        Scorers count as they do without documents.

        Args:
            documents: [B, N] on the CPU, for each position the first position of its document.
        """
        length = documents.shape[1]
        dense = window_pairs(length, length) - _pairs_within(documents, length)
        sparse_layers = self.n_layers - len(self.dense_layers) if attention == "lighthouse" else 0
        pairs = (self.n_layers - sparse_layers) * dense
        if sparse_layers and (window := self.window or self.lighthouse.window):
            near = window_pairs(length, window) - _pairs_within(documents, window)
            pairs += sparse_layers * near
        if sparse_layers and self.selects:
            places = gathered_documents(documents, PyramidGeometry(self.lighthouse, length))
            gathered = places.shape[1]
            far = window_pairs(gathered, gathered) - _pairs_within(places, gathered)
            pairs += sparse_layers * far
        return 12 * self.attention_width * pairs / length

    # pyrefly: ignore[bad-override]  Upstream divides by the FLOPs; they need not be an int.
    def get_nparams_and_flops(
        self, model: nn.Module, seq_len: int, attention: str = "dense"
    ) -> tuple[int, float]:
        """Number of parameters, and FLOPs per token of forward and backward in ``attention``."""
        parameters = sum(p.numel() for p in model.parameters())
        embedding = sum(p.numel() for p in model.get_submodule("tok_embeddings").parameters())
        # A tied embedding multiplies, as the output projection that it is too.
        multiplying = parameters if self.tied else parameters - embedding
        return parameters, self.flops_per_token(multiplying, seq_len, attention)


def equal_norms(model_type: str) -> str:
    """The message that refuses the scorer "norm" for a model that norms queries and keys."""
    return (
        "lighthouse.scorer = 'norm' ranks positions by the norms of their queries and keys, which "
        f"a model of type '{model_type}' makes nearly equal in every head; pass "
        "--lighthouse.scorer gla or --lighthouse.scorer dilated, which take no context parallelism"
    )


def _pairs_within(documents: torch.Tensor, window: int) -> float:
    """Pairs of a query and a key in one head of one sequence, on average over a batch.

    Args:
        documents: [B, N], for each position the first position of its document.
        window: keys that a query takes at most.
    """
    seen = torch.arange(1, documents.shape[1] + 1) - documents
    return seen.clamp_(max=window).sum().item() / len(documents)


def leave_out_math_backend(model: nn.Module) -> None:
    """Let dense attention run only on backends whose memory is linear in the sequence.

    Upstream also lists MATH, to which float32 on a GPU falls back silently.
    """
    for module in model.modules():
        if isinstance(module, ScaledDotProductAttentionWrapper):
            module.sdpa_backends = SDPA_BACKENDS


def _as_in_autocast(
    module: nn.Module, arguments: tuple[torch.Tensor, ...], embeddings: torch.Tensor
) -> torch.Tensor:
    """Embeddings in the precision of autocast.

    Autocast leaves embeddings in the precision of the weights. On one GPU torchtitan trains under
    autocast, and the residual stream would be in float32. It would take twice the memory that it
    takes under FSDP, which casts the weights themselves.
    """
    device = embeddings.device.type
    if torch.is_autocast_enabled(device):
        return embeddings.to(torch.get_autocast_dtype(device))
    return embeddings


def hold_embedding_once(model: nn.Module) -> None:
    """Leave a tied embedding out of the state dict where it is the output projection."""

    def remove(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state.pop(f"{prefix}output.weight", None)

    def add(module: nn.Module, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if f"{prefix}tok_embeddings.weight" in state:
            state[f"{prefix}output.weight"] = state[f"{prefix}tok_embeddings.weight"]

    model.register_state_dict_post_hook(remove)
    model.register_load_state_dict_pre_hook(add)


class LighthouseTransformer(upstream.Transformer):
    """Upstream's Llama 3, its state dict unchanged; ``use_attention`` chooses its attention.

    A family that differs from it in its attention has that of ``model_args.attention_class``.
    """

    model_args: LighthouseModelArgs

    def __init__(self, model_args: LighthouseModelArgs) -> None:
        with patch.object(upstream, "Attention", model_args.attention_class):
            super().__init__(model_args)
        self.tok_embeddings.register_forward_hook(_as_in_autocast)
        if model_args.chunked_loss:
            self.output = factored(self.output)
        if model_args.tied:
            self.tie()
            hold_embedding_once(self)
        for index, block in self.layers.items():
            attention = cast(RotaryAttention, block.get_submodule("attention"))
            if attention.head_dim != model_args.head_dim:
                attention.set_heads(model_args.dim, model_args.kv_heads, model_args.head_dim)
            if int(index) in model_args.dense_layers:
                continue
            dense = block.get_submodule("attention.inner_attention")
            block.set_submodule("attention.inner_attention", model_args.stage_one_attention(dense))

    def _precompute_freqs_cis(self) -> torch.Tensor:
        args = self.model_args
        turns = rotary_turns(args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling)
        return table_of(turns)

    def tie(self) -> None:
        """Make the embedding the output projection too, as it must be again where one was made."""
        self.output.weight = self.tok_embeddings.weight

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        # Leaving the meta device makes two parameters of one.
        if self.model_args.tied:
            self.tie()
        super().init_weights(buffer_device)

    def use_method(self, args: LighthouseModelArgs) -> None:
        """Use the first-stage attention of ``args`` from the next forward on."""
        names = ("lighthouse", "window", "key_stride")
        wanted = {name: getattr(args, name) for name in names}
        if wanted == {name: getattr(self.model_args, name) for name in names}:
            return
        for module in list(self.modules()):
            before = getattr(module, "inner_attention", None)
            if not isinstance(before, InnerAttention):
                continue
            after = args.stage_one_attention(before.sdpa)
            after.context_parallel = before.context_parallel
            module.inner_attention = after
        self.model_args = replace(self.model_args, **wanted)

    def use_scaling(self, scaling: dict[str, Any]) -> None:
        """Scale the rotary embedding by a table of ``checked_scaling`` from the next forward on."""
        if scaling == self.model_args.rope_scaling:
            return
        self.model_args = replace(self.model_args, rope_scaling=scaling)
        # In place, as compiled code and recorded graphs read this memory.
        self.freqs_cis.copy_(self._precompute_freqs_cis())

    def use_attention(self, attention: str) -> None:
        """Use the attention of stage "lighthouse" or "dense" from the next forward on.

        Raises:
            ValueError: the scorer cannot tell positions of this model apart.
        """
        inner = [module for module in self.modules() if isinstance(module, InnerAttention)]
        if attention == "lighthouse" and self.model_args.attention_class.norms_heads:
            for module in inner:
                if isinstance(module, LighthouseAttention) and module.config.scorer == "norm":
                    raise UserValueError(equal_norms(self.model_args.model_type))
        for module in inner:
            module.enabled = attention == "lighthouse"
