"""Every file in train_configs/ is a run that would start; every grid is a sweep of such runs."""

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from text_data import FOLDERS_OF_TEXT

from lighthouse import LighthouseAttention, LighthouseConfig
from lighthouse.geometry import PyramidGeometry
from torchtitan.models.llama3_lighthouse.checkpoints.model_folder import model_arguments_of
from torchtitan.models.llama3_lighthouse.checks.configuration import check_config
from torchtitan.models.llama3_lighthouse.checks.unread import warnings_of
from torchtitan.models.llama3_lighthouse.data.tokenizer import ByteTokenizer
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import LighthouseTransformer
from torchtitan.models.llama3_lighthouse.stages import stages_of
from torchtitan.models.llama3_lighthouse.studies.ablations import expand, record_of

CONFIGS = Path(__file__).parents[2] / "train_configs"
FILES = sorted(CONFIGS.glob("*.toml"))
# Grid -> number of its combinations, and how many of them the geometry refuses.
GRIDS = {"topk": (6, 0), "pool": (6, 0), "levels": (6, 0), "scorer": (6, 0), "split": (4, 0),
         "debug": (9, 3), "books_16k": (8, 0), "passkey_16k": (6, 0)}  # fmt: skip


# The models that a configuration extends: Llama 3 8B, and the one of docs/guides/extend.md.
EXTENDED = {
    "extend_llama": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192,
    },
    "debug_extend_cpu": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "rope_theta": 500000.0, "max_position_embeddings": 2048,
    },
    "extend_17m_98k": {
        "model_type": "llama", "hidden_size": 384, "intermediate_size": 1280,
        "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 6,
        "vocab_size": 320, "rope_theta": 500000.0, "max_position_embeddings": 4096,
    },
}  # fmt: skip


def check_model(config: JobConfig) -> int:
    """Build the model without memory, check that every layer is as ``config`` says, return S."""
    args = model_arguments_of(config)
    args.update_from_config(config)
    with torch.device("meta"):
        model = LighthouseTransformer(args)
    section = config.lighthouse
    method = LighthouseConfig(
        section.levels, section.pooling_factor, section.top_k, section.scorer,
        section.picks_per_stratum, section.dilation, section.entry_score, section.combine,
        section.window,
    )  # fmt: skip
    for index, block in model.layers.items():
        inner = block.attention.inner_attention
        assert isinstance(inner, LighthouseAttention) == (int(index) not in section.dense_layers)
        assert getattr(inner, "config", method) == method
    return args.gathered_length(config.training.seq_len)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_builds_what_it_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The folders that a file names may be in the clone, once a user has made them.
    monkeypatch.chdir(tmp_path)
    line = ["--job.config_file", str(path), "--job.dump_folder", str(tmp_path)]
    if path.stem.startswith("8b"):
        with pytest.raises(ValueError, match="--model.hf_assets_path FOLDER"):
            check_config(LighthouseConfigManager().parse_args(line), flavors)
        line += ["--model.hf_assets_path", str(tmp_path)]
    if "extend" in path.stem:
        with pytest.raises(ValueError, match="--model.hf_folder FOLDER"):
            check_config(LighthouseConfigManager().parse_args(line), flavors)
        (tmp_path / "config.json").write_text(json.dumps(EXTENDED[path.stem]))
        for key in ("model.hf_folder", "checkpoint.initial_load_path"):
            line += [f"--{key}", str(tmp_path)]
    if 'dataset = "c4_local"' in path.read_text():
        with pytest.raises(ValueError, match="--training.dataset_path FOLDER"):
            check_config(LighthouseConfigManager().parse_args(line), flavors)
        line += FOLDERS_OF_TEXT
    config = LighthouseConfigManager().parse_args(line)
    check_config(config, flavors)
    assert warnings_of(config, 8) == []
    # Attention runs on a small part of the sequence, and in the study on half of it.
    part = 2 if path.stem == "recovery_books_32k" else 3
    assert check_model(config) <= config.training.seq_len // part
    section = config.lighthouse
    if section.schedule:
        assert stages_of(config)[-1].attention == "dense"
    elif section.stage == "auto":
        assert 0 < section.dense_from_step < config.training.steps


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_the_papers_runs_leak_later_tokens(path: Path) -> None:
    section = LighthouseConfigManager().parse_args(["--job.config_file", str(path)]).lighthouse
    settings = (section.entry_score, section.combine)
    if path.stem.startswith("paper_"):
        assert settings == ("max", "sum")
        # The paper's values do not hang on defaults. Its scorer has no dilation.
        named = tomllib.loads(path.read_text())["lighthouse"].keys()
        assert {field.name for field in fields(LighthouseConfig)} - named == {"dilation"}
        assert "not for models that matter" in path.read_text()
    else:
        assert settings == ("first", "finest")


