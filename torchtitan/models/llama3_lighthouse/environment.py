"""The environment of a measurement, which a record names so that it can be repeated."""

import platform
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path

import torch


def environment(revision: str | None = None) -> dict[str, str | int | None]:
    """GPU, versions, git revision and date of this process.

    Args:
        revision: git revision to record. The default is the revision of the checkout that this
            file belongs to, or None outside a checkout.
    """
    return {
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "flash-attn-4": _flash4_version(),
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "revision": revision or git_revision(),
        "date": date.today().isoformat(),
    }


def git_revision() -> str | None:
    """Short revision of the checkout that this file is tracked in, or None if it is in none."""
    file = Path(__file__).resolve()
    # An installed copy may lie inside the checkout of another project.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _git(file.parent, "rev-parse", "--short", "HEAD")


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None if git is missing or refuses."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, text=True, capture_output=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _flash4_version() -> str | None:
    try:
        return metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return None
