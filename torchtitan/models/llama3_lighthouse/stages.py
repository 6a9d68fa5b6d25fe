"""The stages of a run: which attention, length and settings of the method each step trains with.

``lighthouse.schedule`` names them in order. ``lighthouse.stage`` and ``dense_from_step`` are the
short form of two stages of one length.
"""

import copy
import math
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, cast, get_type_hints

from lighthouse import LighthouseConfig

from .errors import UserTypeError, UserValueError
from .job_config import NO_SCHEDULE, JobConfig, Lighthouse

ATTENTIONS = ("lighthouse", "dense")
KEY = "lighthouse.schedule"
# A stage with this word may be the last one although it is not dense.
LAST = "last"
# Types of the method's settings, which a stage may change.
METHOD_TYPES = {field.name: get_type_hints(LighthouseConfig)[field.name]
                for field in fields(LighthouseConfig)}  # fmt: skip
# The attentions that a schedule names, and what a stage may set of each.
SETTINGS: dict[str, dict[str, Any]] = {
    "lighthouse": METHOD_TYPES,
    "window": {"window": int, "key_stride": int},
    "dense": {},
}
NAMES = tuple(SETTINGS)
# Their least values. A stage may turn off the skips that [lighthouse] turns on.
COUNTS = {"until": 1, "seq_len": 1, "local_batch_size": 1, "skip_positions": 0}
# From the stage that has it on, YaRN scales the rotary embedding by this factor, in plain digits.
YARN, MOST_FACTOR = "yarn_factor", 10**6
DECIMAL = re.compile(r"[0-9]+(\.[0-9]+)?")
# Numbers beyond this, and longer texts, are not shown in full.
MOST_DIGITS, MOST_SHOWN = 18, 100
# Each stage has a configuration of its own, which is checked before anything is built.
MOST_STAGES = 100


def name_of(config: JobConfig, attention: str) -> str:
    """The name in a schedule of "dense" or "lighthouse", which may be a window."""
    return config.lighthouse.attention if attention == "lighthouse" else attention


@dataclass(frozen=True)
class Stage:
    """Consecutive steps that train in one way.

    Attributes:
        attention: "lighthouse" or "dense"; the first names the window too, if it stands alone.
        first, last: numbers of its first and last step.
        config: the run's configuration with the values of this stage.
        text: the stage as a schedule names it, or "" in the short form.
    """

    attention: str
    first: int
    last: int
    config: JobConfig
    text: str = ""

    @property
    def seq_len(self) -> int:
        return self.config.training.seq_len

    @property
    def name(self) -> str:
        """Its attention as a schedule names it."""
        return name_of(self.config, self.attention)

    @property
    def dense_steps(self) -> int:
        """Steps that train under dense attention, those of ``lighthouse.dense_every`` included."""
        every = self.config.lighthouse.dense_every
        if self.attention == "dense":
            return self.last - self.first + 1
        return self.last // every - (self.first - 1) // every if every else 0

    @property
    def steps(self) -> dict[str, int]:
        """How many steps train under each attention that the stage uses."""
        dense = {"dense": self.dense_steps} if self.dense_steps else {}
        if self.attention == "dense":
            return dense
        return dense | {self.attention: self.last - self.first + 1 - self.dense_steps}

    @property
    def has_own_scaling(self) -> bool:
        """Whether its rotary embedding is scaled by another rule than the run's."""
        return any(word.partition("=")[0] == YARN for word in self.text.split())

    @property
    def positions(self) -> int:
        """The most rotary positions of its sequences."""
        return max(self.seq_len, self.config.lighthouse.skip_positions)

    @property
    def says_last(self) -> bool:
        return LAST in self.text.split()


def stages_of(config: JobConfig) -> tuple[Stage, ...]:
    """The stages of a run in order, of which each has at least one step.

    Raises:
        ValueError: ``lighthouse.schedule`` does not say what the stages are.
    """
    section, steps = config.lighthouse, config.training.steps
    if section.schedule:
        _check_short_form(section)
        return _scheduled(config)
    if section.stage != "auto":
        return (Stage(section.stage, 1, steps, config),)
    switch = min(section.dense_from_step, steps)
    found = [Stage("lighthouse", 1, switch, config)] if switch else []
    return (*found, Stage("dense", switch + 1, steps, config)) if switch < steps else tuple(found)


def with_method_of(config: JobConfig, step: int) -> JobConfig:
    """The configuration, with the method's settings of the stage of ``step`` and no schedule.

    Raises:
        ValueError: as ``stages_of``.
    """
    found = copy.deepcopy(config)
    found.lighthouse = stage_at(step, stages_of(config)).config.lighthouse
    found.lighthouse.stage = Lighthouse().stage
    return found


def distinct_stages(config: JobConfig) -> list[Stage]:
    """The first stage of each configuration, in order.

    Raises:
        ValueError: as ``stages_of``.
    """
    found: list[Stage] = []
    for stage in stages_of(config):
        if all(stage.config != other.config for other in found):
            found.append(stage)
    return found


