"""Configuration: torchtitan's, with a [lighthouse] section, and TOML errors that name the key."""

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import typeguard
from torchtitan.config import ConfigManager
from torchtitan.config import job_config as upstream

from .errors import UserTypeError, UserValueError

RetrievalTask = Literal["passkey", "long_passkey", "several_keys", "variables"]
BYTE_TOKENIZER_FOLDER = str(Path(__file__).parent / "assets" / "byte_tokenizer")


@dataclass
class Lighthouse:
    """Lighthouse attention and the two stages of training with it."""

    stage: Literal["auto", "lighthouse", "dense"] = "auto"
    """"auto" trains with Lighthouse up to and including step dense_from_step and with dense
    attention after it; "lighthouse" and "dense" force one of them at every step."""

    dense_from_step: int = 10000
    """Last step of the Lighthouse stage when stage is "auto". 0 trains dense throughout."""

    dense_every: int = 0
    """Every how many steps of the Lighthouse stage one trains under dense attention, so that the
    weights stay used to it and the switch costs less. 0: none."""

    levels: int = 3
    """Levels of the pooling pyramid, the base sequence included."""

    pooling_factor: int = 4
    """Entries of one level that the next coarser level pools into one. A power of two."""

    top_k: int = 1536
    """Entries picked at each pooled level. A multiple of picks_per_stratum."""

    picks_per_stratum: int = 128
    """Entries picked from each stratum of the sequence."""

    scorer: Literal["norm", "dilated", "gla"] = "norm"
    """How entries are scored for selection."""

    dilation: int = 4
    """Stride of the positions that the "dilated" and "gla" scorers attend within."""

    entry_score: Literal["max", "first"] = "max"
    """What an entry scores by: the largest score among the positions it covers, as in the paper,
    which tells earlier ones of later ones; or the score of the first of them."""

    combine: Literal["sum", "finest"] = "sum"
    """What a position gets where outputs of several levels reach it: their sum, as in the paper, or
    that of the finest level."""

    dense_layers: list[int] = field(default_factory=lambda: [0, 1, 28, 29])
    """Layers that use dense attention in both stages, counted from 0."""

    loss: Literal["auto", "chunked", "whole"] = "auto"
    """"whole" holds the logits of all tokens; "chunked" computes the loss and its gradients for
    one chunk of tokens after another; "auto" is "chunked" from a vocabulary of 16,384 on, "whole"
    below and where tensor parallelism shards the vocabulary."""

    data_streams: int = 0
    """Streams that the training text is dealt to, document by document; 0: one for each sequence
    of a global batch. The data-parallel degree must divide it; it must divide the batch."""

    log_selection_every: int = 0
    """Steps between records of what Lighthouse layers select, each of which takes two more forward
    passes over one microbatch. 0: none."""

    passkey_mix: float = 0.0
    """Share of the training tokens that are synthetic retrieval documents, in whole sequences
    spread evenly over all steps, of which the answers alone count in the loss; the rest is the
    text, in its order. 0.0: none. 1.0: no text."""

    passkey_tasks: list[RetrievalTask] = field(
        default_factory=lambda: list(get_args(RetrievalTask))
    )
    """What those documents ask for. Small models learn "passkey" first, and all four at once not at
    all."""

    tokenizer: Literal["byte", "hf"] = "byte"
    """"byte" is the built-in byte-level tokenizer; "hf" reads model.hf_assets_path."""


@dataclass
class Model(upstream.Model):
    name: str = "llama3_lighthouse"
    hf_assets_path: str = BYTE_TOKENIZER_FOLDER


@dataclass
class Training(upstream.Training):
    dataset: str = "python_stdlib"


@dataclass
class Validation(upstream.Validation):
    dataset: str = "python_stdlib"


@dataclass
class Checkpoint(upstream.Checkpoint):
    last_save_model_only: bool = False
    """Upstream's default drops the optimizer from the last checkpoint, which could then not be
    continued by the dense stage."""


@dataclass
class Parallelism(upstream.Parallelism):
    context_parallel_load_balancer: Literal["headtail"] | None = "headtail"
    """"headtail" gives every rank the same work; None leaves shards contiguous."""

    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "alltoall"
    """"alltoall" passes keys and values round the ring, one shard at a time; upstream's default,
    "allgather", holds all of them."""

    @property
    def balanced(self) -> bool:
        """Whether each rank holds an early and a late chunk of the sequence."""
        return self.context_parallel_load_balancer is not None


@dataclass
class ActivationCheckpoint(upstream.ActivationCheckpoint):
    mode: Literal["lighthouse", "selective", "full", "memory_budget", "none"] = "selective"
    """"lighthouse" keeps layer inputs, attention outputs, selections and what was gathered, and the
    products named by keep_products; it repeats the rest. The others are torchtitan's."""

    keep_products: list[Literal["wq", "wk", "wv", "wo", "w1", "w3"]] = field(default_factory=list)
    """Linear layers of a block whose outputs mode "lighthouse" also keeps, for more memory and less
    to repeat. Lighthouse layers do without those of wq, wk and wv and never keep them."""

    offload_inputs: bool = False
    """Keep layer inputs in pinned host memory between forward and backward, copied while layers
    compute. For the modes "lighthouse" and "full"; on GPUs, without tensor and pipeline
    parallelism."""


@dataclass
class Debug(upstream.Debug):
    seed: int | None = 0
    """Upstream's default draws another seed, and so another model, at every launch."""


@dataclass
class JobConfig(upstream.JobConfig):
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    validation: Validation = field(default_factory=Validation)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    debug: Debug = field(default_factory=Debug)
    lighthouse: Lighthouse = field(default_factory=Lighthouse)


class LighthouseConfigManager(ConfigManager):
    """Parses TOML and command line into a ``JobConfig``; the command line wins."""

    def __init__(self) -> None:
        super().__init__(JobConfig)

    def _maybe_add_custom_config(self, args, toml_values):
        config_cls = super()._maybe_add_custom_config(args, toml_values)
        check_toml(config_cls, toml_values or {})
        return config_cls


def check_toml(config_cls: type, values: dict[str, Any], section: str = "") -> None:
    """Check that every key of a TOML table exists in ``config_cls`` and has its type.

    Raises:
        ValueError: a key is unknown; the closest known one is suggested.
        TypeError: a value has another type than the key takes.
    """
    known = {f.name: f.type for f in fields(config_cls)}
    for key, value in values.items():
        path = f"{section}.{key}" if section else key
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            fix = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}."
            raise UserValueError(f"unknown key '{path}' in the TOML file; {fix}")
        expected = known[key]
        if is_dataclass(expected):
            if not isinstance(value, dict):
                raise UserTypeError(f"'{path}' is a section: write [{path}] in the TOML file")
            check_toml(expected, value, path)
            continue
        try:
            typeguard.check_type(value, expected)
        except typeguard.TypeCheckError as error:
            raise UserTypeError(f"{path} = {value!r} in the TOML file: the value {error}") from None
