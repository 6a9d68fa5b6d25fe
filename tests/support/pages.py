"""Pages of the documentation as tests read them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def words(path: Path) -> str:
    """A page with single spaces, without its code."""
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text())
    return " ".join(text.replace("\n> ", "\n").split())
