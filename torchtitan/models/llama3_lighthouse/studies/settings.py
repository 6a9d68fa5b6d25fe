"""Settings of runs: values by section.key, as flags, in configurations and as records."""

import copy
import json
from collections.abc import Mapping
from typing import Any

from ..job_config import BYTE_TOKENIZER_FOLDER, NO_SCHEDULE, JobConfig, leaves

Settings = Mapping[str, Any]


def command_line(settings: Settings) -> list[str]:
    """Settings as the trainer's flags."""
    line: list[str] = []
    # torchtitan reads a list of names from one word, with commas, and tyro any other from several.
    of_names = {leaf.key for leaf in leaves(JobConfig()) if leaf.kind == list[str]}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if isinstance(value, bool):
            line.append(f"--{section}.{name}" if value else f"--{section}.no-{name}")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            if key == "lighthouse.schedule":
                values = values or [NO_SCHEDULE]
            values = [",".join(values)] if key in of_names else values
            line += [f"--{key}", *map(str, values)]
    return line


def value_of(config: JobConfig, key: str) -> Any:
    """The value of section.key."""
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def with_settings(config: JobConfig, settings: Settings) -> JobConfig:
    """A copy of a configuration with other values of section.key."""
    config = copy.deepcopy(config)
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        setattr(value_of(config, section), name, value)
    return config


def record_of(config: JobConfig) -> str:
    """Everything in a configuration that a run depends on, as JSON.

    The folder of the byte tokenizer is left out: a study may go on where it is another.
    """
    sections = {name: section for name, section in config.to_dict().items() if name != "job"}
    if config.model.hf_assets_path == BYTE_TOKENIZER_FOLDER:
        del sections["model"]["hf_assets_path"]
    return json.dumps(sections, indent=1)


def nested(settings: Settings) -> dict[str, Any]:
    """Settings as nested tables, the inverse of ``flatten``."""
    tables: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        table = tables
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return tables
