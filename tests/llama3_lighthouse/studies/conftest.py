"""What all tests of studies share."""

import functools

import pytest

from torchtitan.models.llama3_lighthouse.data.text_sources import SOURCES

read_once = functools.cache(SOURCES["python_stdlib"])


@pytest.fixture(autouse=True)
def library_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command reads the standard library, which does not change."""
    monkeypatch.setitem(SOURCES, "python_stdlib", read_once)
