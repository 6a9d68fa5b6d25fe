"""Source trees as documents: each file once, trees of a bounded size, whole packages held out."""

from pathlib import Path

import pytest
from text_data import config, loader

from torchtitan.models.llama3_lighthouse.data import source_trees, text_sources
from torchtitan.models.llama3_lighthouse.data.source_trees import is_held_out, trees


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_trees_are_cut_at_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_trees, "LARGEST_TREE", 40)
    root = write(tmp_path, {
        "small/a.py": "a = 1\n", "small/b/c.py": "c = 2\n", "small/notes.txt": "no source",
        "large/top.py": "t = 0\n", "large/x/one.py": "x" * 30, "large/y/two.py": "y" * 30,
        "large/y/__pycache__/two.py": "no source", "module.py": "m = 3\n", "empty/__init__.py": "",
    })  # fmt: skip
    (root / "large/y/bytes.py").write_bytes(b"\xff\xfe")
    found = {name: text for _, name, text in trees([root])}
    assert found == {
        "small": "# small/a.py\na = 1\n\n# small/b/c.py\nc = 2\n",
        "large/*.py": "# large/top.py\nt = 0\n",
        "large/x": f"# large/x/one.py\n{'x' * 30}",
        "large/y": f"# large/y/two.py\n{'y' * 30}",
        "module.py": "# module.py\nm = 3\n",
    }
    assert [package for package, _, _ in trees([root])] == ["large"] * 3 + ["module", "small"]


def test_package_counts_once_and_a_root_in_a_root_apart(tmp_path: Path) -> None:
    """As Python finds them: site-packages lies within the folder of the standard library."""
    outer = write(tmp_path / "outer", {"json/a.py": "outer", "site-packages/json/a.py": "inner",
                             "site-packages/other.py": "other"})  # fmt: skip
    expected = ["# json/a.py\nouter", "# other.py\nother"]
    assert [text for _, _, text in trees([outer, outer / "site-packages"])] == expected
    # In a virtual environment the packages of the Python below it are none of ours.
    own = write(tmp_path / "own", {"mine.py": "mine", "mine/_vendor/json/a.py": "outer"})
    assert [text for _, _, text in trees([outer, own])] == [expected[0], "# mine.py\nmine"]


def test_whole_packages_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"package_{number}" for number in range(60)]
    write(
        tmp_path, {f"{name}/{part}.py": f"{name} {part} " * 20 for name in names for part in "ab"}
    )
    monkeypatch.setattr(text_sources, "package_roots", lambda: [tmp_path])

    def texts(split: str, seed: int = 0) -> list[str]:
        source = text_sources.python_packages(split, None, "training", seed)
        return [row["text"] for row in source.open()]

    held_out = [name for name in names if is_held_out(name)]
    assert 0 < len(held_out) < 15
    assert sorted(text.split("/")[0][2:] for text in texts("validation")) == sorted(held_out)
    assert len(texts("train")) + len(held_out) == 60
    assert texts("train") == texts("train") != texts("train", 1)
    assert sorted(texts("train")) == sorted(texts("train", 1))
    # A position holds for this text alone.
    job = config("python_packages")
    begun = loader(job)
    next(iter(begun))
    state = begun.state_dict()
    loader(job).load_state_dict(state)
    write(tmp_path, {f"{next(n for n in names if not is_held_out(n))}/c.py": "more"})
    with pytest.raises(ValueError, match=r"text of training\.dataset"):
        loader(job).load_state_dict(state)


def test_this_installation_has_long_documents() -> None:
    roots = source_trees.package_roots()
    (torch_like,) = [each for each in roots if (each / "torch").is_dir()]
    sizes = [len(text) for _, text in source_trees._documents(torch_like / "torch", torch_like)]
    assert sum(size > 98304 for size in sizes) > 20
