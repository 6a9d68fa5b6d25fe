"""Random configurations over all keys, typical and hostile, and how a run of each ends.

``draw`` makes command lines, and ``run_one`` trains on one in a fork of this process, which has
imported the trainer before.
"""

import contextlib
import json
import math
import os
import random
import resource
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from lighthouse_commands.train import check
from torchtitan.models.llama3_lighthouse import train as trainer
from torchtitan.models.llama3_lighthouse.errors import UserError
from torchtitan.models.llama3_lighthouse.job_config import (
    JobConfig,
    Lighthouse,
    LighthouseConfigManager,
    leaves,
)
from torchtitan.models.llama3_lighthouse.metrics import LOSS, METRICS_FILE

CONFIG = Path(__file__).parents[2] / "train_configs/debug_cpu.toml"
# Three tiny steps, of which the last one is dense.
SMALL = {
    "training.steps": "3",
    "training.seq_len": "256",
    "lighthouse.top_k": "16",
    "lighthouse.picks_per_stratum": "16",
    "lighthouse.dense_from_step": "2",
    "validation.seq_len": "256",
    "validation.local_batch_size": "1",
    "validation.steps": "2",
    "checkpoint.interval": "2",
}
SCHEDULE = "lighthouse.schedule"
OFF = ("metrics.enable_tensorboard", "checkpoint.enable")
# Every run is given its own file.
NOT_DRAWN = ("job.config_file",)
# A word of a command line; the next one is a TOML text, which ``run_one`` puts into a file.
TOML = "--toml"
MEMORY_LIMIT = 12 * 2**30
HUGE, NUL = str(2**70), "with\0nul"
TYPICAL: dict[type, tuple[str, ...]] = {
    int: ("0", "1", "2"),
    float: ("0", "0.5", "1"),
    str: (),
}
HOSTILE: dict[type, tuple[str, ...]] = {
    int: ("-1", "-5", "7", str(2**31), str(10**13), str(2**63), HUGE, "1.5", ""),
    float: ("-1", "1e-30", "1e30", "nan", "inf", "-inf", HUGE, "many", ""),
    str: ("", " ", "nonsense", NUL, "h\u00e9 \u2603", "/proc/no/such", "x" * 300, "a/../b"),
}
# Words of ``lighthouse.schedule``: typical ones, of which one is wrong for SMALL, and hostile ones.
SCHEDULES = (
    "dense",
    "dense until=1 seq_len=128,lighthouse until=2,dense",
    "window last window=16",
    "dense until=1 seq_len=64,window until=2 window=8,dense",
    "lighthouse until=9,dense",
)
BAD_SCHEDULES = (
    "dense,dense", "lighthouse", "model,loss", "dense until=1e3", "dense until=-1,dense", "", ",",
    "dense until=1 seq_len=96,dense", f"dense until={HUGE}", f"dense {NUL}", " ", "dense until",
    "dense until=1 seq_len=1 local_batch_size=256,dense", "lighthouse until=1 top_k=3,dense",
    "window until=1,dense",
)  # fmt: skip
# Items of lists that are no choices.
LISTS: dict[type, tuple[Any, ...]] = {str: ("model", "loss"), int: (0, 5)}
# No key means any of these.
NEVER = ("nan", "inf", "-inf", HUGE, NUL)
BROKEN_TOML = (
    "[training\nsteps = 3",
    "[training]\nsteps = 3\nsteps = 4",
    "[training]\nsteps = true",
    "[optimizer]\nlr = true",
    "[optimizer]\nlr = nan",
    '[training]\nsteps = "3"',
    "[training]\nsteps = 2020-01-01",
    "training = 3",
    '[job]\ndescription = "\\u0000"',
    "[lighthouse]\ndense_layers = [true]",
    "a = " + "[" * 5000,
    "[training]\nsteps = " + "9" * 5000,
    "[validation]\nsteps = 0",
    "[training.dataloader]\nworkers = 1",
    "\u0000",
)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        kind: "trained"; "refused", in one message that names a key or section that was changed;
            "unclear", in a message that names none; "traceback"; "hang"; or "silent", where it
            trained on a value that no key means, or with a loss or learning rate out of order.
        message: the last words of the run.
        seconds: how long it took.
    """

    kind: Literal["trained", "refused", "unclear", "traceback", "hang", "silent"]
    message: str
    seconds: float


def draw(seed: int, count: int) -> list[list[str]]:
    """``count`` command lines for ``lighthouse train``, each with one to three keys changed."""
    generator = random.Random(seed)
    keys = [leaf for leaf in leaves(JobConfig()) if leaf.key not in NOT_DRAWN]
    return [_line(generator, keys) for _ in range(count)]


def _line(generator: random.Random, keys: list[Any]) -> list[str]:
    if generator.random() < 0.04:
        return [TOML, generator.choice(BROKEN_TOML)]
    changed: dict[str, list[str]] = {}
    # One hostile value ends a run. Some lines have none, so that keys meet one another in training.
    only_typical = generator.random() < 0.4
    for leaf in generator.sample(keys, 3 if only_typical else generator.choice((1, 1, 2, 3))):
        values = values_of(leaf.key, leaf.kind, leaf.default, only_typical)
        if values:
            changed[leaf.key] = generator.choice(values)
    # Keys of a section that is off are read by no one; half of the time it is on.
    for section in ("checkpoint", "validation", "profiling"):
        switch = f"--{section}.enable{'_profiling' if section == 'profiling' else ''}"
        if any(key.startswith(f"{section}.") for key in changed) and generator.random() < 0.7:
            changed.setdefault(switch[2:], [switch])
    # The compiler of kernels takes minutes; what may be compiled shows with the one that does not.
    if changed.get("compile.enable") == ["--compile.enable"]:
        changed.setdefault("compile.backend", ["--compile.backend", "eager"])
    # Validating the whole held-out text takes minutes, which would read as a hang.
    if changed.get("validation.steps") == ["--validation.steps", "-1"]:
        changed["validation.enable"] = ["--validation.no-enable"]
    return [word for words in changed.values() for word in words]


def values_of(key: str, kind: Any, default: Any, only_typical: bool) -> list[list[str]]:
    """Words that set ``key`` to a typical value of its type, or to a boundary or hostile one."""
    inner = [part for part in get_args(kind) if part is not type(None)]
    if key == SCHEDULE:
        words = SCHEDULES if only_typical else SCHEDULES + BAD_SCHEDULES
        return [[f"--{key}", word] for word in words]
    if kind is bool:
        section, _, name = key.rpartition(".")
        return [[f"--{key}"], [f"--{section}.no-{name}"]]
    if get_origin(kind) is Literal:
        typical, others = [[str(choice)] for choice in inner], [["nonsense"], [""]]
    elif get_origin(kind) is list:
        items = get_args(inner[0]) or LISTS.get(inner[0], ("a",))
        typical = [[str(items[0])], list(map(str, items))]
        if inner[0] is str:
            typical = [[",".join(words)] for words in typical]
        others = [
            ["nonsense"],
            ["model,model"],
            ["0", "0"],
            ["99"],
            ["-1"],
            [HUGE],
            [NUL],
            [""],
            [],
        ]
    elif inner:
        words = values_of(key, inner[0], default, only_typical)
        return words if default is None else [*words, [f"--{key}", "None"]]
    else:
        usual = SMALL.get(key, default)
        typical, others = TYPICAL[kind], HOSTILE[kind]
        typical = [[value] for value in (*typical, *([str(usual)] if usual else []))]
        others = [[value] for value in others]
    return [[f"--{key}", *value] for value in (typical if only_typical else typical + others)]


def command_line(arguments: list[str], folder: Path) -> list[str]:
    """The trainer's whole command line, with output in ``folder``."""
    if arguments and arguments[0] == TOML:
        file = folder / "config.toml"
        file.write_text(arguments[1])
        return ["--job.config_file", str(file), "--job.dump_folder", str(folder / "dump")]
    given = {word[2:] for word in arguments if word.startswith("--")}
    line = ["--job.config_file", str(CONFIG)]
    settings = {**SMALL, "job.dump_folder": str(folder / "dump")}
    if SCHEDULE in given:
        # Its default, as a schedule takes its place.
        settings["lighthouse.dense_from_step"] = str(Lighthouse().dense_from_step)
    for key, value in settings.items():
        if key not in given:
            line += [f"--{key}", value]
    for key in OFF:
        section, _, name = key.rpartition(".")
        if not given & {key, f"{section}.no-{name}"}:
            line.append(f"--{section}.no-{name}")
    return line + arguments


