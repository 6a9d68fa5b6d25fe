"""Held-out loss of a trained model by the length of its context, with confidence intervals."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer

from ..checkpoints.record import read_record
from ..checks.documents import check_window
from ..data.documents import (
    DOCUMENTS,
    document_span,
    model_options,
    positions_within,
    without_idle_masks,
)
from ..data.packing import build_validation_dataloader
from ..data.tokenizer import build_tokenizer, tokenizer_fingerprint
from ..errors import UserValueError
from ..job_config import JobConfig
from ..model.model import LighthouseTransformer, selecting_config
from .inference import TrainedModel, parse_over, recorded_config, without_output

# Positions whose logits exist at once, which bounds memory for any vocabulary.
POSITIONS_AT_ONCE = 2048
# 95% of a standard normal distribution lie within this distance of its mean.
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, which is None for fewer than two sequences."""

    mean: float
    low: float | None
    high: float | None


def text_identity(config: JobConfig) -> dict[str, object]:
    """The settings that the held-out tokens depend on, by configuration key.

    Configurations with equal settings are evaluated on the same tokens.

    Raises:
        ValueError: the configuration names no held-out text, or no tokenizer that is there.
    """
    section = config.validation
    if not section.enable:
        raise UserValueError(
            "the run had no validation, so nothing says which text is held out; pass "
            "--validation.enable --validation.dataset NAME --validation.seq_len "
            f"{config.training.seq_len} --validation.local_batch_size 1 --validation.steps BATCHES"
        )
    if section.seq_len > config.training.seq_len:
        raise UserValueError(
            f"validation.seq_len = {section.seq_len} exceeds training.seq_len = "
            f"{config.training.seq_len}, up to which positions are known; lower it"
        )
    sequences = None if section.steps < 0 else section.steps * section.local_batch_size
    files = None
    if config.lighthouse.tokenizer == "hf":
        # Folders of the same tokenizer may lie anywhere.
        files = f"a tokenizer with the hash {tokenizer_fingerprint(build_tokenizer(config))}"
    return {
        "validation.dataset": section.dataset,
        "validation.dataset_path": section.dataset_path,
        "validation.seq_len": section.seq_len,
        "validation.steps times validation.local_batch_size": sequences,
        "lighthouse.tokenizer": config.lighthouse.tokenizer,
        "model.hf_assets_path": files,
    }


def with_held_out_text(path: Path, overrides: list[str]) -> list[str]:
    """Overrides that give the run of a checkpoint a held-out text, if it had no validation.

    It is the held-out split of the training text, in sequences of training.seq_len.

    Raises:
        ValueError, TypeError, OSError: as ``recorded_config``.
    """
    config = recorded_config(path, overrides)
    if config.validation.enable:
        return overrides
    own = ["--validation.enable", "--validation.seq_len", str(config.training.seq_len)]
    own += ["--validation.dataset", config.training.dataset]
    own += ["--validation.local_batch_size", "1"]
    if config.training.dataset_path:
        own += ["--validation.dataset_path", config.training.dataset_path]
    return [*own, *overrides]


def span_of(path: Path, config: JobConfig, attention: Sequence[str]) -> int:
    """The number that documents begin at multiples of, from the run's validation; 0 without masks.

    An attention that the run never used may need a larger one.

    Args:
        path: the step-N folder, in whose record the schedule of the run is.
        config: from ``recorded_config``, which knows one stage of it.
        attention: those to evaluate under.

    Raises:
        ValueError: one of them cannot keep documents apart.
    """
    if not config.training.document_mask:
        return 0
    record = read_record(path)
    run = parse_over(record.config, []) if record else config
    spans = [document_span(run), document_span(config)]
    if "lighthouse" in attention and (method := selecting_config(config.lighthouse)):
        try:
            check_window(config.lighthouse)
        except UserValueError as error:
            raise UserValueError(f"{path}: {error}") from None
        spans.append(method.coarsest_span)
    return max(spans)


def check_text(config: JobConfig) -> None:
    """Read the beginning of the held-out text.

    Raises:
        ValueError: the text is not there, or a document is empty or holds no text.
    """
    build_validation_dataloader(1, 0, build_tokenizer(config), config, span=0)


