"""torchtitan's configuration with a [lighthouse] section, and TOML errors that name the key."""

import argparse
import contextlib
import difflib
import io
import itertools
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import typeguard
from torchtitan.config import ConfigManager
from torchtitan.config import job_config as upstream

from lighthouse import LighthouseConfig

from .command_line import FLAG, first_part_of_box, with_a_second_value
from .errors import UserFileError, UserTypeError, UserValueError

RetrievalTask = Literal[
    "passkey", "long_passkey", "several_keys", "variables", "lookup", "common_word"
]
BYTE_TOKENIZER_FOLDER = str(Path(__file__).parent / "assets" / "byte_tokenizer")

# Messages list no more keys than this.
MOST_LISTED = 40
ALL_KEYS = "lighthouse train --list-keys shows all keys"
# Types as messages name them.
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}
# The only stage of a schedule that is none. A command line cannot name an empty list.
NO_SCHEDULE = "none"


@dataclass
class Schedule:
    """The steps that train with Lighthouse attention, and those that train dense."""

    stage: Literal["auto", "lighthouse", "dense"] = "auto"
    """"auto" trains with Lighthouse up to and including step dense_from_step and with dense
    attention after it; "lighthouse" and "dense" force one of them at every step."""

    dense_from_step: int = 10000
    """Last step of the Lighthouse stage when stage is "auto". 0 trains dense throughout."""

    dense_every: int = 0
    """Within the Lighthouse stage, each step that is a multiple of this number trains under dense
    attention. The weights then stay used to it, and the switch costs less. 0 turns this off."""

    schedule: list[str] = field(default_factory=list)
    """Stages in order, each in one string: its attention ("dense", "lighthouse" or "window"), and
    what it sets, such as "dense until=6000 seq_len=8192". until is the last step, training.steps by
    default. seq_len is training.seq_len by default, and at most that; the local batch follows it,
    so that every step has as many tokens, unless local_batch_size is set. Settings of the method,
    such as top_k and window, may change too. A last stage that is not dense says "last". Takes the
    place of stage, dense_from_step and attention. "none" by itself means no schedule, also where
    the TOML file has one."""

    skip_positions: int = 0
    """Positions that the tokens of a stage with shorter sequences are spread over, at most
    training.seq_len. Each sequence is cut into four parts at random places, where rotary positions
    skip ahead at random, so that short sequences train the distances of long ones. A stage of the
    schedule may set it for itself, and 0 there turns it off."""

    keep_position: bool = False
    """Go on at the checkpoint's place in the text although its sequences had another length than
    this run's, or than the schedule gives that step. By default this is refused."""


# The settings of LighthouseConfig with their types, their defaults and, as help texts, the words of
# its docstring. A command line and a TOML file set one after the other, so they are not frozen.
Method: Any = make_dataclass(
    "Method",
    [(setting.name, setting.type, field(default=setting.default))
     for setting in fields(LighthouseConfig)],
    namespace={"__doc__": LighthouseConfig.__doc__},
)  # fmt: skip