@contextmanager
def naming(stage: Stage) -> Generator[None]:
    """Let the messages of checks on a stage's configuration begin with the stage.

    These messages name the keys of a run with this stage alone, some of which the stage itself has.
    """
    try:
        yield
    except (UserValueError, UserTypeError) as error:
        message = str(error)
        own = [
            word
            for word in stage.text.split()
            if re.search(rf"(?<!validation\.)\b{word.partition('=')[0]}\b", message) and "=" in word
        ]
        hint = f"; the stage itself says {' '.join(own)}, so change that" if own else ""
        raise type(error)(f"{named(stage)}{message}{hint}") from None


def named(stage: Stage) -> str:
    """The beginning of a message about one stage; empty in the short form."""
    return f"{KEY}, stage {_shown(stage.text)}: " if stage.text else ""


def stage_at(step: int, stages: Sequence[Stage]) -> Stage:
    """The stage of step number ``step``; the first step is 1. The last stage has no end here."""
    return next((stage for stage in stages if step <= stage.last), stages[-1])


def attention_at(step: int, stage: Stage) -> str:
    """The attention, "lighthouse" or "dense", that step number ``step`` of a stage uses."""
    every = stage.config.lighthouse.dense_every
    return "dense" if every and step % every == 0 else stage.attention


def _check_short_form(section: Lighthouse) -> None:
    """Check that nothing but the schedule names stages."""
    for key in ("stage", "dense_from_step", "attention"):
        given, default = getattr(section, key), getattr(Lighthouse(), key)
        if given != default:
            raise UserValueError(
                f"lighthouse.{key} = {given!r} does not go with {KEY}, which names the stages; "
                f"leave one of the two out: --{KEY} {NO_SCHEDULE} turns the schedule off, "
                f"--lighthouse.{key} {default} keeps it"
            )


def _scheduled(config: JobConfig) -> tuple[Stage, ...]:
    found: list[Stage] = []
    steps, count = config.training.steps, len(config.lighthouse.schedule)
    if count > MOST_STAGES:
        raise UserValueError(f"{KEY} has {count:,} stages; write {MOST_STAGES} or fewer")
    for text in config.lighthouse.schedule:
        if found and found[-1].last == steps:
            raise _fault(found[-1].text, f"ends at the run's last step, {steps}, and a stage "
                         "follows", "give it an earlier until")  # fmt: skip
        found.append(_stage(text, config, found))
    _check_end(found, steps)
    return tuple(found)


def _check_end(stages: Sequence[Stage], steps: int) -> None:
    for stage in stages[:-1]:
        if stage.says_last:
            raise _fault(stage.text, f"says {LAST}, and a stage follows", f"leave {LAST} out")
    end = stages[-1]
    if end.last < steps:
        raise _fault(end.text, f"ends at step {end.last}, before training.steps = {steps}",
                     "leave its until out, or add a stage")  # fmt: skip
    if end.attention != "dense" and not end.says_last:
        raise _fault(end.text, "comes last and is not dense, so export refuses its checkpoints",
                     f"add a dense stage, or the word {LAST} if that is meant")  # fmt: skip


def _stage(text: str, config: JobConfig, before: Sequence[Stage]) -> Stage:
    """The stage that ``text`` names, which follows those of ``before``."""
    words, steps = text.split(), config.training.steps
    after = before[-1].last if before else 0
    name = words[0] if words else ""
    if name not in NAMES:
        fix = f"begin with one of {', '.join(NAMES)}"
        if name.lower() == NO_SCHEDULE:
            fix += f", or give {NO_SCHEDULE} by itself, in small letters, for no schedule"
        raise _fault(text, f"{_shown(name)} is no attention", fix)
    if words.count(LAST) > 1:
        raise _fault(text, f"{LAST} stands there twice", "leave one of them out")
    values = _values(text, [word for word in words[1:] if word != LAST])
    last = values.pop("until", steps)
    if not after < last:
        raise _fault(text, f"ends at step {last}, and the stage before it at step {after}",
                     "let until rise from stage to stage")  # fmt: skip
    if last > steps:
        raise _fault(text, f"ends at step {last}, after training.steps = {steps}",
                     f"write until={steps} or less, or set training.steps to {last}")  # fmt: skip
    factor = values.pop(YARN, None)
    changed = _changed(text, config, name, values)
    changed.model.rope_scaling = _scaling(text, factor, config, before)
    return Stage("dense" if name == "dense" else "lighthouse", after + 1, last, changed, text)


