"""docs/extending.md and docs/architecture.md name what is there, and their examples work."""

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import loaded, written
from safetensors.torch import load_file
from torch import nn

from torchtitan.models.llama3_lighthouse.checks.configuration import check_config
from torchtitan.models.llama3_lighthouse.dry_run import dry_run
from torchtitan.models.llama3_lighthouse.evaluation.inference import (
    load_trained_model,
    model_arguments,
    parse_over,
)
from torchtitan.models.llama3_lighthouse.hugging_face.export import export_checkpoint
from torchtitan.models.llama3_lighthouse.hugging_face.import_model import import_model
from torchtitan.models.llama3_lighthouse.model.families import FAMILIES
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import (
    LighthouseModelArgs,
    LighthouseTransformer,
)
from torchtitan.models.llama3_lighthouse.model.rotary import RotaryAttention

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


def names_of(kind: str, family: type[LighthouseModelArgs]) -> re.Pattern[str]:
    """What code may call a family by: its type, its classes, and modules that a Llama has not."""
    modules = {word for name in family.own_weights.values() for word in name.split(".")}
    names = {family.__name__, family.attention_class.__name__} | modules
    names -= {"RotaryAttention", "attention", "weight"}
    spelled = re.sub(r"(?<=[a-z])(?=\d)", "[ _-]?", kind)
    return re.compile(rf"(?i)(?<![a-z])({'|'.join([spelled, *sorted(names)])})(?![a-z])")


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - {"llama"}))
def test_a_model_family_touches_the_files_of_its_list(kind: str) -> None:
    listed = re.findall(r"(?m)^\d\. `([\w/]+\.py)`", section("A model family"))
    assert len(listed) == 2
    own = names_of(kind, FAMILIES[kind])
    packages = (OVERLAY, ROOT / "lighthouse", ROOT / "lighthouse_commands")
    touched = {
        file
        for package in packages
        for file in package.rglob("*.py")
        if own.search(file.read_text())
    }
    # The method names what models of transformers call their norms. It knows no family.
    touched.discard(ROOT / "lighthouse/transformers.py")
    assert touched == {OVERLAY / path.replace("NAME", kind) for path in listed}


def test_a_model_family() -> None:
    from torchtitan.models.llama3_lighthouse.model import qwen3

    namespace = dict(vars(qwen3))
    exec(example("A model family"), namespace)
    sizes = dict(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, own_head_dim=8)
    written, real = namespace["Qwen3ModelArgs"], FAMILIES["qwen3"]
    assert written is not real
    outputs, tokens = [], torch.randint(64, (2, 32))
    for arguments in (written, real, LighthouseModelArgs):
        torch.manual_seed(0)
        built = LighthouseTransformer(arguments(**sizes, max_seq_len=32, dense_layers=[0, 1]))
        with torch.no_grad():
            built.init_weights()
            outputs.append(built(tokens))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    for name in ("model_type", "causal_model", "defaults", "own_weights", "column_weights"):
        assert getattr(written, name) == getattr(real, name)
    plans = [arguments.attention_class.tensor_parallel_plan() for arguments in (written, real)]
    assert [*plans[0]] == [*plans[1]] and [*map(repr, plans[0])] == [*map(repr, plans[1])]


class LateNorms(RotaryAttention):
    """HunYuan's attention, which norms queries and keys after their rotation."""

    norms_heads = True

    def __init__(self, model_args: LighthouseModelArgs) -> None:
        super().__init__(model_args)
        self.late_q, self.late_k = (
            nn.RMSNorm(model_args.head_dim, eps=model_args.norm_eps) for _ in range(2)
        )

    def rotated(
        self, q: torch.Tensor, k: torch.Tensor, turns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = super().rotated(q, k, turns)
        return self.late_q(q), self.late_k(k)


@dataclass
class HunYuanModelArgs(LighthouseModelArgs):
    model_type = "hunyuan_v1_dense"
    causal_model = "HunYuanDenseV1ForCausalLM"
    attention_class = LateNorms
    defaults = {**LighthouseModelArgs.defaults, "vocab_size": 290943, "rms_norm_eps": 1e-5}
    plain = {"use_qk_norm": ((True,), "pass a model with norms of queries and keys")}
    own_weights = {
        "self_attn.query_layernorm.weight": "attention.late_q.weight",
        "self_attn.key_layernorm.weight": "attention.late_k.weight",
    }
    column_weights = tuple(own_weights.values())


@pytest.mark.parametrize("tied", [False, True])
def test_a_third_family_needs_a_class_and_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    config: dict[str, Any] = {
        "architectures": ["HunYuanDenseV1ForCausalLM"], "model_type": "hunyuan_v1_dense",
        "vocab_size": 300, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu",
        "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": tied,
        "use_qk_norm": True, "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float32",
    }  # fmt: skip
    folder = written(tmp_path / "folder", config)
    with pytest.raises(ValueError, match="model_type = 'hunyuan_v1_dense' cannot be trained here"):
        import_model(folder, tmp_path / "run")
    monkeypatch.setitem(FAMILIES, "hunyuan_v1_dense", HunYuanModelArgs)
    step = import_model(folder, tmp_path / "run")
    found = load_trained_model(step)
    tokens = torch.randint(300, (2, 64))
    with torch.no_grad():
        logits, expected = found.model(tokens), loaded(folder)(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    export_checkpoint(step, tmp_path / "exported")
    assert json.loads((tmp_path / "exported/config.json").read_text()) == config
    before, after = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "exported")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    # The method trains it, and the dry run counts it.
    flags = [
        "--model.hf_folder", str(folder), "--training.seq_len", "64", "--lighthouse.levels", "2",
        "--lighthouse.pooling_factor", "2", "--lighthouse.top_k", "8",
        "--lighthouse.picks_per_stratum", "8", "--job.dump_folder", str(tmp_path / "trained"),
        "--lighthouse.stage", "lighthouse",
    ]  # fmt: skip
    parameters = sum(each.numel() for each in loaded(folder).parameters())
    scored = parse_over(None, [*flags, "--lighthouse.scorer", "gla"])
    assert f"{parameters:,} parameters" in dry_run(scored, 1)
    model = LighthouseTransformer(model_arguments(scored))
    model.load_state_dict(found.model.state_dict())
    model.use_attention("lighthouse")
    model(tokens).logsumexp(-1).sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in model.parameters())
    with pytest.raises(ValueError, match="'hunyuan_v1_dense' makes nearly equal"):
        check_config(parse_over(None, flags), flavors)


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
    from torchtitan.models.llama3_lighthouse.model import flavors

    (args,) = eval("{" + example("A flavor") + "}", vars(flavors)).values()
    args.dense_layers = list(range(args.n_layers))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LighthouseTransformer(args).parameters())
    assert 1.4e9 < parameters < 1.6e9