@dataclass
class Lighthouse(Method, Schedule):
    """Lighthouse attention and the two stages of training with it."""

    attention: Literal["lighthouse", "window"] = "lighthouse"
    """The attention of stage "lighthouse": Lighthouse attention, beside a window if there is one,
    or causal attention over the window alone."""

    key_stride: int = 0
    """Beside a window that stands alone, each position also attends to one key in every key_stride
    before the window, which counts as often as the keys that it stands for. It divides the window
    and the sequence. 0 means none."""

    dense_layers: list[int] = field(default_factory=list)
    """Layers that use dense attention in both stages, counted from 0."""

    document_positions: Literal["run_on", "restart"] = "run_on"
    """Positions of the rotary embedding under training.document_mask: "run_on" through the
    sequence, or "restart" with each document. They differ by rounding; "restart" is slower."""

    loss: Literal["auto", "chunked", "whole"] = "auto"
    """"whole" holds the logits of all tokens. "chunked" computes the loss and its gradients for one
    chunk of tokens after another. "auto" is "chunked" from a vocabulary of 16,384 on, and "whole"
    below it and where tensor parallelism shards the vocabulary."""

    cuda_graphs: bool = True
    """Launch forward and backward of a microbatch as one CUDA graph, from a stage's fourth step on.
    A graph runs the same kernels, without waiting for the host. It is for one GPU and compiled
    models; elsewhere the start of the log says why there is none."""

    data_streams: int = 0
    """Streams that the training text is dealt to, document by document: a multiple of the
    data-parallel degree. It divides the global batch, or is a multiple of it, and the sequences of
    a batch then take streams in turn. 0 gives each sequence of a global batch one of its own."""

    shuffle_seed: int = 0
    """Seed of the order of the training files, of what is mixed into their text, and of skipped
    positions. 0 reads the files in the order of their names; "python_stdlib" has one of its own.
    Documents of one file keep their order, and validation reads the same text in any case."""

    log_selection_every: int = 0
    """Steps between records of what Lighthouse layers select. Each record takes two more forward
    passes over one microbatch. 0 turns them off."""

    repeat_mix: float = 0.0
    """Share of the sequences of text in which passages return, near and far."""

    repeat_share: float = 0.125
    """Share of the tokens of such a sequence that repeat an earlier passage."""

    passkey_mix: float = 0.0
    """Share of the training tokens that come from synthetic retrieval documents. These fill whole
    sequences, spread evenly over all steps, and only their answers count in the loss. The other
    sequences hold the text, in its order. 0.0 means no such documents, 1.0 no text."""

    passkey_tasks: list[RetrievalTask] = field(
        default_factory=lambda: ["passkey", "long_passkey", "several_keys", "variables"]
    )
    """Tasks of the retrieval documents; "lookup" and "common_word" are others. Small models learn
    "passkey" first; they do not learn four at once."""

    tokenizer: Literal["byte", "hf"] = "byte"
    """"byte" is the built-in byte-level tokenizer; "hf" reads the one in model.hf_assets_path."""

    def __post_init__(self) -> None:
        # A resume compares stages as texts, and the command line has a space after each comma.
        self.schedule = [
            " ".join(stage.split()) if isinstance(stage, str) else stage for stage in self.schedule
        ]
        if self.schedule == [NO_SCHEDULE]:
            self.schedule = []


@dataclass
class Model(upstream.Model):
    name: str = "llama3_lighthouse"

    hf_assets_path: str = BYTE_TOKENIZER_FOLDER
    """Folder of the tokenizer, for lighthouse.tokenizer = "hf"."""

    hf_folder: str = ""
    """Folder in Hugging Face's format whose config.json says what the model is, in the place of
    flavor. Its weights come by lighthouse import-hf. "" builds the flavor."""

    rope_theta: float | None = None
    """Base of the rotary embedding. None is that of hf_folder or flavor. Another one changes the
    model, as extending it to longer sequences does."""

    rope_scaling: str = ""
    """Scaling of the rotary embedding: "none", "linear factor=2", "llama3 factor=8" or "yarn
    factor=4", with further settings of config.json such as original_max_position_embeddings=4096,
    which is the length of hf_folder's model by default. "" is that of hf_folder or flavor."""


@dataclass
class Training(upstream.Training):
    dataset: str = "python_stdlib"

    document_mask: bool = False
    """Let each position attend within its own document alone, in training and in validation.
    Documents begin at multiples of pooling_factor^(levels - 1), after padding without labels."""


@dataclass
class Validation(upstream.Validation):
    dataset: str = "python_stdlib"

    def __post_init__(self) -> None:
        """Upstream asserts here what the table of bounds says with a message."""


@dataclass
class Checkpoint(upstream.Checkpoint):
    last_save_model_only: bool = False
    """Whether the last checkpoint holds the weights alone. The dense stage cannot continue such a
    checkpoint; upstream's default is true."""

    set_damaged_aside: bool = False
    """Go on from the newest whole checkpoint if newer ones are damaged, and rename those to
    step-N.damaged. By default a damaged checkpoint stops the run, with a message."""


@dataclass
class Parallelism(upstream.Parallelism):
    context_parallel_load_balancer: Literal["headtail"] | None = "headtail"
    """"headtail" gives every rank the same work. None gives each rank one contiguous part."""

    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "alltoall"
    """"alltoall" passes keys and values round the ring, one shard at a time. "allgather" is
    upstream's default and is refused here."""

    @property
    def balanced(self) -> bool:
        """Whether each rank holds an early and a late chunk of the sequence."""
        return self.context_parallel_load_balancer is not None


