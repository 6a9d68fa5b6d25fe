"""Files that try to run code, or to have files read that lie elsewhere."""

import builtins
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cases import Bad, Case, Result, clear
from .corruptions import take_two
from .readings import CAN_EXPORT, READINGS, exported, imported
from .references import DAMAGED
from .runs import Launch, command

# Files of a checkpoint that an attacker cannot do without; others, such as checksums, can go.
NEEDED = (".metadata", "lighthouse.json")
MODULE = "campaign_payload"


class Payload:
    """Pickles as a call that makes a file."""

    def __init__(self, marker: Path, kind: str) -> None:
        touch = f"open({str(marker)!r}, 'w').close()"
        self.call: tuple[Callable[..., Any], tuple[str, ...]] = {
            "os.system": (os.system, (f"touch '{marker}'",)),
            "builtins.eval": (builtins.eval, (touch,)),
            "builtins.exec": (builtins.exec, (touch,)),
        }[kind]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return self.call


def metadata_is(newest: Path, payload: Payload) -> None:
    (newest / ".metadata").write_bytes(pickle.dumps(payload))


def metadata_holds(newest: Path, payload: Payload) -> None:
    metadata = pickle.loads((newest / ".metadata").read_bytes())
    metadata.planner_data = payload
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))


def metadata_storage_holds(newest: Path, payload: Payload) -> None:
    metadata = pickle.loads((newest / ".metadata").read_bytes())
    metadata.storage_meta = payload
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))


def _put_entry(newest: Path, wanted: Callable[[str, object], bool], content: bytes) -> None:
    """Let the first wanted entry of a checkpoint be ``content``, added to the end of its file."""
    file = newest / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    index = next(
        index
        for index in sorted(metadata.storage_data, key=lambda index: index.fqn)
        if wanted(index.fqn, metadata.state_dict_metadata[index.fqn])
    )
    info = metadata.storage_data[index]
    data = newest / info.relative_path
    metadata.storage_data[index] = replace(info, offset=data.stat().st_size, length=len(content))
    with data.open("ab") as opened:
        opened.write(content)
    file.write_bytes(pickle.dumps(metadata))


def _saved(value: object) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _is_tensor(entry: object) -> bool:
    return type(entry).__name__ == "TensorStorageMetadata"


def loader_entry(newest: Path, payload: Payload) -> None:
    _put_entry(newest, lambda name, _: name.startswith("dataloader."), _saved(payload))


def loader_state(newest: Path, payload: Payload) -> None:
    """The entry is sound, and the bytes in it are a pickle."""
    _put_entry(newest, lambda name, _: name.startswith("dataloader.stream"),
               _saved(pickle.dumps(payload)))  # fmt: skip


def loader_identity(newest: Path, payload: Payload) -> None:
    _put_entry(newest, lambda name, _: name == "dataloader.identity",
               _saved(pickle.dumps(payload)))  # fmt: skip


def progress_entry(newest: Path, payload: Payload) -> None:
    _put_entry(newest, lambda name, entry: not name.startswith("dataloader")
               and not _is_tensor(entry), _saved(payload))  # fmt: skip


def weight_entry(newest: Path, payload: Payload) -> None:
    _put_entry(newest, lambda name, entry: _is_tensor(entry) and "optim" not in name,
               _saved(payload))  # fmt: skip


def old_style_weight(newest: Path, payload: Payload) -> None:
    """torch reads files that are no archives with its oldest format, which is pickles alone."""
    _put_entry(newest, lambda name, entry: _is_tensor(entry) and "optim" not in name,
               pickle.dumps(payload))  # fmt: skip


def moment_entry(newest: Path, payload: Payload) -> None:
    _put_entry(newest, lambda name, entry: _is_tensor(entry) and "optim" in name, _saved(payload))


def record_module(newest: Path, payload: Payload) -> None:
    file = newest / "lighthouse.json"
    record = json.loads(file.read_text())
    record["config"]["job"]["custom_config_module"] = MODULE
    file.write_text(json.dumps(record))


CHECKPOINTS = (
    metadata_is, metadata_holds, metadata_storage_holds, loader_entry, loader_state,
    loader_identity, progress_entry, weight_entry, old_style_weight, moment_entry, record_module,
)  # fmt: skip


