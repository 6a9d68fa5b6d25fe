"""A contest as its TOML file fixes it before the runs: arms, rates, seeds, measure and rule."""

import hashlib
import json
import math
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from ..data.retrieval import find_task
from ..environment import environment
from ..errors import UserFileError, UserTypeError, UserValueError, in_place
from ..evaluation.distance import DistanceSettings, better_side
from ..job_config import JobConfig, check_toml, flatten, missed_type
from .recovery_plan import SETTINGS
from .settings import nested

DIRECTIONS, RULES = ("lower", "higher"), ("mean", "interval")
# The last held-out loss of a run's own validation, which every run has.
VALIDATION = "validation"
# Names of accuracies begin with this.
RETRIEVAL = "retrieval/"
RECORD, COPY = "contest.json", "contest.toml"
# An arm may name its stage in the short form. What all arms must share decides the measures.
OWN_KEYS = SETTINGS.keys() - {"lighthouse.stage"}
# [start] sets these for the arms.
INITIAL_KEYS = {"checkpoint.initial_load_path", "checkpoint.initial_load_model_only"}
SHARED_KEYS = ("validation.", "lighthouse.tokenizer", "model.hf_assets_path")
# An arm may change these of the model that it begins from, as extending one does.
ROTARY_KEYS = ("model.rope_theta", "model.rope_scaling")
# More than half of the timed steps have to be like all later ones.
LEAST_TIMED = 10


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        settings: section.key to value of what tells it from the others.
        rates: learning rates that are tried with one seed.
    """

    name: str
    settings: dict[str, Any]
    rates: list[float]


@dataclass(frozen=True)
class Start:
    """A run from whose weights all arms begin, one for each seed.

    Attributes:
        settings: section.key to value, besides those of every run.
        rate: its learning rate.
    """

    settings: dict[str, Any]
    rate: float


@dataclass(frozen=True)
class Contest:
    """A contest; the attributes bear the names of the file's keys.

    Attributes:
        path: the file.
        digest: SHA-256 of the file and of the base configuration, in hexadecimal.
        config: TOML file that all runs start from.
        settings: section.key to value, for every run.
        seed_keys: the keys that a seed sets.
        seeds: seeds of the runs at the best rate.
        rate_seeds: seeds of the runs that choose the rate.
        tuned_by: name of the measure that chooses the rate.
        primary: name of the measure that decides.
        direction: "lower" or "higher", the better side of the primary measure.
        margin: difference of the primary measure that matters.
        rule: "mean": the interval excludes zero and the mean reaches the margin; "interval": the
            whole interval lies beyond the margin.
        level: confidence of all comparisons together.
        compare: pairs of an arm and its control.
        gpu_seconds: GPU seconds of every run, from which the steps of each arm follow; 0: the steps
            are those of training.steps.
        timed_steps: steps of each stage in a run that tells times.
        start: the run that all arms begin from; None: they begin from nothing.
        retrieval: names of retrieval tasks.
        prompts: prompts of each task and length.
        distance: settings of ``evaluation.distance``.
    """

    path: Path
    digest: str
    config: Path
    settings: dict[str, Any]
    arms: dict[str, Arm]
    seed_keys: list[str]
    seeds: list[int]
    rate_seeds: list[int]
    tuned_by: str
    primary: str
    direction: str
    margin: float
    rule: str
    level: float
    compare: list[tuple[str, str]]
    gpu_seconds: float
    timed_steps: int
    start: Start | None
    retrieval: list[str]
    prompts: int
    distance: DistanceSettings

    @property
    def sign(self) -> int:
        """1 if higher is better in the primary measure, else -1."""
        return 1 if self.direction == "higher" else -1

    @property
    def tuning_sign(self) -> int:
        """The same for the measure that chooses the rate."""
        return 1 if _better_side(self.tuned_by) == "higher" else -1


# Each key with its type and its default; None: it must be given.
KEYS: dict[str, tuple[type | tuple[type, ...], Any]] = {
    "config": (str, None),
    "arms": (dict, None),
    "seeds": (list, None),
    "primary": (str, None),
    "direction": (str, None),
    "margin": ((int, float), None),
    "compare": (list, None),
    "rule": (str, "mean"),
    "level": ((int, float), 0.95),
    "settings": (dict, {}),
    "seed_keys": (list, ["debug.seed", "lighthouse.shuffle_seed"]),
    "rate_seed": ((int, list), 0),
    "tuned_by": (str, VALIDATION),
    "gpu_seconds": ((int, float), 0),
    "timed_steps": (int, 40),
    "start": (dict, {}),
    "retrieval": (list, ["passkey"]),
    "prompts": (int, 50),
    "distance": (dict, {}),
}


TYPE_NAMES = {
    str: "text in quotes",
    int: "a whole number",
    float: "a number",
    list: "a list in [ ]",
    dict: "a table",
}


def read_contest(path: Path) -> Contest:
    """Read and check a contest's file.

    Raises:
        ValueError, TypeError, OSError: the file does not describe a contest.
    """
    values = read_values(path)
    base = path.parent / values["config"]
    if not base.is_file():
        raise UserValueError(
            f"{path}: config = '{values['config']}' is no file; name it from the "
            "folder of the contest"
        )
    digest = hashlib.sha256(path.read_bytes() + b"\0" + base.read_bytes()).hexdigest()
    arms = {name: _arm(path, name, table) for name, table in values["arms"].items()}
    seeds, chosen = values["seeds"], values.pop("rate_seed") or values["seeds"][:1]
    rate_seeds = chosen if isinstance(chosen, list) else [chosen]
    for key, numbers in (("seeds", seeds), ("rate_seed", rate_seeds)):
        if not numbers or not all(map(_is_seed, numbers)) or len(set(numbers)) < len(numbers):
            raise UserValueError(f"{path}: {key} = {numbers} must be different numbers from 1 on")
    values |= {
        "config": base,
        "arms": arms,
        "settings": _settings(path, values["settings"]),
        "rate_seeds": rate_seeds,
        "compare": [_pair(path, pair, arms) for pair in values["compare"]],
        "start": None if values["start"] is None else _start(path, values["start"]),
        "distance": _distance(path, values["distance"]),
    }
    contest = Contest(path=path, digest=digest, **values)
    _check(contest)
    return contest


def read_values(path: Path) -> dict[str, Any]:
    """Every key of a contest's file, or its default, of the right type, and no further checked.

    Raises:
        ValueError, TypeError: the file is no TOML, or a key is missing, not known or of another
            type.
    """
    if not path.is_file():
        raise UserValueError(f"no such contest: {path}; pass a TOML file")
    try:
        tables = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserValueError(f"{path} is not TOML: {error}") from None
    if unknown := tables.keys() - KEYS.keys():
        raise UserValueError(f"{path}: '{min(unknown)}' is not known; use {', '.join(KEYS)}")
    values = {}
    for key, (kind, default) in KEYS.items():
        value = tables.get(key, default)
        if value is None:
            raise UserValueError(f"{path} names no {key}; add {key} = VALUE")
        if not isinstance(value, kind) or isinstance(value, bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise UserTypeError(f"{path}: {key} = {value!r} must be {TYPE_NAMES[kinds[-1]]}")
        values[key] = value
    # An empty table is a mistake, and no table is none.
    return values | {"start": tables.get("start")}


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _settings(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    settings = flatten(table)
    if bare := [key for key in settings if "." not in key]:
        raise UserValueError(f"{path}: '{bare[0]}' names no section; write section.{bare[0]}")
    with in_place(str(path)):
        check_toml(JobConfig, nested(settings))
    return settings


def _arm(path: Path, name: str, table: Any) -> Arm:
    if not isinstance(table, dict):
        raise UserTypeError(f"{path}: arms.{name} must be a table; write [arms.{name}]")
    if not name.replace("_", "").replace("-", "").isalnum():
        raise UserValueError(f"{path}: arm '{name}' names a folder; use letters, digits, _ and -")
    if (rates := table.get("rates")) is None:
        raise UserValueError(f"{path}: arms.{name} names no rates; add rates = [1e-3, 2e-3]")
    numbers = rates and isinstance(rates, list) and all(isinstance(rate, float) for rate in rates)
    # Runs are named by six digits of their rate.
    distinct = numbers and len(set(map("{:g}".format, rates))) == len(rates)
    if not distinct or not min(rates) > 0:
        raise UserValueError(
            f"{path}: arms.{name}.rates = {rates!r} must be different learning rates, such as "
            "[1e-3, 2e-3]"
        )
    settings = _settings(path, {key: value for key, value in table.items() if key != "rates"})
    return Arm(name, settings, sorted(rates))


def _start(path: Path, table: dict[str, Any]) -> Start:
    rate = table.get("rate")
    if not isinstance(rate, float) or not 0 < rate < math.inf:
        raise UserValueError(f"{path}: start.rate = {rate!r} must be a learning rate, such as 1e-3")
    settings = _settings(path, {key: value for key, value in table.items() if key != "rate"})
    if "training.steps" not in settings:
        raise UserValueError(f"{path}: [start] names no training.steps; add training.steps = N")
    return Start(settings, rate)


def _pair(path: Path, pair: Any, arms: dict[str, Arm]) -> tuple[str, str]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(n, str) for n in pair):
        raise UserTypeError(f'{path}: compare holds {pair!r}; write ["ARM", "CONTROL"]')
    for name in pair:
        if name not in arms:
            raise UserValueError(f"{path}: compare names '{name}'; the arms are {', '.join(arms)}")
    if pair[0] == pair[1]:
        raise UserValueError(f"{path}: compare sets '{pair[0]}' against itself; name two arms")
    return pair[0], pair[1]


def _distance(path: Path, table: dict[str, Any]) -> DistanceSettings:
    names = {field.name for field in fields(DistanceSettings)}
    if unknown := table.keys() - names:
        raise UserValueError(
            f"{path}: distance.{min(unknown)} is not known; use {', '.join(sorted(names))}"
        )
    kinds = get_type_hints(DistanceSettings)
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
    }
    for key, value in values.items():
        if missed := missed_type(value, kinds[key]):
            raise UserTypeError(f"{path}: distance.{key} = {table[key]!r} must be {missed}")
    return DistanceSettings(**values)


def _is_share(text: str) -> bool:
    return bool(re.fullmatch(r"\d+(\.\d+)?", text)) and 0 < float(text) <= 100


def _better_side(measure: str) -> str | None:
    """The better side, "lower" or "higher"; None for unknown names."""
    if measure.startswith(RETRIEVAL):
        return "higher"
    return "lower" if measure == VALIDATION else better_side(measure)


def _check(contest: Contest) -> None:
    for key, known in (("direction", DIRECTIONS), ("rule", RULES)):
        if (value := getattr(contest, key)) not in known:
            raise UserValueError(f"{contest.path}: {key} = '{value}'; use {' or '.join(known)}")
    side = _better_side(contest.primary)
    if side not in (None, contest.direction):
        raise UserValueError(
            f"{contest.path}: direction = '{contest.direction}', but {side} is better in primary = "
            f"'{contest.primary}'; write direction = \"{side}\""
        )
    if not 0 <= contest.margin < math.inf:
        raise UserValueError(f"{contest.path}: margin = {contest.margin} must be at least 0")
    names = all(isinstance(key, str) for key in contest.seed_keys)
    if not names or OWN_KEYS & {*contest.seed_keys} or "optimizer.lr" in contest.seed_keys:
        raise UserValueError(
            f"{contest.path}: seed_keys = {contest.seed_keys} must name keys that seeds set, such "
            "as debug.seed"
        )
    if not contest.seed_keys:
        raise UserValueError(
            f"{contest.path}: seed_keys = [] makes all seeds one; name a key, or leave it out"
        )
    if not 0.5 <= contest.level < 1:
        raise UserValueError(f"{contest.path}: level = {contest.level} must be from 0.5 to below 1")
    if not contest.compare or len(set(map(frozenset, contest.compare))) < len(contest.compare):
        raise UserValueError(f"{contest.path}: compare must hold pairs of arms, each once")
    if len(set(contest.retrieval)) < len(contest.retrieval):
        raise UserValueError(f"{contest.path}: retrieval = {contest.retrieval} names a task twice")
    if not 0 <= contest.gpu_seconds < math.inf:
        raise UserValueError(f"{contest.path}: gpu_seconds = {contest.gpu_seconds} must be above 0")
    if contest.timed_steps < LEAST_TIMED:
        raise UserValueError(
            f"{contest.path}: timed_steps = {contest.timed_steps} must be at least {LEAST_TIMED}, "
            "because the first ones compile"
        )
    if contest.prompts < 1:
        raise UserValueError(f"{contest.path}: prompts = {contest.prompts} must be at least 1")
    with in_place(f"{contest.path}: retrieval = {contest.retrieval}"):
        for task in contest.retrieval:
            find_task(task)
    with in_place(f"{contest.path}: seed_keys = {contest.seed_keys}"):
        check_toml(JobConfig, nested(dict.fromkeys(contest.seed_keys, 1)))
    tables = {"settings": contest.settings}
    tables |= {f"arms.{name}": arm.settings for name, arm in contest.arms.items()}
    tables |= {"start": contest.start.settings} if contest.start else {}
    # All measure the same text, and go on with the weights of [start].
    shared = (*SHARED_KEYS, "model.") if contest.start else SHARED_KEYS
    for name, settings in tables.items():
        varied = {"optimizer.lr", *contest.seed_keys}
        varied |= {"training.steps"} if contest.gpu_seconds and name != "start" else set()
        varied |= INITIAL_KEYS if contest.start else set()
        if clash := varied & settings.keys():
            raise UserValueError(
                f"{contest.path}: {name} sets {min(clash)}, which runs vary; leave it out"
            )
        for key in settings:
            if key in OWN_KEYS or key.startswith("job."):
                raise UserValueError(
                    f"{contest.path}: {name} sets {key}, which the contest does; leave it out"
                )
            # No measure is taken of the run that all begin from.
            own = name == "settings" or (name == "start" and key.startswith("validation."))
            own |= bool(contest.start) and name != "start" and key in ROTARY_KEYS
            if key.startswith(shared) and not own:
                place = f"{contest.path}: {name}"
                raise UserValueError(f"{place} sets {key}, which all runs share; use [settings]")
        for stage in settings.get("lighthouse.schedule", ()):
            for share in re.findall(r"(?<!\S)until=(\S*)%(?!\S)", stage):
                if not _is_share(share):
                    raise UserValueError(
                        f"{contest.path}: {name} says until={share}%; write a share of the steps "
                        "above 0% and at most 100%, such as until=90%"
                    )
            timed = contest.gpu_seconds and name != "start"
            if timed and (found := re.search(r"\buntil=[^%\s]+(?!\S)", stage)):
                raise UserValueError(
                    f"{contest.path}: {name} says {found[0]}, and gpu_seconds decides how many "
                    "steps there are; write a share of them, such as until=90%"
                )


def fix(contest: Contest, output: Path, rest: dict[str, Any] | None = None) -> None:
    """Write what rules the results into their new folder, or compare it with what rules them.

    Args:
        rest: what results depend on besides the file, by name; None to leave it as it is.

    Raises:
        ValueError, OSError: the results there were begun by another file, with other overrides or
            on other text, or their record is damaged.
    """
    record = output / RECORD
    if record.exists():
        known = read_record(record)
        if known.get("sha256") != contest.digest:
            raise UserValueError(
                f"{contest.path} or its base has changed since the results in {output} were begun "
                f"({COPY} there is the file as it was); undo the change, or pass --output FOLDER"
            )
        for name, value in (rest or {}).items():
            if known.get(name, value) != value:
                raise UserValueError(
                    f"the results in {output} were begun with {name} {known[name]}, and now there "
                    f"are {value}; restore them, or pass --output FOLDER"
                )
        return
    if found := sorted([*output.glob("*.csv"), *output.glob("*/config.json")]):
        raise UserFileError(
            f"{output} holds {found[0].relative_to(output)}, but no {RECORD} that says whose it "
            "is; restore it, or pass --output FOLDER"
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / COPY).write_bytes(contest.path.read_bytes())
    known = {"sha256": contest.digest, "file": contest.path.name, "environment": environment()}
    write_record(record, known | (rest or {}))


def write_record(path: Path, values: Any) -> None:
    """Write values as JSON, all or none."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1))
    partial.replace(path)


def read_record(path: Path) -> Any:
    """Values that ``write_record`` wrote.

    Raises:
        OSError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserFileError(f"{path} cannot be read ({error}); restore or remove it") from None