@dataclass
class ActivationCheckpoint(upstream.ActivationCheckpoint):
    # pyrefly: ignore[bad-override]  This section adds a mode to torchtitan's.
    mode: Literal["lighthouse", "selective", "full", "memory_budget", "none"] = "selective"
    """"lighthouse" keeps layer inputs, attention outputs, selections, gathered rows and the
    products named by keep_products. It computes the rest again. The other modes are
    torchtitan's."""

    keep_products: list[Literal["wq", "wk", "wv", "wo", "w1", "w3"]] = field(default_factory=list)
    """Linear layers of a block whose outputs mode "lighthouse" also keeps. Each takes memory and
    saves a computation. Lighthouse layers do not need the outputs of wq, wk and wv, and never keep
    them."""

    offload_inputs: bool = False
    """Keep layer inputs in pinned host memory between forward and backward, copied while layers
    compute. For the modes "lighthouse" and "full"; on GPUs, without tensor and pipeline
    parallelism."""


@dataclass
class Debug(upstream.Debug):
    seed: int | None = 0
    """Seed of the weights and of everything random. Upstream's default, None, draws another seed,
    and so another model, at every launch."""


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


def sections_of_text(config: JobConfig) -> dict[str, Training | Validation]:
    """The sections, by name, that say which text a run reads."""
    sections: dict[str, Training | Validation] = {"training": config.training}
    return sections | ({"validation": config.validation} if config.validation.enable else {})


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested TOML tables as section.key to value."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat


@dataclass(frozen=True)
class Leaf:
    """One key of a configuration, as section.key, with its type, its value and its default."""

    key: str
    kind: Any
    value: Any
    default: Any


# Checks of one configuration ask some ten times for the types of all sections.
types_of = cache(get_type_hints)


def leaves(config: Any, defaults: Any = None, prefix: str = "") -> Iterator[Leaf]:
    """Every key of a configuration, in its order."""
    defaults = type(config)() if defaults is None else defaults
    kinds = types_of(type(config))
    for each in fields(config):
        value, default = getattr(config, each.name), getattr(defaults, each.name)
        if is_dataclass(default):
            yield from leaves(value, default, f"{prefix}{each.name}.")
        else:
            yield Leaf(f"{prefix}{each.name}", kinds[each.name], value, default)


def missed_type(value: Any, kind: Any) -> str | None:
    """The type ``kind`` in words if ``value`` is not of it, else None."""
    items = value if isinstance(value, list) else [value]
    # Python takes a bool for a number, but no key means one.
    if kind is not bool and any(isinstance(item, bool) for item in items):
        return _in_words(kind)
    try:
        # By default only the first item of a list is checked.
        every = typeguard.CollectionCheckStrategy.ALL_ITEMS
        typeguard.check_type(value, kind, collection_check_strategy=every)
    except typeguard.TypeCheckError:
        return _in_words(kind)
    return None


def _in_words(kind: Any) -> str:
    """A type as a message names it, without the None that a TOML file cannot hold."""
    origin, parts = get_origin(kind), [each for each in get_args(kind) if each is not NoneType]
    if origin is Literal:
        return f"{'one of ' * (len(parts) > 1)}{', '.join(map(repr, parts))}"
    if origin in (list, tuple):
        length = "" if origin is list or ... in parts else f" of {len(parts)} items"
        return f"a list{length}, each item {_in_words(parts[0])}"
    if origin in (Union, UnionType):
        # A whole number is a number.
        others = [each for each in parts if each is not int or float not in parts]
        return ", or ".join(map(_in_words, others))
    return TYPES.get(kind, f"of type {kind}")


