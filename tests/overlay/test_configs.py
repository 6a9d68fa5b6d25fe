"""Every file in train_configs/ is a run that would start."""

from pathlib import Path

import pytest
import torch

from lighthouse import LighthouseAttention
from torchtitan.models.llama3_lighthouse import LighthouseTransformer, flavors
from torchtitan.models.llama3_lighthouse.checks import check_config
from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

FILES = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_builds_what_it_says(path: Path, tmp_path: Path) -> None:
    line = ["--job.config_file", str(path), "--job.dump_folder", str(tmp_path)]
    if path.stem.startswith("8b"):
        with pytest.raises(ValueError, match="--model.hf_assets_path FOLDER"):
            check_config(LighthouseConfigManager().parse_args(line), flavors)
        line += ["--model.hf_assets_path", str(tmp_path)]
    config = LighthouseConfigManager().parse_args(line)
    check_config(config, flavors)

    args = flavors[config.model.flavor]
    args.update_from_config(config)
    with torch.device("meta"):
        model = LighthouseTransformer(args)
    section = config.lighthouse
    for index, block in model.layers.items():
        inner = block.attention.inner_attention
        assert isinstance(inner, LighthouseAttention) == (int(index) not in section.dense_layers)
        if isinstance(inner, LighthouseAttention):
            assert inner.config.levels == section.levels
            assert inner.config.pooling_factor == section.pooling_factor
            assert inner.config.top_k == section.top_k
            assert inner.config.scorer == section.scorer
    # Attention really runs on a small part of the sequence.
    assert args.gathered_length(config.training.seq_len) < config.training.seq_len / 4
    if section.stage == "auto":
        assert 0 < section.dense_from_step < config.training.steps


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