def held_out_batches(
    config: JobConfig, tokenizer: BaseTokenizer, span: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Yield the batches that a trainer with one reader validates on.

    A batch is inputs and labels, int64 [B, N] each, and documents, int32 [B, N], or None if each
    row is one document.

    Args:
        span: from ``span_of``, the largest of those that are compared.

    Raises:
        ValueError: the held-out text is not there.
    """
    loader = iter(build_validation_dataloader(1, 0, tokenizer, config, span=span))
    for _, (inputs, labels) in zip(_batch_numbers(config), loader, strict=False):
        yield inputs["input"], labels, without_idle_masks(inputs, None).get(DOCUMENTS)


def _batch_numbers(config: JobConfig) -> range:
    steps = config.validation.steps
    return range(2**63 if steps < 0 else steps)


@torch.no_grad()
def losses_by_position(
    model: LighthouseTransformer,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    options: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Loss of every position in nats, float32 [B, N] on the CPU; NaN where there is no label.

    Args:
        inputs: int64 [B, N].
        labels: int64 [B, N].
        options: from ``model_options``.
    """
    device = next(model.parameters()).device
    wanted = (labels != IGNORE_INDEX).any(dim=0)
    labels = labels.to(device)
    with without_output(model) as output:
        given = {name: x.to(device) for name, x in (options or {}).items()}
        hidden = model(inputs.to(device), **given)
    losses = []
    for start in range(0, labels.shape[1], POSITIONS_AT_ONCE):
        chunk = slice(start, start + POSITIONS_AT_ONCE)
        if not wanted[chunk].any():
            losses.append(torch.zeros(labels[:, chunk].shape, device=device))
            continue
        logits = output(hidden[:, chunk]).float()
        losses.append(
            cross_entropy(
                logits.transpose(1, 2),
                labels[:, chunk],
                reduction="none",
                ignore_index=IGNORE_INDEX,
            )
        )
    return torch.cat(losses, dim=1).masked_fill(labels == IGNORE_INDEX, math.nan).cpu()


def context_buckets(seq_len: int, first: int) -> list[tuple[int, int]]:
    """Ranges (from, to) of tokens of context, both included, that double up to ``seq_len``.

    A position's context is every token up to and including its own: of the sequence, or of its
    document where documents do not see each other. The first range is 1 to ``first``.

    Raises:
        ValueError: ``first`` is below 1.
    """
    if first < 1:
        raise UserValueError(f"--first-bucket {first} must be at least 1")
    buckets, start, end = [], 1, min(first, seq_len)
    while start <= seq_len:
        buckets.append((start, end))
        start, end = end + 1, min(2 * end, seq_len)
    return buckets


def bucket_means(
    losses: torch.Tensor, buckets: list[tuple[int, int]], context: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of each sequence in each bucket, and of how many positions it is the mean.

    Args:
        losses: [B, N], NaN where there is no label.
        context: tokens of context, integers [B, N]; None: 1 to N in each sequence.

    Returns:
        float64 and int64, [B, buckets] each. A mean without positions is NaN.
    """
    if context is None:
        context = torch.arange(1, losses.shape[1] + 1)
    means, counts = [], []
    for start, end in buckets:
        within = losses.masked_fill((context < start) | (context > end), math.nan)
        means.append(within.double().nanmean(dim=1))
        counts.append((~within.isnan()).sum(dim=1))
    return torch.stack(means, dim=1), torch.stack(counts, dim=1)


def estimate(values: torch.Tensor, weights: torch.Tensor | None = None) -> Estimate:
    """Weighted mean over sequences, which are taken as independent, with its 95% interval.

    The interval is normal. It takes the mean as a ratio of two sums over sequences, and the ratio
    as linear in both.

    Args:
        values: one for each sequence, [sequences]; NaNs are left out.
        weights: as many, such as the positions that each value is the mean of; None: equal ones.
    """
    known = ~values.isnan()
    values = values[known].double()
    weights = torch.ones_like(values) if weights is None else weights[known].double()
    mean = ((weights * values).sum() / weights.sum()).item()
    if len(values) < 2:
        return Estimate(mean, None, None)
    residuals = weights / weights.mean() * (values - mean)
    half_width = NORMAL_95 * (residuals.std() / len(values) ** 0.5).item()
    return Estimate(mean, mean - half_width, mean + half_width)


def evaluate(
    trained: TrainedModel,
    attention: str,
    span: int,
    progress: Callable[[int | None, float], None] = lambda *arguments: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and tokens of context at every position of every held-out sequence.

    Args:
        attention: "dense" or "lighthouse".
        span: from ``span_of``, the largest of those that are compared. Unless it is 0, context
            begins with the position's document.
        progress: called after every batch with the number of all batches (None if it is not
            known) and the mean loss so far.

    Returns:
        Losses in nats, float32 [sequences, N], NaN where there is no label; and the context,
        integers of the same shape.

    Raises:
        ValueError: the held-out text is not there or fills no batch.
    """
    trained.model.use_attention(attention)
    config = trained.config
    steps = config.validation.steps
    parts, contexts, total, count = [], [], 0.0, 0
    for inputs, labels, documents in held_out_batches(config, trained.tokenizer, span):
        masks = documents if config.training.document_mask else None
        options = model_options(masks, config.lighthouse)
        parts.append(losses_by_position(trained.model, inputs, labels, options))
        first = torch.zeros_like(inputs) if documents is None else documents
        contexts.append(positions_within(first) + 1)
        total += parts[-1].nansum(dtype=torch.float64).item()
        count += parts[-1].isfinite().sum().item()
        progress(None if steps < 0 else steps, total / max(1, count))
    if not parts:
        section = config.validation
        raise UserValueError(
            f"validation.dataset = '{section.dataset}' holds less than one sequence of "
            f"validation.seq_len = {section.seq_len} tokens; give it more text or lower "
            "validation.seq_len"
        )
    return torch.cat(parts), torch.cat(contexts)
