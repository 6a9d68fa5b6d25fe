"""Folders of text for tests, and the batches that loaders make of them."""

import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchtitan.models.llama3_lighthouse.data.packing import PackedTextDataloader, build_dataloader
from torchtitan.models.llama3_lighthouse.data.tokenizer import ByteTokenizer
from torchtitan.models.llama3_lighthouse.job_config import JobConfig

# Words of a command line for runs that read folders of text and only have to be planned.
FOLDERS_OF_TEXT = ["--training.dataset_path", "text", "--validation.dataset_path", "text"]

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def config(
    dataset: str = "c4_local",
    path: Path | str | None = None,
    seq_len: int = 64,
    batch_size: int = 2,
    workers: int = 0,
) -> JobConfig:
    """A configuration that reads the same text for training and validation."""
    job = JobConfig()
    for section in (job.training, job.validation):
        section.dataset, section.dataset_path = dataset, path and str(path)
        section.seq_len, section.local_batch_size = seq_len, batch_size
        section.dataloader.num_workers = workers
    return job


def loader(
    job: JobConfig,
    rank: int = 0,
    ranks: int = 1,
    build: Callable[..., PackedTextDataloader] = build_dataloader,
) -> PackedTextDataloader:
    """The loader of one of ``ranks`` ranks, with the byte tokenizer."""
    return build(ranks, rank, ByteTokenizer(), job)


def digest(batch: Batch) -> str:
    """A hash of a batch's inputs and labels."""
    inputs, labels = batch
    return hashlib.sha256(inputs["input"].numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


def write_jsonl(folder: Path, documents: dict[str, list[Any]]) -> Path:
    """Write files of JSON lines, by name, compressed as the name's ending says."""
    folder.mkdir(parents=True, exist_ok=True)
    openers = {".gz": gzip.open, ".xz": lzma.open}
    for name, texts in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with openers.get(Path(name).suffix, open)(folder / name, "wt") as file:
            file.writelines(
                json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)
            )
    return folder


def global_batches(
    job: JobConfig, ranks: int, count: int, state: dict[str, Any] | None
) -> tuple[list[list[str]], dict[str, Any]]:
    """Read ``count`` global batches by ``ranks`` ranks, from a position or from the beginning.

    Returns:
        Digests of every batch's parts, and the position after them.
    """
    loaders = [loader(job, rank, ranks) for rank in range(ranks)]
    for each in loaders if state else []:
        each.load_state_dict(state)
    readers = [iter(each) for each in loaders]
    share = job.training.global_batch_size // ranks
    batches = [
        [digest(next(reader)) for reader in readers for _ in range(share)] for _ in range(count)
    ]
    return batches, {k: v for each in loaders for k, v in each.state_dict().items()}