def index_above(folder: Path, payload: Payload) -> None:
    _point_index(folder, "../model.safetensors")


def index_absolute(folder: Path, payload: Payload) -> None:
    _point_index(folder, str(folder.parent / "model.safetensors"))


def _point_index(folder: Path, name: str) -> None:
    weights = folder / "model.safetensors"
    header = weights.read_bytes()
    length = int.from_bytes(header[:8], "little")
    names = [name for name in json.loads(header[8 : 8 + length]) if name != "__metadata__"]
    weights.rename(folder.parent / weights.name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled_weights(folder: Path, payload: Payload) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(payload))


def old_weights(folder: Path, payload: Payload) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(_saved(payload))


def tokenizer_code(folder: Path, payload: Payload) -> None:
    (folder / f"{MODULE}.py").write_text(_module(payload))
    settings = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [f"{MODULE}.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def pickled_tokenizer(folder: Path, payload: Payload) -> None:
    (folder / "tokenizer.json").write_bytes(pickle.dumps(payload))


IMPORTS = (
    index_above, index_absolute, pickled_weights, old_weights, tokenizer_code, pickled_tokenizer,
)  # fmt: skip
# Each attack on a checkpoint is tried with each of these.
PAYLOADS = ("os.system", "builtins.eval", "builtins.exec")
COUNT = 2 * len(CHECKPOINTS) + len(IMPORTS)


def _module(payload: Payload) -> str:
    call, arguments = payload.call
    return f"import os, builtins\n{call.__module__}.{call.__name__}(*{arguments!r})\n".replace(
        "posix.", "os."
    )


def attack(case: Case) -> Result:
    """Read a malicious file by all that reads such files; its payload must not run."""
    marker = case.folder / "marker"
    payload = Payload(marker, PAYLOADS[case.number % len(PAYLOADS)])
    on_checkpoint = case.number < 2 * len(CHECKPOINTS)
    attacks = CHECKPOINTS if on_checkpoint else IMPORTS
    how = attacks[case.number % len(CHECKPOINTS) if on_checkpoint else case.number % len(IMPORTS)]
    tried = f"{how.__name__}, {payload.call[0].__name__}"
    if not on_checkpoint and not CAN_EXPORT:
        return Result("skipped", tried, "safetensors is not installed")
    try:
        ends = _checkpoint(case, how, payload) if on_checkpoint else _import(case, how, payload)
        if marker.exists():
            raise Bad("executed", f"the payload ran; {ends}")
    except Bad as bad:
        if marker.exists():
            return Result("executed", tried, "the payload ran")
        return Result(bad.outcome, tried, bad.found)
    return Result("refused" if "refused" in ends else "harmless", tried, ends)


def _checkpoint(case: Case, how: Callable[[Path, Payload], None], payload: Payload) -> str:
    reference = case.world.references["forked 1"]
    newest, _ = take_two(case, reference)
    (case.folder / f"{MODULE}.py").write_text(_module(payload))
    # A run's folder is often the current one.
    sys.path.insert(0, str(case.folder))
    how(newest, payload)
    for file in newest.iterdir():
        if file.name not in NEEDED and file.suffix != ".distcp":
            file.unlink()
    ends = []
    for reading in READINGS:
        end, _ = reading(newest, case.folder)
        ends.append("refused" if clear(end, reading.__name__).code else "read")
    line = command(case.dump, case.world.text)
    end = clear(Launch(line, case.folder).wait(), "restart")
    ends.append("refused" if end.code else "read")
    return ", ".join(ends)


def _import(case: Case, how: Callable[[Path, Payload], None], payload: Payload) -> str:
    reference = case.world.references["forked 1"]
    exported(reference.checkpoint(DAMAGED), case.folder)
    folder = case.folder / "hf" / "model"
    shutil.copytree(case.folder / "exported", folder)
    how(folder, payload)
    end, made = imported(folder, case.folder)
    clear(end, "import")
    if made and how in (index_above, index_absolute):
        raise Bad("executed", "weights were read from outside of the folder")
    return "refused" if end.code else "imported"