def _values(text: str, words: list[str]) -> dict[str, Any]:
    """The settings of a stage by name."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        known = [*COUNTS, YARN, *SETTINGS["lighthouse"] | SETTINGS["window"]]
        if not equals or key not in known:
            raise _fault(text, f"{_shown(word)} is not understood",
                         f"write {LAST}, or KEY=VALUE with one of {', '.join(known)}")  # fmt: skip
        if key in found:
            raise _fault(text, f"{key} stands there twice", "leave one of them out")
        found[key] = _typed(text, key, value)
    return found


def _typed(text: str, key: str, value: str) -> Any:
    if key == YARN:
        return _factor(text, value)
    if METHOD_TYPES.get(key, int) is not int:
        return value
    if not (value.isascii() and value.isdigit() and len(value) <= MOST_DIGITS):
        raise _fault(text, f"{key} = {_shown(value)} is no whole number of at most {MOST_DIGITS} "
                     "digits", f"write {key}=NUMBER")  # fmt: skip
    number = int(value)
    if number < COUNTS.get(key, 0):
        raise _fault(text, f"{key} = {number} must be at least {COUNTS[key]}", "raise it")
    return number


def _factor(text: str, value: str) -> float:
    factor = float(value) if DECIMAL.fullmatch(value) else math.nan
    # Other digits would be lost in model.rope_scaling.
    factor = float(f"{factor:.12g}")
    if not 1 < factor <= MOST_FACTOR:
        raise _fault(text, f"{YARN} = {_shown(value)} must be a number above 1 and at most "
                     f"{MOST_FACTOR:,}", "write digits, such as 12 or 2.5")  # fmt: skip
    return factor


def _scaling(text: str, factor: float | None, config: JobConfig, before: Sequence[Stage]) -> str:
    """``model.rope_scaling`` of a stage with ``YARN`` = ``factor``, or of the run where it is None.

    YaRN stretches the positions that the stages before it trained at.
    """
    own = config.model.rope_scaling
    scaled = [stage for stage in before if stage.has_own_scaling]
    if factor is None:
        if scaled:
            raise _fault(
                text,
                f"lacks the {YARN} of the stage before it, and no model goes back to a rotary "
                "embedding that it has left",
                f"repeat {YARN}",
            )
        return own
    if not before:
        raise _fault(
            text,
            f"{YARN} stretches the sequences of an earlier stage, and this is the first",
            "leave it out, or set model.rope_scaling, such as 'yarn factor=4', for the whole run",
        )
    length = max(stage.positions for stage in before if not stage.has_own_scaling)
    found = f"yarn factor={factor:.12g} original_max_position_embeddings={length}"
    if scaled and scaled[0].config.model.rope_scaling != found:
        earlier = scaled[0].config.model.rope_scaling
        raise _fault(text, f"makes it '{found}', and an earlier stage '{earlier}'",
                     f"give all the same {YARN}")  # fmt: skip
    return found


def _changed(text: str, config: JobConfig, name: str, values: dict[str, Any]) -> JobConfig:
    """The run's configuration with what a stage changes."""
    changed = copy.deepcopy(config)
    # The configuration of one stage is that of a run with one.
    changed.lighthouse.schedule = []
    changed.lighthouse.stage = "dense" if name == "dense" else "lighthouse"
    training, section = changed.training, changed.lighthouse
    for key in (key for key in values if key not in COUNTS):
        if key not in SETTINGS[name]:
            raise _fault(text, f"{key} is not read under attention '{name}'", "leave it out")
        setattr(section, key, values[key])
    if name != "dense":
        section.attention = cast(Any, name)
    length = values.get("seq_len", training.seq_len)
    if length > training.seq_len:
        raise _fault(
            text,
            f"seq_len = {length} exceeds training.seq_len = {training.seq_len}, the longest "
            "sequence that the model is built for",
            f"lower it, or set training.seq_len to {length}",
        )
    batch = training.local_batch_size
    tokens = batch * training.seq_len
    if "local_batch_size" in values:
        training.local_batch_size = values["local_batch_size"]
    elif tokens % length:
        raise _fault(
            text,
            f"seq_len = {length} does not divide the {tokens:,} tokens of a local batch of "
            f"{batch} x {training.seq_len:,}",
            "write a length that does, or local_batch_size=SEQUENCES too",
        )
    else:
        training.local_batch_size = tokens // length
    if training.global_batch_size > 0:
        # As many passes a step in every stage.
        training.global_batch_size = training.global_batch_size * training.local_batch_size // batch
    training.seq_len = length
    section.skip_positions = _skipped(text, config, length, values)
    return changed


def _skipped(text: str, config: JobConfig, length: int, values: dict[str, Any]) -> int:
    """The positions that a stage's sequences are spread over, or 0 if they are as long."""
    most = values.get("skip_positions", config.lighthouse.skip_positions)
    longest = config.training.seq_len
    if most > longest:
        raise _fault(
            text,
            f"skip_positions = {most} exceeds training.seq_len = {longest}, the positions that "
            "the model is built for",
            f"lower it, or set training.seq_len to {most}",
        )
    if values.get("skip_positions") and most <= length:
        raise _fault(
            text,
            f"skip_positions = {most} leaves sequences of {length} tokens nothing to skip",
            "write more positions than seq_len, or leave it out",
        )
    return most if most > length else 0


def _fault(text: str, problem: str, fix: str) -> UserValueError:
    return UserValueError(f"{KEY}, stage {_shown(text)}: {problem}; {fix}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}...")
