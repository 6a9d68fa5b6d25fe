"""Parts that commands share: reading a command line, and arguments that many of them take."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

FLAG = re.compile(r"--?[A-Za-z]")
# A key of the configuration, --section.key, as opposed to a flag of the command itself.
OVERRIDE = re.compile(r"--[A-Za-z_][\w-]*\.")
# The trainer's own list is in ``stages``, whose import takes seconds.
ATTENTIONS = ("dense", "lighthouse")
OVERRIDES_HELP = (
    "Configuration keys, --section.key value, come last and win over what the configuration says."
)


class CommandError(Exception):
    """A user's mistake that a command finds before it imports the trainer."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


class CommandParser(argparse.ArgumentParser):
    """A parser that shows its description as it is written and takes no shortened flags.

    Args:
        overrides: those of the command line, one of which may have taken a word of the command.
    """

    def __init__(self, overrides: Sequence[str] = (), **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)
        self.overrides = overrides

    def error(self, message: str) -> NoReturn:
        missing = re.search(r"required: ([A-Z]+)", message)
        if missing and (taken := taken_by_an_override(self.overrides)):
            message += f"; {taken}: pass {missing[1]} before such keys"
        super().error(message)


def split_overrides(line: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the command's own words and the overrides of a configuration.

    A word that is no flag belongs to the flag before it.
    """
    own: list[str] = []
    overrides: list[str] = []
    target = own
    for word in line:
        if FLAG.match(word):
            target = overrides if OVERRIDE.match(word) else own
        target.append(word)
    return own, overrides


def taken_by_an_override(overrides: Sequence[str]) -> str:
    """A clause on the word that most looks as if it were the command's own, or an empty string.

    Only the second value of a key, or a TOML file where no key takes one, looks so.
    """
    found: list[tuple[str, str]] = []
    flag, values = "", 0
    for word in overrides:
        if FLAG.match(word):
            flag, _, value = word.partition("=")
            values = 1 if value else 0
            continue
        values += 1
        if values > 1 or (word.endswith(".toml") and not re.search("config[-_]file", flag)):
            found.append((flag, word))
    if not found:
        return ""
    flag, word = max(found, key=lambda each: each[1].endswith(".toml"))
    return f"'{word}' follows {flag} and so belongs to it"


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """Add [CONFIG], which may also come as --job.config_file among the overrides."""
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG", help="TOML file of the run"
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add --processes and --nodes."""
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="processes on each machine; default: this one's GPUs, or 1",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines; default: 1")


def trainer_arguments(config: Path | None, overrides: list[str]) -> list[str]:
    """The trainer's command line for a configuration file and overrides.

    There is no default file: a run takes long and writes a lot, so it has to be asked for.

    Raises:
        CommandError: no configuration is named, or two are, or the file is not there.
    """
    named = [
        word
        for word in overrides
        if word.partition("=")[0] in ("--job.config_file", "--job.config-file")
    ]
    if config is None:
        if not named:
            taken = taken_by_an_override(overrides)
            raise CommandError(
                f"no configuration is given{taken and f': {taken}'}; pass CONFIG, its TOML file, "
                "before the keys"
            )
        return overrides
    if named:
        raise CommandError(f"{config} and --job.config_file name two configurations; give one")
    if not config.is_file():
        raise CommandError(f"{config} is no file; name a TOML file")
    return ["--job.config_file", str(config), *overrides]


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Add CHECKPOINT..., one or more."""
    parser.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help="a step-N folder, a folder of them or a run's job.dump_folder, of "
        "which the last complete checkpoint is taken",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add --output FOLDER, which is required."""
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder to write to"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device; its value is None unless given."""
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N; default: cuda if there is one, else cpu",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add --dtype, float32 unless given."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of the weights; default: float32",
    )


def add_first_bucket(parser: argparse.ArgumentParser) -> None:
    """Add --first-bucket."""
    parser.add_argument(
        "--first-bucket",
        type=int,
        default=256,
        metavar="TOKENS",
        help="length of the first bucket of positions; default: 256",
    )


def add_batch_tokens(parser: argparse.ArgumentParser) -> None:
    """Add --batch-tokens."""
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=65536,
        metavar="TOKENS",
        help="tokens in a batch, one sequence at least; default: 65536",
    )


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Add --labels; its value is None unless given."""
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="a name for each checkpoint, in their order; default: run and step",
    )


def add_no_plots(parser: argparse.ArgumentParser) -> None:
    """Add --no-plots."""
    parser.add_argument("--no-plots", action="store_true", help="write tables alone")


def add_attention(parser: argparse.ArgumentParser, *default: str) -> None:
    """Add --attention, a list without repetitions."""
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=ATTENTIONS,
        default=list(default),
        action=WithoutRepetitions,
        help=f"attention to evaluate under; default: {' '.join(default)}",
    )


class WithoutRepetitions(argparse.Action):
    """Stores a list of values, each once, in the order in which they were given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands that train many runs."""
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes of each run, on this machine; default: 1",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="RUNS",
        help="runs that train side by side, each on as many GPUs of its own as it "
        "has processes; default: 1",
    )
    parser.add_argument("--list", action="store_true", help="say what would run, and end")
    add_no_plots(parser)
