"""Evaluation and export of a checkpoint, each in a fork, reduced to a digest of what they made."""

import hashlib
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from .runs import End, Launch

# The format of an export needs a package that is not one of the trainer's.
CAN_EXPORT = find_spec("safetensors") is not None


def evaluated(path: Path, folder: Path) -> tuple[End, str]:
    """Load a checkpoint as the evaluations do; a digest of its weights, or "" if that failed."""

    def load(output: Path) -> None:
        from torchtitan.models.llama3_lighthouse.evaluation.inference import load_trained_model

        digest = hashlib.sha256()
        for name, weight in sorted(load_trained_model(path).model.state_dict().items()):
            digest.update(name.encode() + weight.numpy().tobytes())
        output.write_text(digest.hexdigest())

    return _in_fork(load, folder)


def exported(path: Path, folder: Path) -> tuple[End, str]:
    """Export a checkpoint to Hugging Face's format; a digest of the weights, or ""."""

    def write(output: Path) -> None:
        from torchtitan.models.llama3_lighthouse.hugging_face.export import export_checkpoint

        made = output.with_name("exported")
        shutil.rmtree(made, ignore_errors=True)
        export_checkpoint(path, made, allow_lighthouse=True, report=lambda line: None)
        output.write_text(hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest())

    return _in_fork(write, folder)


def imported(source: Path, folder: Path) -> tuple[End, str]:
    """Make a checkpoint of a folder in Hugging Face's format; "made", or ""."""

    def make(output: Path) -> None:
        from torchtitan.models.llama3_lighthouse.hugging_face.import_model import import_model

        import_model(source, output.with_name("imported"), report=lambda line: None)
        output.write_text("made")

    return _in_fork(make, folder)


READINGS = (evaluated, exported) if CAN_EXPORT else (evaluated,)


def _in_fork(work: Callable[[Path], None], folder: Path) -> tuple[End, str]:
    """Run ``work`` as a command runs it, with a file for its result."""
    from lighthouse_commands.main import run_to_end

    output = folder / "result.txt"
    output.unlink(missing_ok=True)
    end = Launch([], folder, main=lambda: run_to_end(lambda: work(output), ""), launcher=True)
    ended = end.wait()
    return ended, output.read_text() if output.exists() else ""
