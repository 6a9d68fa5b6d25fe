"""Broken text, and text that changed before a resume.

A run on broken text is refused with the file named, or it trains on exactly the documents that are
whole: then its losses are those of a folder that holds nothing else.
"""

import bz2
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path
from random import Random

from .cases import Bad, Case, Result, clear
from .references import logged
from .runs import SETTINGS, End, Launch, command, write_text

BROKEN, CHANGED = 75, 24
STEPS = 8


def _lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


def _replace_line(file: Path, draw: Random, line: bytes, clean: Path) -> int:
    """Put ``line`` in the place of one of the file's, which the clean twin loses."""
    lines = _lines(file)
    number = draw.randrange(len(lines))
    kept = lines[:number] + lines[number + 1 :]
    (clean / file.name).write_bytes(b"".join(kept))
    lines[number] = line
    file.write_bytes(b"".join(lines))
    return number + 1


LINES: dict[str, bytes] = {
    "cut-off JSON": b'{"text": "abc\n',
    "no JSON": b"hello there\n",
    "invalid UTF-8": b'{"text": "\xff\xfe\xfa"}\n',
    "NUL bytes": b"\x00\x00\x00\x00\n",
    "an escaped NUL": b'{"text": "a\\u0000b"}\n',
    "a lone surrogate": b'{"text": "\\ud800"}\n',
    "null": b'{"text": null}\n',
    "a number": b'{"text": 5}\n',
    "a list": b'{"text": ["a", "b"]}\n',
    "an object": b'{"text": {"a": 1}}\n',
    "no text": b'{"content": "abc"}\n',
    "an empty object": b"{}\n",
    "an array": b"[1, 2]\n",
    "empty text": b'{"text": ""}\n',
    "a blank line": b"\n",
    "deep nesting": b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
    "NaN": b'{"text": NaN}\n',
    "two objects": b'{"text": "a"} {"text": "b"}\n',
    "a huge number": b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n",
}
# Lines that hold a document, which need not be left out.
WHOLE = ("an escaped NUL", "a huge number", "a lone surrogate", "two objects")


def break_line(file: Path, clean: Path, draw: Random) -> str:
    kind = draw.choice(list(LINES))
    kept = (clean / file.name).read_bytes() if kind in WHOLE else None
    number = _replace_line(file, draw, LINES[kind], clean)
    if kept is not None:
        shutil.copy(file, clean / file.name)
    return f"{kind} in line {number}"


def break_file(file: Path, clean: Path, draw: Random) -> str:
    """Break a whole file, compressed ones among them; the clean twin loses it."""
    content, size = file.read_bytes(), file.stat().st_size
    (clean / file.name).unlink()
    packers = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    kind = draw.choice(("cut", "flipped", "not packed", "empty", "zeros", "FIFO", "dead link",
                        "folder", "parquet"))  # fmt: skip
    ending = draw.choice(list(packers))
    packed = file.with_name(file.name + ending)
    if kind in ("cut", "flipped", "not packed"):
        made = packers[ending](content)
        if kind == "cut":
            made = made[: draw.randrange(1, len(made) - 12)]
        elif kind == "flipped":
            place = draw.randrange(12, len(made) - 12)
            made = made[:place] + bytes([made[place] ^ 0x55]) + made[place + 1 :]
        file.unlink()
        packed.write_bytes(content if kind == "not packed" else made)
        return f"{packed.name} {kind}"
    if kind == "zeros":
        file.write_bytes(bytes(size))
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "parquet":
        file.write_bytes(b"PAR1" + content[:100])
    else:
        file.unlink()
        if kind == "FIFO":
            os.mkfifo(file)
        elif kind == "dead link":
            file.symlink_to("/nowhere/at/all")
        else:
            file.mkdir()
    return f"{file.name}: {kind}"


def add_others(file: Path, clean: Path, draw: Random) -> str:
    """Files that are no text beside those that are, and links that lead out of the folder."""
    folder = file.parent
    kind = draw.choice(("names", "link to a file", "link to a folder", "loop", "huge line",
                        "odd name"))  # fmt: skip
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret.jsonl").write_text('{"text": "secret"}\n')
    if kind == "names":
        for name in ("SHA256SUMS", "LICENSE", "prepare.py", "a.csv", "part-0.jsonl.bak",
                     "part-9.jsonl.part", ".part-1.jsonl.swp"):  # fmt: skip
            if draw.random() < 0.6:
                (folder / name).write_text("not text to train on\n")
    elif kind == "link to a file":
        (folder / "part-9.jsonl").symlink_to(outside / "secret.jsonl")
    elif kind == "link to a folder":
        (folder / "more").symlink_to(outside)
    elif kind == "loop":
        (folder / "more").symlink_to(folder)
    elif kind == "huge line":
        line = json.dumps({"text": "house " * 300_000}) + "\n"
        for each in (file, clean / file.name):
            each.write_text(line + each.read_text())
    else:
        name = draw.choice(("a b.jsonl", "ü.jsonl", "[x].jsonl", "*.jsonl", "a'b.jsonl",
                            "line\nbreak.jsonl", "train::x.jsonl", "#1%20.jsonl"))  # fmt: skip
        for each in (file, clean / file.name):
            each.rename(each.with_name(name))
        return f"a file named {name!r}"
    return f"beside the text: {kind}"


