"""docs/extending.md and docs/architecture.md name what is there, and their examples work."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
OVERLAY = ROOT / "torchtitan/models/llama3_lighthouse"
PAGES = [ROOT / "docs/architecture.md", ROOT / "docs/extending.md"]


def text_of(page: Path) -> str:
    """A page without its fenced blocks, on one line."""
    return " ".join(re.sub(r"(?ms)^```.*?^```", "", page.read_text()).split())


def found(path: str) -> Path | None:
    """The file or folder that a page means, or None."""
    candidates = (ROOT / path, OVERLAY / path)
    return next((candidate for candidate in candidates if candidate.exists()), None)


def section(heading: str) -> str:
    return PAGES[1].read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def example(heading: str, language: str = "python") -> str:
    """The last fenced block of a section of ``docs/extending.md``."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", section(heading))[-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_path_exists(page: Path) -> None:
    paths = set(re.findall(r"`((?:[\w.]+/)+[\w.]*|\w+\.(?:py|toml))`", text_of(page)))
    invented = {path for path in paths if "NAME" in path}
    missing = sorted(path for path in paths - invented if not found(path))
    assert not missing, f"{page.name} names files that are not there: {missing}; correct the page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_name_is_in_its_file(page: Path) -> None:
    pairs = re.findall(r"`(\w+)` (?:in|of) `([\w/]+\.py)`", text_of(page))
    pairs += [
        (name, path)
        for path, rest in re.findall(r"`([\w/]+\.py)`: ([^.]*)\.", text_of(page))
        for name in re.findall(r"`(\w+)` in `(?!\w+[./])|an entry of `(\w+)`", rest)
        for name in filter(None, name)
    ]
    assert pairs
    missing = [
        f"{name} in {path}"
        for name, path in pairs
        if not (file := found(path)) or not re.search(rf"\b{name}\b", file.read_text())
    ]
    assert not missing, f"{page.name} names what is not there: {missing}; correct the page"


def test_a_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    from lighthouse import LighthouseConfig, config, reference, scoring, select

    monkeypatch.setitem(config.CHOICES, "scorer", (*config.SCORERS, "value"))
    monkeypatch.setitem(config.ATTENDS, "value", False)
    monkeypatch.setattr(scoring, "SCORER_FUNCTIONS", dict(scoring.SCORER_FUNCTIONS))
    monkeypatch.setitem(reference.SCORED_ROWS, "value", lambda q, k, v, config: (v, v))
    exec(example("A scorer"), dict(vars(scoring)))
    method = LighthouseConfig(2, 2, 16, picks_per_stratum=8, scorer="value")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 64, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = reference.select(q, k, v, method)
    for given, wanted in zip(select(q, k, v, method), expected, strict=True):
        assert torch.equal(given, wanted)
    # The order of values does not matter to the norms of queries and keys.
    assert not torch.equal(select(q, k, v, LighthouseConfig(2, 2, 16, "norm", 8))[0], expected[0])


def test_a_model_family_touches_the_files_of_its_list() -> None:
    text = section("A model family")
    listed = re.findall(r"(?m)^\d\. `([\w/]+\.py)`", text)
    files = {OVERLAY / path.replace("NAME", "qwen3") for path in listed}
    assert len(files) == 4
    # Names that the family alone has, in any spelling.
    own = re.compile(r"(?i)qwen|[qk]_norm\b|NormedRotary")
    touched = {file for file in OVERLAY.rglob("*.py") if own.search(file.read_text())}
    assert touched == files
    methods = [file for file in (ROOT / "lighthouse").rglob("*.py") if own.search(file.read_text())]
    assert {file.name for file in methods} <= {"transformers.py"}


def test_a_model_family() -> None:
    from torchtitan.models.llama3_lighthouse.model import model, qwen3

    namespace = dict(vars(qwen3))
    exec(example("A model family"), namespace)
    sizes = dict(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, own_head_dim=8)
    outputs, tokens = [], torch.randint(64, (2, 32))
    for arguments in (namespace["Qwen3ModelArgs"], qwen3.Qwen3ModelArgs, model.LighthouseModelArgs):
        torch.manual_seed(0)
        built = model.LighthouseTransformer(arguments(**sizes, max_seq_len=32, dense_layers=[0, 1]))
        with torch.no_grad():
            built.init_weights()
            outputs.append(built(tokens))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


def test_a_data_source(tmp_path: Path) -> None:
    from torchtitan.models.llama3_lighthouse.data import text_sources
    from torchtitan.models.llama3_lighthouse.errors import UserValueError

    namespace = dict(vars(text_sources))
    exec(example("A data source"), namespace)
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file in files:
        file.write_text(f"text of {file.name}")
    (tmp_path / "list").write_text("\n".join(map(str, files)))
    for split, names in (("train", ["a", "b"]), ("validation", ["c"])):
        source = namespace["listed"](split, str(tmp_path / "list"), "training")
        for _ in range(2):
            texts = [document["text"] for document in source.open()]
            assert texts == [f"text of {name}" for name in names]
    with pytest.raises(UserValueError, match="--training.dataset_path FILE"):
        namespace["listed"]("train", None, "training")


def test_another_attention() -> None:
    from torchtitan.models.attention import ScaledDotProductAttentionWrapper

    namespace = {"nn": nn}
    exec(example("Another attention for stage one"), namespace)
    dense = ScaledDotProductAttentionWrapper()
    module = namespace["ChunkedAttention"](8, dense)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 32, 8) for heads in (4, 2, 2))
    chunks = torch.arange(32) // 8
    mask = (chunks[:, None] == chunks).tril()
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(module(q, k, v, enable_gqa=True), wanted)
    module.enabled = False
    assert torch.equal(module(q, k, v, enable_gqa=True), dense(q, k, v, enable_gqa=True))
    assert not module.state_dict()


def test_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lighthouse_commands import main

    name = "lighthouse_commands.step"
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None))
    exec(example("A command"), vars(module))
    module.__doc__ = vars(module)["__doc__"]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(main.COMMANDS, "step", "step")
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3/.metadata").touch()
    main.main(["step", str(tmp_path)])
    assert capsys.readouterr().out == "step-3\n"


def test_a_grid(tmp_path: Path) -> None:
    from torchtitan.models.llama3_lighthouse.studies.ablations import expand

    shutil.copy(ROOT / "train_configs/debug_cpu.toml", tmp_path)
    grid = tmp_path / "ablations/grid.toml"
    grid.parent.mkdir()
    grid.write_text(example("A study", "toml"))
    runs = expand(grid, tmp_path / "output", [])
    assert len(runs) == 4 and not any(run.refusal for run in runs)


def test_a_flavor() -> None:
    from torchtitan.models.llama3_lighthouse.model import flavors, model

    (args,) = eval("{" + example("A flavor") + "}", vars(flavors)).values()
    args.dense_layers = list(range(args.n_layers))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in model.LighthouseTransformer(args).parameters())
    assert 1.4e9 < parameters < 1.6e9