@pytest.mark.parametrize("name", GRIDS)
def test_only_the_papers_grids_leak_later_tokens(name: str, tmp_path: Path) -> None:
    runs = expand(CONFIGS / f"ablations/{name}.toml", tmp_path, [])
    sections = [run.config.lighthouse for run in runs]
    repeats_the_paper = name not in ("debug", "passkey_16k")
    expected = ("max", "sum") if repeats_the_paper else ("first", "finest")
    assert {(section.entry_score, section.combine) for section in sections} == {expected}


def test_the_readmes_fast_setting_is_that_of_its_configuration() -> None:
    path = CONFIGS / "270m_98k.toml"
    section = LighthouseConfigManager().parse_args(["--job.config_file", str(path)]).lighthouse
    readme = " ".join((CONFIGS.parent / "README.md").read_text().split())
    assert (
        f"the setting of `270m_98k`: a window of {section.window} tokens beside the selection, and "
        "no dense layer in the first stage"
    ) in readme
    assert section.dense_layers == [] and section.attention == "lighthouse"


def test_guide_says_how_many_rows_no_token_uses() -> None:
    guide = (CONFIGS.parent / "docs/guides/configuration.md").read_text()
    rows = [
        line.split(" | ")
        for line in guide.splitlines()
        if line.startswith("| `") and ".toml" in line
    ]
    listed = {name: row for row in rows for name in re.findall(r"\w+\.toml", row[0])}
    assert set(listed) == {path.name for path in FILES}
    ids = ByteTokenizer().get_vocab_size()
    for path in FILES:
        config = LighthouseConfigManager().parse_args(["--job.config_file", str(path)])
        tokenizer, unused = listed[path.name][2:4]
        assert tokenizer == config.lighthouse.tokenizer
        if tokenizer == "byte":
            rows_in_all = flavors[config.model.flavor].vocab_size
            assert unused.startswith(f"{rows_in_all - ids:,} of {rows_in_all:,}"), path


def test_every_grid_is_known() -> None:
    assert {path.stem for path in (CONFIGS / "ablations").iterdir()} == set(GRIDS)


@pytest.mark.parametrize("name", GRIDS)
def test_grid_expands_to_runs_that_build(name: str, tmp_path: Path) -> None:
    needs_folder = name in ("books_16k", "passkey_16k")
    words = FOLDERS_OF_TEXT if needs_folder else []
    runs = expand(CONFIGS / f"ablations/{name}.toml", tmp_path, words)
    refused = [run for run in runs if run.refusal]
    assert (len(runs), len(refused)) == GRIDS[name]
    for run in runs:
        section = run.config.lighthouse
        for key, value in run.settings.items():
            assert getattr(section, key.removeprefix("lighthouse.")) == value
        if run.refusal:
            assert "training.seq_len" in run.refusal and "top_k" in run.refusal
            method = LighthouseConfig(section.levels, section.pooling_factor, section.top_k,
                                      picks_per_stratum=section.picks_per_stratum)  # fmt: skip
            with pytest.raises(ValueError):
                PyramidGeometry(method, run.config.training.seq_len)
        else:
            assert check_model(run.config) < run.config.training.seq_len
    # The trainer reads the same configuration from the command line.
    assert record_of(LighthouseConfigManager().parse_args(run.arguments)) == record_of(run.config)


@pytest.mark.parametrize("name", EXTENDED)
def test_extension_is_as_long_as_its_scaling(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(EXTENDED[name]))
    line = ["--job.config_file", str(CONFIGS / f"{name}.toml"), "--model.hf_folder", str(tmp_path)]
    config = LighthouseConfigManager().parse_args(line)
    scaling = model_arguments_of(config).rope_scaling
    original = EXTENDED[name]["max_position_embeddings"]
    assert scaling["original_max_position_embeddings"] == original
    assert config.training.seq_len == scaling["factor"] * original
    section = config.lighthouse
    assert (section.window, section.dense_layers, section.attention) == (256, [], "lighthouse")


def test_dense_baseline_differs_in_nothing_but_attention() -> None:
    lighthouse, dense = (
        LighthouseConfigManager().parse_args(["--job.config_file", str(path)]).to_dict()
        for path in FILES
        if path.stem in ("270m_98k", "270m_98k_dense")
    )
    differing = {
        f"{section}.{key}"
        for section, values in lighthouse.items()
        for key, value in values.items()
        if dense[section][key] != value
    }
    assert differing == {
        "job.config_file", "job.dump_folder", "job.description", "lighthouse.stage",
    }  # fmt: skip
