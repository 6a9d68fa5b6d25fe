"""The held-out sequences that measures of distance read, and the passages repeated in them."""

from dataclasses import dataclass

import numpy as np
import torch
from torchtitan.components.tokenizer import BaseTokenizer

from ..data.retrieval import random_of
from ..data.text_files import document_problem
from ..data.text_sources import find_source
from ..errors import UserValueError
from ..job_config import JobConfig

# Documents that are read in the search for long ones; streamed text need not end.
MOST_READ = 10_000
# This share of a passage tells that it returns, and is not counted.
LEAD_PARTS = 8


def held_out_sequences(
    config: JobConfig, tokenizer: BaseTokenizer, documents: int, sequences: int
) -> list[torch.Tensor]:
    """Sequences of the first held-out documents that are long enough; each lies in one document.

    A document gives as many as it holds side by side, ``sequences`` at most, spread from its
    beginning to its end; a single one comes from its middle.

    Returns:
        For each document int64 [sequences, validation.seq_len + 1].

    Raises:
        ValueError: there is no text, or no document is long enough.
    """
    section = config.validation
    needed = section.seq_len + 1
    source = find_source(section.dataset, "validation", section.dataset_path, "validation")
    found: list[torch.Tensor] = []
    longest = number = 0
    for number, document in enumerate(source.open(), 1):
        if problem := document_problem(document):
            raise UserValueError(
                f"validation.dataset = '{section.dataset}': document {number} {problem}; mend it"
            )
        text = document["text"]
        # No token is less than a byte long, so the text need not be encoded to be found too short.
        if len(text.encode("utf-8", errors="replace")) + 2 >= needed:
            tokens = np.array(tokenizer.encode(text, add_bos=True, add_eos=True), dtype=np.int64)
            longest = max(longest, len(tokens))
            if len(tokens) >= needed:
                found.append(_cut(torch.from_numpy(tokens), section.seq_len, sequences))
        if len(found) == documents or number == MOST_READ:
            break
    if not found:
        longer = f", the longest one {longest:,}" if longest else ""
        raise UserValueError(
            f"none of {number:,} held-out documents of validation.dataset = '{section.dataset}' "
            f"has {needed:,} tokens{longer}; lower validation.seq_len = {section.seq_len}, or name "
            "text with longer documents"
        )
    return found


def _cut(tokens: torch.Tensor, length: int, sequences: int) -> torch.Tensor:
    room = len(tokens) - length - 1
    count = max(1, min(sequences, (len(tokens) - 1) // length))
    if count == 1:
        starts = [room // 2]
    else:
        starts = [number * room // (count - 1) for number in range(count)]
    return torch.stack([tokens[start : start + length + 1] for start in starts])


@dataclass(frozen=True)
class RepeatedPassage:
    """A sequence in which a passage comes twice, and the same one without the first occurrence.

    Attributes:
        repeated: the passage stands at ``first`` and at ``again``, int64 [N + 1].
        control: another passage of the same document and length stands at ``first``.
        first, again: positions of the passage's first token.
        length: tokens of the passage.
        lead: tokens at its beginning that do not count.
    """

    repeated: torch.Tensor
    control: torch.Tensor
    first: int
    again: int
    length: int

    @property
    def lead(self) -> int:
        return self.length // LEAD_PARTS

    def counted(self, position: int) -> slice:
        """The tokens that count of the occurrence at ``position``."""
        return slice(position + self.lead, position + self.length)


def repeat_passage(
    tokens: torch.Tensor, distance: int, lengths: tuple[int, int], *key: object
) -> RepeatedPassage:
    """Repeat a passage of ``tokens`` exactly ``distance`` tokens later.

    Two passages of equal length are taken out of the text. One of them is put back twice, and the
    control holds the other one in the first of the two places. All tokens stay those of ``tokens``,
    and as many.

    Args:
        tokens: int64 [N + 1].
        distance: from the start of a passage to its return, lengths[1] to N - lengths[1].
        lengths: shortest and longest passage, both included.
        key: decides, with the distance, what is drawn.
    """
    random = random_of("repeated passage", distance, *key)
    count = len(tokens)
    length = int(random.integers(lengths[0], lengths[1] + 1))
    # The first token may be BOS, which stays.
    one, other = np.sort(random.integers(1, count - 2 * length + 1, size=2))
    starts = random.permutation([int(one), int(other) + length])
    passage, stand_in = (tokens[start : start + length] for start in starts)
    rest = torch.cat(
        [tokens[:one], tokens[one + length : other + length], tokens[other + 2 * length :]]
    )
    first = int(random.integers(1, count - length - distance + 1))
    between = distance - length
    before, middle, after = rest[:first], rest[first : first + between], rest[first + between :]
    return RepeatedPassage(
        torch.cat([before, passage, middle, passage, after]),
        torch.cat([before, stand_in, middle, passage, after]),
        first,
        first + distance,
        length,
    )
