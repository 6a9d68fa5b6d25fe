"""A trained run and a tokenizer for the tests of evaluations."""

import json
from pathlib import Path

import numpy as np
import pytest
from launch import SMALL, VALIDATED, Run
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from torchtitan.models.llama3_lighthouse.data.tokenizer import build_tokenizer
from torchtitan.models.llama3_lighthouse.job_config import JobConfig


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two Lighthouse steps, stopped there, and a dense one; the last two are saved."""
    folder = tmp_path_factory.mktemp("run")
    settings = {**SMALL, **VALIDATED, "validation.seq_len": 512}
    Run(folder, {**settings, "training.steps": 2}).succeed()
    Run(folder, settings).succeed()
    return folder / "dump"


@pytest.fixture(scope="session")
def merging(tmp_path_factory):
    """A byte-pair tokenizer whose tokens hold several characters, as models of words have."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    random = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefABCDEF0123456789 The pass key is = . ; of", np.uint8)
    texts = [random.choice(letters, 400).tobytes().decode() for _ in range(60)]
    trainer = BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*texts, "The pass key is " * 50], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    job = JobConfig()
    job.lighthouse.tokenizer, job.model.hf_assets_path = "hf", str(folder)
    return build_tokenizer(job)