class LighthouseConfigManager(ConfigManager):
    """Parses a TOML file and the command line into a ``JobConfig``; the command line wins."""

    def __init__(self) -> None:
        super().__init__(JobConfig)

    def parse_args(self, args: list[str] | None = None) -> JobConfig:
        """The configuration of a command line, by default of this process's.

        Raises:
            ValueError, TypeError, OSError: a key is unknown, a value has the wrong type, or a file
                or module cannot be read.
        """
        args = sys.argv[1:] if args is None else args
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed):
                # Upstream returns an object of the class that it was made with, or of a subclass.
                return cast(JobConfig, super().parse_args(args))
        except SystemExit as exit:
            if not exit.code:
                raise
            message = first_part_of_box(printed.getvalue()).rstrip(".")
        if message.startswith("Unrecognized") and (stray := with_a_second_value(args)):
            message += f", after {stray}; lists of names are written with commas"
        raise UserValueError(f"{message}; {ALL_KEYS}")

    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
        # Upstream's version also logs a traceback when the file cannot be read.
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--job.config_file", "--job.config-file", dest="file", type=Path)
        try:
            file: Path | None = parser.parse_known_args(args)[0].file
        except argparse.ArgumentError as error:
            raise UserValueError(f"{error}; name a TOML file") from None
        if file is None:
            return None
        try:
            text = file.read_bytes()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserFileError(
                f"--job.config_file {file} cannot be read ({reason}); name a TOML file"
            ) from None
        try:
            return tomllib.loads(text.decode())
        except RecursionError:
            raise UserValueError(f"{file} is nested too deeply; mend it") from None
        # Python's own errors on bytes and numbers are ValueErrors, as is tomllib's.
        except ValueError as error:
            raise UserValueError(f"{file} is not TOML: {error}; mend it") from None

    def _maybe_add_custom_config(
        self, args: list[str], toml_values: dict[str, Any] | None
    ) -> type[upstream.JobConfig]:
        try:
            config_cls = super()._maybe_add_custom_config(args, toml_values)
        except (ImportError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise UserValueError(
                f"job.custom_config_module cannot be used: {error}; name a module on PYTHONPATH "
                "that holds a dataclass JobConfig"
            ) from error
        check_toml(config_cls, toml_values or {})
        _check_flags(config_cls, args)
        return config_cls


def _check_flags(config_cls: type, args: list[str]) -> None:
    """Check that every flag of a command line is a key, and that switches have no value.

    Raises:
        ValueError: one is unknown, and the closest known key is suggested; or a switch has a value.
    """
    keys = {leaf.key: leaf.kind for leaf in leaves(config_cls())}
    for word, following in itertools.zip_longest(args, args[1:], fillvalue="--"):
        flag, equals, value = word.partition("=")
        if not FLAG.match(flag) or flag == "--help":
            continue
        key = flag[2:].replace("-", "_")
        switch = key if key in keys else key.replace(".no_", ".", 1)
        # A negative number begins as an option of one letter does, of which there is -h alone.
        if keys.get(switch) is bool and (equals or not following.startswith(("--", "-h"))):
            given = value if equals else following
            raise UserValueError(
                f"{flag} takes no value, got {given!r}; pass --{switch}, or "
                f"--{'.no-'.join(switch.rsplit('.', 1))} for false"
            )
        if switch in keys and (switch == key or keys[switch] is bool):
            continue
        hint = _in_another_section(switch, keys) or _closest(switch, keys)
        raise UserValueError(f"unknown key '{flag}' on the command line; {hint}")


def _in_another_section(key: str, keys: Iterable[str]) -> str:
    """A hint at a key of the same name, in a similar section if one is; else an empty string."""
    name = key.rpartition(".")[2]
    namesakes = [each for each in keys if each.rpartition(".")[2] == name]
    found = difflib.get_close_matches(key, namesakes, n=1, cutoff=0.8) or namesakes
    return f"did you mean '{found[0]}'?" if found else ""


def _closest(key: str, known: Iterable[str]) -> str:
    """A hint for an unknown key: the most similar key, or those that there are."""
    known = list(known)
    if close := difflib.get_close_matches(key, known, n=1):
        return f"did you mean '{close[0]}'?"
    if len(known) > MOST_LISTED:
        return ALL_KEYS
    return f"known keys: {', '.join(known)}."


def check_toml(
    config_cls: type, values: dict[str, Any], section: str = "", whole: type | None = None
) -> None:
    """Check that every key of a TOML table is a field of ``config_cls`` and has that field's type.

    Args:
        section: the section that the table is, whose class is ``config_cls``.
        whole: the class of all sections, if this is one.

    Raises:
        ValueError: a key is unknown; the closest known one is suggested.
        TypeError: a value has another type than the key takes.
    """
    known = {f.name: f.type for f in fields(config_cls)}
    whole = whole or config_cls
    for key, value in values.items():
        path = f"{section}.{key}" if section else key
        if key not in known:
            keys = (leaf.key for leaf in leaves(whole()))
            hint = _in_another_section(path, keys) or _closest(key, known)
            raise UserValueError(f"unknown key '{path}' in the TOML file; {hint}")
        expected = known[key]
        if isinstance(expected, type) and is_dataclass(expected):
            if not isinstance(value, dict):
                raise UserTypeError(f"'{path}' is a section: write [{path}] in the TOML file")
            check_toml(expected, value, path, whole)
            continue
        if missed := missed_type(value, expected):
            raise UserTypeError(
                f"{path} = {value!r} in the TOML file is no value of this key; write {missed}"
            )
