"""Retrieval prompts as text, their answers, and a planted model that finds them."""

import re
from collections import Counter

import numpy as np
import torch

from torchtitan.models.llama3_lighthouse.data.retrieval import PromptEncoder
from torchtitan.models.llama3_lighthouse.data.tokenizer import (
    PADDED_VOCABULARY_SIZE,
    ByteTokenizer,
)

BYTES = PromptEncoder(ByteTokenizer())
QUESTION = re.compile(r" (?:The pass key (?:of [A-Z]{2} )?is|[A-Z]{2} =) ")


def text_of(tokens: torch.Tensor | np.ndarray) -> str:
    return ByteTokenizer().decode(tokens.tolist())


def answer_to(text: str) -> str:
    """The answer to a prompt, found as a reader would find it."""
    if asked := re.search(r' The value of "([A-Z]{4})" is ', text):
        return re.search(rf'"{asked[1]}": (\d)', text)[1]
    if " The most common word ends in " in text:
        return Counter(re.findall(r" [A-Z]{4}\d", text)).most_common(1)[0][0][-1]
    question = list(QUESTION.finditer(text))[-1].group()
    if question.endswith("= "):
        name, links = question[1:3], dict(re.findall(r" ([A-Z]{2}) = (\w+);", text))
        while name in links:
            name = links[name]
        return name
    (answer,) = re.findall(re.escape(question) + r"(\d+)\. ", text)
    return answer


def copying(tokens: torch.Tensor, places: slice) -> torch.Tensor:
    """A model that reads up to each place and no further, and answers right.

    A token that is no digit has the largest logit; digits alone must count.
    """
    logits = torch.zeros(len(tokens), places.stop - places.start, PADDED_VOCABULARY_SIZE)
    logits[..., ord("x")] = 9.0
    for row, sequence in enumerate(tokens):
        prompt = text_of(sequence[: places.start + 1])
        answer = answer_to(prompt)
        for column, place in enumerate(range(places.start, places.stop)):
            given = text_of(sequence[places.start + 1 : place + 1])
            assert given == answer[:column]
            logits[row, column, ord(answer[column])] = 1.0
    return logits
