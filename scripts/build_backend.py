"""Build with setuptools, and let an editable install be found before a folder named like it.

Python takes the folder ``lighthouse`` in the working directory, a clone for example, for a
namespace package before it asks setuptools' editable finder, which comes last
(https://github.com/pypa/setuptools/issues/3557). Python prefers a regular package on any later
entry of ``sys.path`` to a namespace package. The editable wheel therefore adds the root of the
clone to ``sys.path`` as well. The finder stays: only it finds the overlay inside upstream's
``torchtitan``.
"""

import base64
import csv
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

ROOT = Path(__file__).resolve().parents[1]


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build setuptools' editable wheel and add the root of the clone to its ``.pth`` file."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    wheel = Path(wheel_directory, name)
    with zipfile.ZipFile(wheel) as archive:
        contents = {entry: archive.read(entry) for entry in archive.infolist()}
    (path_file,) = (entry for entry in contents if entry.filename.endswith(".pth"))
    contents[path_file] += f"\n{ROOT}\n".encode()
    (record,) = (entry for entry in contents if entry.filename.endswith(".dist-info/RECORD"))
    contents[record] = _with_hash(contents[record], path_file.filename, contents[path_file])
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in contents.items():
            archive.writestr(entry, content)
    return name


def _with_hash(record: bytes, filename: str, content: bytes) -> bytes:
    """Give ``filename`` the hash and the size of ``content`` in a wheel's RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    rows = csv.reader(io.StringIO(record.decode()))
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(
        [filename, f"sha256={digest}", str(len(content))] if row[0] == filename else row
        for row in rows
    )
    return written.getvalue().encode()