BREAKS = (break_line, break_line, break_line, break_line, break_file, break_file, add_others)


def break_text(case: Case) -> Result:
    """Train on a broken folder, and on one that holds only what is whole of it."""
    draw = case.random
    folder, clean = (write_text(case.folder / name) for name in ("text", "clean"))
    file = draw.choice(sorted(folder.iterdir()))
    tried = draw.choice(BREAKS)(file, clean, draw)
    try:
        end = clear(_train(case, folder, case.dump), "run")
        if end.code:
            if str(folder) not in end.message:
                raise Bad("traceback", f"names no file: {end.message or end.log[-500:]}")
            return Result("refused", f"{file.name}: {tried}", end.message)
        clear(_train(case, clean, case.folder / "clean-run"), "clean run")
        broken, whole = logged(case.dump), logged(case.folder / "clean-run")
        if broken != whole:
            raise Bad("silent", "trained on other documents than those that are whole")
    except Bad as bad:
        return Result(bad.outcome, f"{file.name}: {tried}", bad.found)
    return Result("ok", f"{file.name}: {tried}", "trained on all that is whole")


def _train(case: Case, folder: Path, dump: Path) -> End:
    line = command(dump, folder, training__steps=STEPS, checkpoint__interval=100)
    return Launch(line, case.folder).wait()


def change_text(case: Case) -> Result:
    """Change a folder between a run and its continuation, which must be refused."""
    draw, folder = case.random, write_text(case.folder / "text")
    steps = SETTINGS["training.steps"]
    schedule = ["--lr_scheduler.total_steps", str(steps)]

    def train(last: int) -> End:
        line = command(case.dump, folder, training__steps=last)
        return Launch([*line, *schedule], case.folder).wait()

    end = train(STEPS)
    if end.code:
        return Result("traceback", "a sound folder", end.message or end.log[-500:])
    tried, may_go_on = CHANGES[case.number % len(CHANGES)](folder, draw)
    try:
        end = clear(train(steps), "resume")
        if not end.code:
            if may_go_on and not case.world.references["forked 1"].problem(case.dump):
                return Result("ok", tried, "the text is the same in the same order")
            raise Bad("silent", "goes on over other text")
        if "training.dataset" not in end.message and str(folder) not in end.message:
            raise Bad("traceback", f"does not name the text: {end.message}")
    except Bad as bad:
        return Result(bad.outcome, tried, bad.found)
    return Result("refused", tried, end.message)


def edited(folder: Path, draw: Random) -> tuple[str, bool]:
    file = draw.choice(sorted(folder.iterdir()))
    content = file.read_bytes()
    before, after = draw.sample([b"lamp", b"ship", b"rock", b"bell", b"gull", b"rope"], 2)
    file.write_bytes(content.replace(before, after, 1))
    times = file.stat()
    os.utime(file, (times.st_atime, times.st_mtime - 100))
    return f"{before.decode()} became {after.decode()} in {file.name}", before not in content


def swapped(folder: Path, draw: Random) -> tuple[str, bool]:
    one, other = draw.sample(sorted(folder.iterdir()), 2)
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    return f"{one.name} and {other.name} swapped", False


def turned(folder: Path, draw: Random) -> tuple[str, bool]:
    file = draw.choice(sorted(folder.iterdir()))
    file.write_bytes(b"".join(reversed(_lines(file))))
    return f"{file.name} has its lines reversed", False


def called(folder: Path, draw: Random) -> tuple[str, bool]:
    file = draw.choice(sorted(folder.iterdir()))
    name = draw.choice((f"{file.stem}-new.jsonl", "a.jsonl", "z.jsonl"))
    order = sorted(folder.iterdir()).index(file)
    new = file.rename(file.with_name(name))
    return f"{file.name} renamed to {name}", sorted(folder.iterdir()).index(new) == order


def added(folder: Path, draw: Random) -> tuple[str, bool]:
    name = draw.choice(("part-9.jsonl", "a.jsonl", "more/b.jsonl"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('{"text": "one document more"}\n')
    return f"{name} added", False


def taken(folder: Path, draw: Random) -> tuple[str, bool]:
    file = draw.choice(sorted(folder.iterdir()))
    file.unlink()
    return f"{file.name} removed", False


CHANGES = (edited, swapped, turned, called, added, taken)
