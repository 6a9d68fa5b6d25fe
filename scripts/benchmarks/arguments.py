"""Arguments that the benchmarks share, and how a benchmark ends."""

from collections.abc import Callable
from pathlib import Path

from lighthouse_commands.arguments import CommandParser, add_no_plots
from lighthouse_commands.main import run_to_end


def benchmark_parser(description: str | None, name: str, with_plots: bool = False) -> CommandParser:
    """A parser with the arguments that say what to write.

    Args:
        name: default name of the files.
        with_plots: whether the benchmark draws plots, which --no-plots leaves out.
    """
    parser = CommandParser(description=description)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), metavar="FOLDER",
                        help="folder to write to; default: docs/benchmarks")  # fmt: skip
    parser.add_argument("--name", default=name,
                        help=f"name of the files, without ending; default: {name}")  # fmt: skip
    parser.add_argument("--revision", help="git revision to record; default: as git says")
    if with_plots:
        add_no_plots(parser)
    return parser


def add_layer_arguments(parser: CommandParser, seconds: float) -> None:
    """Add the size of an attention layer, and ``seconds`` as the default time to measure it for."""
    parser.add_argument("--heads", type=int, default=8, help="query heads; default: 8")
    parser.add_argument("--kv-heads", type=int, help="key-value heads; default: as --heads")
    parser.add_argument("--head-dim", type=int, default=128, help="default: 128")
    add_seconds(parser, seconds)


def add_seconds(parser: CommandParser, seconds: float) -> None:
    """Add --seconds."""
    parser.add_argument("--seconds", type=float, default=seconds,
                        help=f"time to measure each case for; default: {seconds:g}")  # fmt: skip


def run_benchmark(benchmark: Callable[[], None]) -> None:
    """Run a script's ``benchmark``, and end as a command does."""
    run_to_end(benchmark, "what was measured so far is in the output folder")
