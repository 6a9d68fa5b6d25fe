"""The ``lighthouse`` command: reads the command line, runs a command, and says how it ended."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

from .arguments import OVERRIDES_HELP, CommandError, CommandParser, split_overrides

# Each command's words, and the module that holds its arguments and its ``run``.
COMMANDS = {
    "train": "train",
    "dry-run": "dry_run",
    "check-text": "check_text",
    "export-hf": "export_hf",
    "import-hf": "import_hf",
    "evaluate loss": "evaluate_loss",
    "evaluate niah": "evaluate_niah",
    "evaluate causality": "evaluate_causality",
    "evaluate distance": "evaluate_distance",
    "ablations": "ablations",
    "recovery": "recovery",
    "contest": "contest",
}
OWN_PACKAGES = ("lighthouse", "lighthouse_commands", "torchtitan.models.llama3_lighthouse")
# The extra that installs a package which is not the trainer's.
EXTRAS = {
    "flash_attn": "flash4",
    "huggingface_hub": "export",
    "matplotlib": "plots",
    "safetensors": "export",
    "transformers": "export",
    "wandb": "wandb",
}


def build_parser(overrides: list[str]) -> CommandParser:
    """The parser of all commands; its result has the ``module`` and ``parser`` of the one given."""
    parser = CommandParser(
        overrides,
        prog="lighthouse",
        description="Long-context pretraining with Lighthouse Attention.",
        epilog="lighthouse COMMAND --help says what a command takes and writes.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    evaluate = commands.add_parser(
        "evaluate", help="measure checkpoints: loss, niah, causality, distance"
    )
    evaluations = evaluate.add_subparsers(required=True, metavar="MEASURE")
    for words, name in COMMANDS.items():
        module = importlib.import_module(f"lighthouse_commands.{name}")
        group, _, last = words.rpartition(" ")
        child = (evaluations if group else commands).add_parser(
            last,
            overrides=overrides,
            help=module.SUMMARY,
            description=module.__doc__,
            epilog=OVERRIDES_HELP,
        )
        module.add_arguments(child)
        child.set_defaults(module=module, parser=child)
    return parser


def parse(line: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's options, and the overrides of the configuration. Ends on unknown words."""
    own, overrides = split_overrides(line)
    options, unknown = build_parser(overrides).parse_known_args(own)
    if unknown:
        options.parser.error(
            f"unknown argument {unknown[0]}; a configuration takes --section.key value"
        )
    return options, overrides


def main(line: list[str] | None = None) -> None:
    """Run the command that ``line``, or else the process's command line, asks for."""
    options, overrides = parse(sys.argv[1:] if line is None else line)
    module: ModuleType = options.module

    def command() -> None:
        require_trainer()
        module.run(options, overrides)

    run_to_end(command, module.IF_INTERRUPTED)


def run_to_end(command: Callable[[], None], if_interrupted: str) -> None:
    """Run ``command``, and say how it ended.

    A user's mistake ends in one line and exit code 1, an interruption in 130. Any other exception
    is a bug and keeps its traceback.
    """
    try:
        command()
    except KeyboardInterrupt:
        print(f"interrupted; {if_interrupted}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = users_mistake(error)
        if message is None:
            raise
        sys.exit(f"Error: {message}")


def require_trainer() -> None:
    """Check, without importing it, that the trainer is installed.

    Raises:
        CommandError: it is not.
    """
    try:
        upstream = importlib.util.find_spec("torchtitan")
    except ImportError:
        upstream = None
    # Without torchtitan itself, our folder of that name is a namespace package, which has no file.
    if upstream is None or upstream.origin is None:
        raise CommandError(needs("torchtitan"))


def needs(package: str) -> str:
    """Message for a missing package of the trainer, or of a further extra."""
    extra = EXTRAS.get(package.partition(".")[0], "trainer")
    return (
        f"this command needs the package {package}, which is missing; run pip install "
        f"'lighthouse-attention[{extra}]', or pip install -e '.[{extra}]' in a clone"
    )


def users_mistake(error: Exception) -> str | None:
    """The line to end with if a user can mend ``error``; None if it is a bug."""
    if isinstance(error, CommandError | OSError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        ours = any(f"{error.name}.".startswith(f"{package}.") for package in OWN_PACKAGES)
        return None if ours else needs(error.name)
    # Importing the module of users' errors takes seconds. Before it is imported, there are none.
    errors = sys.modules.get("torchtitan.models.llama3_lighthouse.errors")
    return str(error) if errors and isinstance(error, errors.UserError) else None


if __name__ == "__main__":
    main()
