"""The lines of the console, and those of the file."""

import logging
import warnings
from pathlib import Path

import pytest
from torchtitan.tools.logging import logger

from torchtitan.models.llama3_lighthouse import console
from torchtitan.models.llama3_lighthouse.console import duration, log_to_file, set_up_console

OURS = str(Path(console.__file__).with_name("train.py"))


@pytest.fixture
def root():
    """The root logger, as it was before at the end."""
    before = logger.handlers[:], logger.level
    with warnings.catch_warnings():
        yield logger
    for handler in logger.handlers:
        if handler not in before[0]:
            handler.close()
    logger.handlers, logger.level = before[0], before[1]


def record(path: str, level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord("root", level, path, 1, message, None, None)


def test_console_shows_what_concerns_people(root, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    set_up_console()
    log_to_file(tmp_path / "run")
    entries = [
        record(OURS, logging.INFO, "\x1b[31mstep 1\x1b[39m"),
        record("/packages/torchtitan/train.py", logging.INFO, "Building llama3 with {}"),
        record("/packages/torchtitan/train.py", logging.WARNING, "ran out of data"),
        record("/packages/torchtitan/x.py", logging.WARNING,
               "ENV[TORCH_NCCL_ASYNC_ERROR_HANDLING] = 1 will be overridden to 3"),
        record("/packages/other/y.py", logging.ERROR, "broken"),
    ]  # fmt: skip
    for entry in entries:
        root.handle(entry)
    lines = [line[10:] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["\x1b[31mstep 1\x1b[39m", "WARNING ran out of data", "ERROR broken"]
    written = (tmp_path / "run/train.log").read_text()
    assert len(written.splitlines()) == len(entries)
    assert "INFO train: step 1\n" in written
    assert "INFO train: Building llama3 with {}" in written


def test_what_torch_prints_by_itself_is_silenced_where_it_is_harmless(root, caplog) -> None:
    """torch's loggers have handlers of their own, so what they print is caught there."""
    printed: list[str] = []
    name = "torch._inductor"
    own = logging.getLogger(name)
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(record.getMessage())
    own.addHandler(handler)
    try:
        set_up_console()
        logging.getLogger(f"{name}.codecache").warning("Failed to pickle cache key")
        logging.getLogger(f"{name}.codecache").warning("out of shared memory")
    finally:
        own.removeHandler(handler)
    assert printed == ["out of shared memory"]


def test_the_hub_says_nothing_twice(root, monkeypatch) -> None:
    hub = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(hub, "handlers", [logging.StreamHandler()])
    set_up_console()
    assert hub.handlers == [] and hub.propagate


def test_only_the_first_rank_writes_the_file(root, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    log_to_file(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_warnings_are_shown(root) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        set_up_console()
        warnings.warn("In CPU autocast, but the target dtype is not supported", stacklevel=1)
        warnings.warn("this one is new", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["this one is new"]


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0:00"), (12, "0:12"), (59.6, "1:00"), (3725, "1:02:05"),
    (2 * 86400 + 3725, "2 days 1:02:05"), (86400, "1 day 0:00:00"),
])  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
