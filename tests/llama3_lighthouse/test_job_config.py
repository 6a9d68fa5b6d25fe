"""The [lighthouse] section has every setting of the method, hands it on, and is documented."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args

import pytest

from lighthouse import LighthouseConfig
from torchtitan.models.llama3_lighthouse.job_config import Lighthouse, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.model.model import lighthouse_config

PAGE = Path(__file__).parents[2] / "docs/guides/configuration.md"
# A value for each setting that differs from its default and fits the others' defaults.
OTHER_VALUES = {
    "levels": 4,
    "pooling_factor": 2,
    "top_k": 768,
    "scorer": "gla",
    "picks_per_stratum": 64,
    "dilation": 8,
    "entry_score": "max",
    "combine": "sum",
    "window": 256,
}


@pytest.mark.parametrize("setting", fields(LighthouseConfig), ids=lambda setting: setting.name)
def test_every_setting_of_the_method_is_a_key(setting) -> None:
    """A key of the same name, type and default, and its value arrives in the method."""
    keys = {key.name: key for key in fields(Lighthouse)}
    assert setting.name in keys, (
        f"[lighthouse] has no key {setting.name}: job_config.py must generate its keys from "
        "fields(LighthouseConfig)"
    )
    key = keys[setting.name]
    assert (key.type, key.default) == (setting.type, setting.default)
    assert setting.name in OTHER_VALUES, (
        f"give OTHER_VALUES in {__file__} a value of the setting {setting.name}"
    )
    value = OTHER_VALUES[setting.name]
    assert value != setting.default
    needed = {"combine": "finest"} if setting.name == "window" else {}
    method = lighthouse_config(Lighthouse(**needed, **{setting.name: value}))
    assert method == LighthouseConfig(**needed, **{setting.name: value})


def test_every_key_is_explained(capsys) -> None:
    """The help text has, for every setting, the words of the docstring of LighthouseConfig."""
    with pytest.raises(SystemExit):
        LighthouseConfigManager().parse_args(["--help"])
    # The help text is drawn in a box and wrapped.
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    docstring = " ".join(LighthouseConfig.__doc__.split())
    for setting in fields(LighthouseConfig):
        option = f"--lighthouse.{setting.name.replace('_', '-')} "
        choices = get_args(setting.type)
        values = f"{{{','.join(choices)}}}" if choices else "INT"
        assert option + values in words
        explained = words.split(option, 1)[1].split(f"(default: {setting.default})")[0]
        explained = explained.split(maxsplit=1)[1].strip()
        assert explained and f"{setting.name}: {explained}" in docstring


def test_every_key_is_on_the_page_with_its_default() -> None:
    section = PAGE.read_text().split("\n## ")[1]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, re.MULTILINE))
    keys = {key: json.dumps(default) for key, default in asdict(Lighthouse()).items()}
    assert rows == keys, f"{PAGE} and job_config.Lighthouse differ"
