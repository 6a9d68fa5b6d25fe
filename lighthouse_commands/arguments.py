"""What the commands share: how they end, and what they check before any work."""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable

from torchtitan.models.llama3_lighthouse.errors import UserError, UserValueError


def command_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows ``description`` as it is written and takes no shortened flags."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_with_overrides(
    parser: argparse.ArgumentParser, line: list[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse ``line`` or the command line; what is left, --section.key value, goes to a
    configuration. Ends the command on any other flag."""
    arguments, overrides = parser.parse_known_args(line)
    for word in overrides:
        if re.match("--?[A-Za-z]", word) and "." not in word:
            parser.error(f"unknown argument {word}; a configuration takes --section.key value")
    return arguments, overrides


def run_command(
    command: Callable[[], None], if_interrupted: str = "the same command goes on from here"
) -> None:
    """Run a script's ``command``; a user's mistake ends in one line, an interruption in 130."""
    try:
        command()
    except (UserError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        print(f"interrupted; {if_interrupted}", file=sys.stderr)
        sys.exit(130)


def check_plots(no_plots: bool) -> None:
    """Check that plots can be drawn, if any are wanted.

    Raises:
        ValueError: matplotlib is missing.
    """
    if not no_plots and not importlib.util.find_spec("matplotlib"):
        raise UserValueError(
            "plots need matplotlib: pip install -e '.[benchmark]', or pass --no-plots"
        )


def check_device(device: str) -> None:
    """Check that a model can be evaluated on ``device``.

    Raises:
        ValueError: it is no CPU and no GPU that torch finds.
    """
    # Not at the top, for the sake of commands that answer --help.
    import torch

    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or device.endswith(":") or (number and not number.isdigit()):
        raise UserValueError(f"--device {device} is not known; use cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(number or 0) >= count:
        raise UserValueError(
            f"--device {device}: torch finds {count} CUDA devices; use --device cpu"
        )