def run_one(arguments: list[str], folder: Path, timeout: float) -> Outcome:
    """Train on a drawn command line in a forked process, and say how it ended.

    Args:
        folder: an empty folder of its own; takes output and log.
        timeout: seconds after which the run counts as one that hangs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, start = folder / "log.txt", time.monotonic()
    line = command_line(arguments, folder)
    child = os.fork()
    if child == 0:
        _child(line, folder, log)
    code = _wait(child, timeout)
    seconds = time.monotonic() - start
    message = (folder / "message.txt").read_text() if (folder / "message.txt").exists() else ""
    if code is None:
        return Outcome("hang", _tail(log), seconds)
    if code == 1 and message:
        return Outcome("refused" if _names(message, arguments) else "unclear", message, seconds)
    if code != 0:
        return Outcome("traceback", _tail(log), seconds)
    fault = fault_of(arguments, folder)
    return Outcome("silent" if fault else "trained", fault or "", seconds)


def _child(line: list[str], folder: Path, log: Path) -> None:
    """Do in a fork what ``lighthouse train`` and its one training process do."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        torch.set_num_threads(1)
        os.environ |= {
            "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0",
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(get_free_port()),
        }  # fmt: skip
        # Upstream waits two seconds at the end for other ranks, of which there are none.
        trainer.upstream.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
        trainer.set_up_console()
        check(line, 1, trainer.device_type)
        trainer.run(LighthouseConfigManager().parse_args(line))
        code = 0
    except UserError as error:
        (folder / "message.txt").write_text(str(error))
        code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(child: int, timeout: float) -> int | None:
    """The exit code of a process, negative for a signal; None, and its end, after ``timeout``."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _names(message: str, arguments: list[str]) -> bool:
    """Whether a message names a key that was changed, or its section."""
    if arguments[0] == TOML:
        return "TOML" in message or ".toml" in message or "." in message
    flags = [word[2:].replace(".no-", ".") for word in arguments if word.startswith("--")]
    keys = [flag.replace("-", "_") for flag in flags]
    said = message.replace("-", "_")
    return any(key in said or f"[{key.partition('.')[0]}]" in said for key in keys)


def fault_of(arguments: list[str], folder: Path) -> str | None:
    """What a run that came to its end should not have accepted or done; None if nothing."""
    never = [word for word in arguments if word in NEVER]
    if never:
        return f"trained with {never[0]!r}"
    rows = list(_metrics(folder))
    for row in rows:
        loss, rate = row.get(LOSS), row.get("lr")
        if loss is not None and not math.isfinite(loss):
            return f"step {row['step']} has loss {loss}"
        if rate is not None and not 0 <= rate <= 1:
            return f"step {row['step']} has learning rate {rate}"
    losses = [row[LOSS] for row in rows if LOSS in row]
    # An optimizer that is drawn may be of no use, and still be what was asked for.
    drawn = any(word.startswith("--optimizer.") for word in arguments)
    if not drawn and losses and losses[-1] > losses[0] + 3:
        return f"the loss rose from {losses[0]} to {losses[-1]}"
    return None


def _metrics(folder: Path) -> Iterator[dict[str, Any]]:
    for file in folder.rglob(METRICS_FILE):
        yield from map(json.loads, file.read_text().splitlines())


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:] if log.exists() else ""


def run_all(
    seed: int,
    count: int,
    folder: Path,
    timeout: float,
    tell: Callable[[int, list[str], Outcome], None],
) -> None:
    """Run ``count`` drawn configurations one after another, and ``tell`` of each as it ends."""
    for number, arguments in enumerate(draw(seed, count)):
        tell(number, arguments, run_one(arguments, folder / str(number), timeout))
