"""What far context is worth to a model, in nats per token, on held-out documents.

Three measures, each by document, so that documents can be resampled:

- loss by position;
- loss of the same targets with all the context and with the last tokens of it alone;
- loss of passages that stood in the text some distance earlier, beside the loss of the same
  passages in the same places where they had not.

``measure`` gives them all as named numbers. The documents, targets and passages depend on the
held-out text and the settings alone, so results of several models can be compared by document.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer

from ..data.retrieval import random_of
from ..errors import UserValueError
from ..job_config import JobConfig
from ..model.model import LighthouseTransformer, fitting
from .bootstrap import bootstrap
from .distance_text import held_out_sequences, repeat_passage
from .held_out_loss import Estimate, bucket_means, context_buckets, losses_by_position

# Takes inputs and labels, int64 [B, N] each; gives losses [B, N], NaN where there is no label.
Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DEFAULT_CONTEXTS = (1024, 8192)
SHORTEST_DISTANCE = 4096
DEFAULT_PASSAGE = (256, 1024)
# Measures by their better side: less of a loss, and more of a gain.
LOSSES, GAINS = ("loss", "position", "context"), ("beyond", "repeated")
# Targets are taken in so many blocks of a sequence, each of this many tokens at most.
BLOCKS = 8
BLOCK_TARGETS = 128


@dataclass(frozen=True)
class DistanceSettings:
    """Settings of the measures; N is validation.seq_len.

    Attributes:
        documents: held-out documents of more than N tokens, the first ones; fewer if the text has
            fewer.
        sequences: sequences of each document at most.
        contexts: tokens of context that targets are limited to; None: those of 1,024 and 8,192
            that are at most half of N.
        distances: tokens from a passage to its return; None: from 4,096 (N / 8 if that is less)
            doubling, and the longest that fits.
        passage: shortest and longest passage; None: 256 to 1,024, in short sequences N / 32 to
            N / 16.
        seed: of targets, passages and places.
        first_bucket: as in ``context_buckets``.
        batch_tokens: tokens in a batch, one sequence at least.
    """

    documents: int = 16
    sequences: int = 1
    contexts: tuple[int, ...] | None = None
    distances: tuple[int, ...] | None = None
    passage: tuple[int, int] | None = None
    seed: int = 0
    first_bucket: int = 256
    batch_tokens: int = 65536


@dataclass(frozen=True)
class Plan:
    """Settings with all values filled in, for sequences of ``length`` tokens."""

    settings: DistanceSettings
    length: int
    contexts: tuple[int, ...]
    distances: tuple[int, ...]
    passage: tuple[int, int]

    @property
    def block(self) -> int:
        """Targets of a block. Its first one has that much less context than the last, less one."""
        return min(BLOCK_TARGETS, min(self.contexts) // 4)


@dataclass(frozen=True)
class Value:
    """One number of one document.

    Attributes:
        measure: one of ``LOSSES`` and ``GAINS``.
        tokens: end of the bucket, tokens of context, or distance; None where there is none.
        quantity: "" for the measure itself, or the name of a loss that it is made of.
        document: number of the document, from 0.
        value: nats per token.
        targets: tokens that it is the mean of.
    """

    measure: str
    tokens: int | None
    quantity: str
    document: int
    value: float
    targets: int

    @property
    def key(self) -> str:
        """The name of the number, such as "repeated/8192/control"."""
        parts = (self.measure, "" if self.tokens is None else str(self.tokens), self.quantity)
        return "/".join(filter(None, parts))


def better_side(key: str) -> str | None:
    """The better side of the number of a name, "lower" or "higher"; None if none is named so."""
    kind, _, rest = key.partition("/")
    if kind in GAINS:
        return "higher" if rest.isdigit() else "lower"
    return "lower" if kind in LOSSES else None


def measure(
    model: LighthouseTransformer,
    tokenizer: BaseTokenizer,
    config: JobConfig,
    attention: str = "dense",
    settings: DistanceSettings = DistanceSettings(),
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, float]:
    """All measures as one flat dict of named numbers; see ``flat`` and the evaluation guide.

    Args:
        model, tokenizer, config: those of a ``TrainedModel``. ``config.validation`` names the
            text and its seq_len, which the model's max_seq_len must reach.
        attention: "dense" or "lighthouse".
        progress: called after each batch with the tokens of it.

    Raises:
        ValueError: the settings do not fit the sequences, or no document is long enough.
    """
    return flat(measure_documents(model, tokenizer, config, attention, settings, progress))


def measure_documents(
    model: LighthouseTransformer,
    tokenizer: BaseTokenizer,
    config: JobConfig,
    attention: str = "dense",
    settings: DistanceSettings = DistanceSettings(),
    progress: Callable[[int], None] = lambda tokens: None,
    documents: Sequence[torch.Tensor] | None = None,
) -> list[Value]:
    """As ``measure``, by document, which pairs the documents of several models.

    Args:
        documents: the result of ``held_out_sequences``, if they have been read.
    """
    plan = plan_of(settings, config.validation.seq_len)
    if documents is None:
        documents = held_out_sequences(config, tokenizer, settings.documents, settings.sequences)
    model.use_attention(attention)
    fit = fitting(config.lighthouse, attention)

    def losses(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = losses_by_position(model, inputs, labels)
        progress(inputs.numel())
        return found

    return list(values_of(losses, documents, plan, fit))


def plan_of(settings: DistanceSettings, length: int) -> Plan:
    """Fill in the settings for sequences of ``length`` tokens, and check them.

    Raises:
        ValueError: a value does not fit.
    """
    for name in ("documents", "sequences", "batch_tokens", "first_bucket"):
        if (value := getattr(settings, name)) < 1:
            raise UserValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    passage = settings.passage or (
        min(DEFAULT_PASSAGE[0], length // 32),
        min(DEFAULT_PASSAGE[1], length // 16),
    )
    if not 2 <= passage[0] <= passage[1] <= length // 4:
        raise UserValueError(
            f"--passage {passage[0]} {passage[1]} must be two lengths, the shorter one first, from "
            f"2 to a quarter of validation.seq_len = {length}"
        )
    longest = length - passage[1]
    distances = settings.distances
    if distances is None:
        first = max(passage[1], min(SHORTEST_DISTANCE, length // 8))
        doublings = range(max(1, length // first).bit_length())
        distances = (*(first << n for n in doublings if (first << n) * 4 < longest * 3), longest)
    for distance in distances:
        if not passage[1] <= distance <= longest:
            raise UserValueError(
                f"--distances {distance} must lie between {passage[1]}, the longest passage, and "
                f"{longest}, validation.seq_len = {length} less that; leave it out"
            )
    contexts = settings.contexts
    if contexts is None:
        contexts = tuple(each for each in DEFAULT_CONTEXTS if each <= length // 2)
    for context in contexts:
        if not 4 <= context <= length * 3 // 4:
            raise UserValueError(
                f"--contexts {context} must lie between 4 and three quarters of "
                f"validation.seq_len = {length}; leave it out"
            )
    return Plan(settings, length, tuple(sorted(set(contexts))), tuple(sorted(set(distances))),
                passage)  # fmt: skip


def tokens_read(documents: Sequence[torch.Tensor], plan: Plan, fit: Callable[[int], int]) -> int:
    """Tokens of all forward passes of ``values_of``."""
    windows = _block_count(plan) * sum(map(fit, plan.contexts)) if plan.contexts else 0
    each = plan.length * (1 + 2 * len(plan.distances)) + windows
    return each * sum(map(len, documents))


def values_of(
    losses: Losses,
    documents: Sequence[torch.Tensor],
    plan: Plan,
    fit: Callable[[int], int] = lambda length: length,
) -> Iterator[Value]:
    """Yield all numbers of all documents.

    Args:
        documents: for each int64 [sequences, N + 1].
        fit: the least length from a given one on that the model takes.
    """
    for number, sequences in enumerate(documents):
        everything = torch.ones_like(sequences, dtype=torch.bool)
        full = _losses(losses, sequences, everything, plan)
        yield Value("loss", None, "", number, full.double().mean().item(), full.numel())
        buckets = context_buckets(plan.length, plan.settings.first_bucket)
        means = bucket_means(full, buckets)[0].mean(0)
        for (start, end), mean in zip(buckets, means.tolist(), strict=True):
            yield Value("position", end, "", number, mean, (end - start + 1) * len(sequences))
        if plan.contexts:
            yield from _with_less_context(losses, number, sequences, full, plan, fit)
        for distance in plan.distances:
            yield from _repeated(losses, number, sequences, distance, plan)


def _losses(
    losses: Losses, tokens: torch.Tensor, counted: torch.Tensor, plan: Plan
) -> torch.Tensor:
    """Losses [R, n] of the tokens after the first of ``tokens`` [R, n + 1]; NaN if not counted."""
    labels = tokens.masked_fill(~counted, IGNORE_INDEX)[:, 1:]
    inputs = tokens[:, :-1]
    size = max(1, plan.settings.batch_tokens // inputs.shape[1])
    parts = [losses(*part) for part in zip(inputs.split(size), labels.split(size), strict=True)]
    return torch.cat(parts)


def _block_count(plan: Plan) -> int:
    return min(BLOCKS, (plan.length - max(plan.contexts)) // plan.block)


def _block_ends(plan: Plan, *key: object) -> list[int]:
    """Ends of the blocks of targets, each drawn to lie in one of as many equal ranges."""
    edges = np.linspace(max(plan.contexts), plan.length + 1, _block_count(plan) + 1).astype(int)
    random = random_of("targets", plan.settings.seed, *key)
    return [
        int(random.integers(low + plan.block, high + 1))
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]


def _with_less_context(
    losses: Losses,
    number: int,
    sequences: torch.Tensor,
    full: torch.Tensor,
    plan: Plan,
    fit: Callable[[int], int],
) -> Iterator[Value]:
    """Losses of the same targets with all the context and with the last of it alone.

    The last target of a block has exactly the tokens of context that are asked for.
    """
    block = plan.block
    blocks = [(row, end) for row in range(len(sequences)) for end in _block_ends(plan, number, row)]
    targets = len(blocks) * block
    # The loss of a token stands one place before it.
    whole = torch.stack([full[row, end - 1 - block : end - 1] for row, end in blocks]).double()
    yield Value("context", None, "full", number, whole.mean().item(), targets)
    for context in plan.contexts:
        count = fit(context)
        # Text from elsewhere in the document fills up the length that Lighthouse takes.
        padding = plan.length // 2 + np.arange(count - context)
        rows = torch.stack([
            torch.cat([
                sequences[row, end - 1 - context : end],
                sequences[row, torch.from_numpy((end + padding) % (plan.length + 1))],
            ])
            for row, end in blocks
        ])  # fmt: skip
        counted = torch.zeros_like(rows, dtype=torch.bool)
        counted[:, context + 1 - block : context + 1] = True
        found = _losses(losses, rows, counted, plan)[:, context - block : context].double()
        yield Value("context", context, "", number, found.mean().item(), targets)
        yield Value("beyond", context, "", number, (found - whole).mean().item(), targets)


def _repeated(
    losses: Losses, number: int, sequences: torch.Tensor, distance: int, plan: Plan
) -> Iterator[Value]:
    """Losses of passages that return, and the gain over passages that do not."""
    drawn = [
        repeat_passage(tokens, distance, plan.passage, plan.settings.seed, number, row)
        for row, tokens in enumerate(sequences)
    ]
    rows = torch.stack([tokens for each in drawn for tokens in (each.repeated, each.control)])
    counted = torch.zeros_like(rows, dtype=torch.bool)
    for row, each in enumerate(drawn):
        counted[2 * row, each.counted(each.first)] = True
        counted[2 * row : 2 * row + 2, each.counted(each.again)] = True
    found = _losses(losses, rows, counted, plan).double()
    by_quantity: dict[str, list[torch.Tensor]] = {"loss": [], "first": [], "control": []}
    for row, each in enumerate(drawn):
        for quantity, source, position in (
            ("loss", 2 * row, each.again),
            ("first", 2 * row, each.first),
            ("control", 2 * row + 1, each.again),
        ):
            place = each.counted(position)
            by_quantity[quantity].append(found[source, place.start - 1 : place.stop - 1])
    targets = sum(map(len, by_quantity["loss"]))
    means = {name: torch.cat(parts).mean().item() for name, parts in by_quantity.items()}
    gain = means["control"] - means["loss"]
    yield Value("repeated", distance, "", number, gain, targets)
    for name, mean in means.items():
        yield Value("repeated", distance, name, number, mean, targets)


@dataclass(frozen=True)
class Summary:
    """A number over all documents, each of which counts the same.

    Attributes:
        first: the number of the first document, which names the measure.
        estimate: mean, and the interval over documents.
    """

    first: Value
    estimate: Estimate
    by_document: dict[int, float]
    targets: int


def summarise(values: Sequence[Value]) -> dict[str, Summary]:
    """Each number over all documents, by its name, in the order in which they come."""
    groups: dict[str, list[Value]] = {}
    for each in values:
        groups.setdefault(each.key, []).append(each)
    return {
        key: Summary(
            group[0],
            bootstrap([each.value for each in group]),
            {each.document: each.value for each in group},
            sum(each.targets for each in group),
        )
        for key, group in groups.items()
    }


def flat(values: Sequence[Value]) -> dict[str, float]:
    """Each number by its name, its interval as NAME/low and NAME/high, and two counts.

    NAME/documents and NAME/targets say how much the number is the mean of. One document has no
    interval.
    """
    found: dict[str, float] = {}
    for key, summary in summarise(values).items():
        estimate = summary.estimate
        found[key] = estimate.mean
        if estimate.low is not None and estimate.high is not None:
            found |= {f"{key}/low": estimate.low, f"{key}/high": estimate.high}
        found |= {f"{key}/documents": len(summary.by_document), f"{key}/targets": summary.targets}
    return found
