"""The index of a Hugging Face folder names files beside it, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.hugging_face.format import INDEX_FILE
from torchtitan.models.llama3_lighthouse.hugging_face.import_model import _weight_files


def with_index(folder: Path, index: Any) -> Path:
    folder.mkdir()
    (folder / INDEX_FILE).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "name", ["../b.safetensors", "/etc/b", "sub/b", "..", "", "a\0", 5, None, []]
)
def test_an_entry_that_leads_elsewhere_is_refused(tmp_path: Path, name: Any) -> None:
    (tmp_path / "b.safetensors").write_text("")
    folder = with_index(tmp_path / "model", {"weight_map": {"a.weight": "a", "b.weight": name}})
    (folder / "a").write_text("")
    with pytest.raises(
        UserValueError, match="says that 'b.weight' is in .* no name of a file besi"
    ):
        _weight_files(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "has no 'weight_map' that says"),
        (5, "has no 'weight_map' that says"),
        ({}, "has no 'weight_map' that says"),
        ({"weight_map": ["a"]}, "has no 'weight_map' that says"),
        ({"weight_map": {}}, "has no 'weight_map' that says"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_an_index_of_another_form_is_refused(tmp_path: Path, index: Any, message: str) -> None:
    with pytest.raises(UserValueError, match=message):
        _weight_files(with_index(tmp_path / "model", index))


def test_links_of_a_download_are_read(tmp_path: Path) -> None:
    """Hugging Face's cache keeps contents elsewhere, and links to them by these names."""
    folder = with_index(tmp_path / "model", {"weight_map": {"a": "a.safetensors"}})
    (tmp_path / "blob").write_text("")
    (folder / "a.safetensors").symlink_to("../blob")
    assert _weight_files(folder) == [folder / "a.safetensors"]
