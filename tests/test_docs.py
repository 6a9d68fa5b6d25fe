"""Links of the pages, what is reached from docs/index.md, and the site."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its code."""
    return CODE.sub("", page.read_text())


def links(page: Path) -> list[tuple[Path, str]]:
    """The files of this repository that a page links to, each with the anchor or nothing."""
    found = []
    for target in LINK.findall(prose(page)):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", page.read_text()), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.strip()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{page} links to {target}, which does not exist"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), (
                f"{page} links to #{anchor} of {target}, which has {sorted(anchors(target))}"
            )


def test_everything_is_reached_from_the_index() -> None:
    reached, ahead = set(), [DOCS / "index.md"]
    while ahead:
        page = ahead.pop()
        if page not in reached:
            reached.add(page)
            if page.suffix == ".md" and page.exists():
                ahead += [target for target, _ in links(page)]
    missed = sorted(
        str(path.relative_to(ROOT))
        for path in DOCS.rglob("*")
        if path.is_file() and path not in reached
    )
    assert not missed, f"link these from a page that docs/index.md leads to: {missed}"


def test_claims_have_records() -> None:
    without = [
        str(page.relative_to(ROOT))
        for page in PAGES
        if "no record is kept" in " ".join(page.read_text().split())
    ]
    assert not without, f"record these measurements or drop them: {without}"


def test_site_builds(tmp_path: Path) -> None:
    """mkdocs.yml is strict: a page that the navigation leaves out fails."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        # Material otherwise prints a notice about its successor.
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "index.html").is_file()
