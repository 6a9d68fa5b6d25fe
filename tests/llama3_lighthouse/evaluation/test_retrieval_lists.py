"""Retrieval prompts that a list fills, and a planted model that looks 512 tokens back."""

import json
import re
from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch
from retrieval_prompts import BYTES, answer_to, copying, text_of

from torchtitan.models.llama3_lighthouse.data.retrieval import (
    TASKS,
    PromptEncoder,
    evaluation_prompt,
    shortest_prompt,
)
from torchtitan.models.llama3_lighthouse.data.retrieval_mix import RetrievalMix
from torchtitan.models.llama3_lighthouse.data.tokenizer import (
    BOS_ID,
    EOS_ID,
    PADDED_VOCABULARY_SIZE,
    ByteTokenizer,
)
from torchtitan.models.llama3_lighthouse.evaluation.retrieval_accuracy import measure_cell
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, RetrievalTask

LISTS = [task.name for task in TASKS.values() if task.form != "statements"]
REACH = 512


class LooksBack:
    """Answers right if the last ``REACH`` tokens tell the answer, and else guesses a digit."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __call__(self, tokens: torch.Tensor, places: slice) -> torch.Tensor:
        logits = torch.zeros(len(tokens), places.stop - places.start, PADDED_VOCABULARY_SIZE)
        for row, sequence in enumerate(tokens):
            seen = text_of(sequence[max(0, places.start + 1 - REACH) : places.start + 1])
            try:
                answer = answer_to(seen)
            except (TypeError, ValueError):
                answer = ""
            for column in range(places.stop - places.start):
                known = answer[column : column + 1]
                guess = known if known.isdigit() else str(self.random.integers(10))
                logits[row, column, ord(guess)] = 1.0
        return logits


@pytest.mark.parametrize("name", TASKS)
def test_model_that_looks_512_tokens_back_scores_chance_beyond(name: str) -> None:
    task, model = TASKS[name], LooksBack()
    far = [measure_cell(model, BYTES, task, 2048, depth, 100) for depth in (0.0, 0.2)]
    digits = np.mean([cell.digit_accuracy for cell in far])
    # Three standard deviations of the share of right digits.
    assert abs(digits - 0.1) < 3 * (0.09 / (200 * task.digits)) ** 0.5
    assert all(cell.low < task.chance + 0.02 for cell in far)
    assert measure_cell(copying, BYTES, task, 2048, 0.0, 20).accuracy == 1.0
    # The same model is right where the answer is near.
    assert measure_cell(model, BYTES, task, REACH, 0.0, 20).accuracy == 1.0


@pytest.mark.parametrize("kind", ["bytes", "merging"])
@pytest.mark.parametrize("name", LISTS)
def test_lists_are_exact_in_tokens(name: str, kind: str, merging) -> None:
    encoder = BYTES if kind == "bytes" else PromptEncoder(merging)
    task = TASKS[name]
    shortest = shortest_prompt(encoder, task)
    for length in (shortest, shortest + 1, shortest + 7, 513, 4096):
        needles = []
        for depth in (0.0, 0.3, 1.0):
            prompt = evaluation_prompt(encoder, task, length, depth, 3)
            assert prompt.tokens.shape == (length,) and prompt.tokens.dtype == np.int32
            assert prompt.tokens[0] == encoder.bos[0] and prompt.needle in prompt.statements
            assert list(prompt.statements) == sorted(set(prompt.statements))
            needles.append(prompt.needle)
        assert needles[0] < needles[1] < needles[2] or name == "common_word"
    with pytest.raises(ValueError, match=f"takes {shortest}; use a length of at least that"):
        evaluation_prompt(encoder, task, shortest - 1, 0.5, 0)


@pytest.mark.parametrize("length", [120, 333, 4096])
def test_lookup_is_an_object_of_as_many_pairs_as_fit(length: int) -> None:
    for trial, depth in enumerate((0.0, 0.25, 0.5, 1.0)):
        prompt = evaluation_prompt(BYTES, TASKS["lookup"], length, depth, trial)
        text = text_of(prompt.tokens)
        found = json.loads(re.search(r"\{.*\}", text)[0])
        names = list(found)
        # A pair is '"ABCD": 7, ', and less than one more would fit.
        assert len(names) == len(prompt.statements) and text.index("{") < len(', "ABCD": 7')
        assert len(names) >= length // 11 - 5
        asked = re.search(r' The value of "(\w+)" is $', text)[1]
        assert names.index(asked) == round(depth * (len(names) - 1))
        assert found[asked] == prompt.answer[0]
        # Positions are those of the tokens, and BOS is no character of the text.
        assert text[prompt.needle - 1 :].startswith(('{"', ', "'))
        assert text[prompt.needle - 1 :][2:10].find(asked) in (0, 1)
        for other in prompt.others:
            name, value = re.fullmatch(r' The value of "(\w+)" is (\d)', text_of(other)).groups()
            assert found[name] == int(value) and name != asked


@pytest.mark.parametrize("length", [180, 1000, 4096])
def test_common_word_comes_in_its_half_alone(length: int) -> None:
    for trial, depth in enumerate((0.0, 0.5, 1.0)):
        prompt = evaluation_prompt(BYTES, TASKS["common_word"], length, depth, trial)
        words = re.findall(r" ([A-Z]{4}\d)", text_of(prompt.tokens))
        (word, count), *others = Counter(words).most_common()
        assert int(word[-1]) == prompt.answer[0] and count == len(prompt.statements)
        assert count == max(6, len(words) // 8) and max(number for _, number in others) == 3
        places = [place for place, each in enumerate(words) if each == word]
        first = round(depth * (len(words) - len(words) // 2))
        assert first <= places[0] and places[-1] < first + len(words) // 2
        assert len({each[:4] for each in words}) == 1 + len(others)


def test_lists_can_be_trained_on_by_name_and_not_by_default() -> None:
    assert set(LISTS) < set(get_args(RetrievalTask))
    assert not set(LISTS) & set(JobConfig().lighthouse.passkey_tasks)
    mix = RetrievalMix(PromptEncoder(ByteTokenizer()), 0.5, 1025, 2, LISTS)
    kinds = Counter()
    for number in range(60):
        tokens, in_loss = mix.sequence(number % 2, number)
        assert tokens.shape == (1025,) and tokens[0] == BOS_ID and tokens[-1] == EOS_ID
        starts = np.flatnonzero(tokens == BOS_ID)
        for document, counted in zip(
            np.split(tokens, starts[1:]), np.split(in_loss, starts[1:]), strict=True
        ):
            text = text_of(document)
            asked = re.findall(r' The value of "(\w+)" is (\d)', text)
            if asked:
                found = json.loads(re.search(r"\{.*\}", text)[0])
                assert len(dict(asked)) == 4
                assert all(found[name] == int(value) for name, value in asked)
            else:
                assert text[-1] == answer_to(text[:-1])
            assert counted.sum() == (len(asked) or 1)
            answers = np.array([ord(value) for _, value in asked] or [ord(text[-1])])
            assert np.array_equal(document[counted], answers)
            kinds[bool(asked)] += 1
    assert min(kinds.values()) > 20
