"""Passages that return in training text: exact, at all distances, and the same after restarts."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from text_data import config, global_batches, loader, write_jsonl

from torchtitan.models.llama3_lighthouse.data.mixes import Mixes, mixes_of
from torchtitan.models.llama3_lighthouse.data.repeat_mix import RepeatMix
from torchtitan.models.llama3_lighthouse.data.staged import build_staged_dataloader
from torchtitan.models.llama3_lighthouse.data.tokenizer import ByteTokenizer
from torchtitan.models.llama3_lighthouse.job_config import JobConfig

SEQ_LEN = 512


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text without spaces, in which no 16 bytes come twice."""
    texts = ["".join(f"{document:03d}.{line:05d},{line * 7919 % 99991:05d}" for line in range(400))
             for document in range(48)]  # fmt: skip
    return write_jsonl(tmp_path / "text", {"train.jsonl": texts, "validation.jsonl": ["held out"]})


def mixed(folder: Path, rate: float, batch: int = 4, **options) -> JobConfig:
    job = config(path=folder, seq_len=SEQ_LEN, batch_size=1, **options)
    job.training.global_batch_size = batch
    job.lighthouse.repeat_mix = rate
    return job


def sequences(job: JobConfig, count: int) -> list[torch.Tensor]:
    """The first sequences, labels included, int64 [seq_len + 1] each."""
    batches = islice(loader(job), count)
    return [torch.cat([inputs["input"][0], labels[0, -1:]]) for inputs, labels in batches]


@pytest.mark.parametrize("share", [0.125, 0.04, 0.5])
@pytest.mark.parametrize("length", [257, 1000, 4097, 32769, 98305])
def test_passages_return_exactly_and_apart(length: int, share: float) -> None:
    mix = RepeatMix(1.0, length, share=share)
    random = np.random.default_rng(0)
    shares = []
    for number in range(40):
        tokens = random.integers(0, 2**31, size=length, dtype=np.int32)
        found = mix.apply(tokens, 3, number)
        covered = np.zeros(length, dtype=int)
        for source, target, count in mix.returns(3, number):
            assert 0 <= source and source + count <= target and target + count <= length
            assert min(64, length // 32) <= count <= min(512, length // 8)
            assert np.array_equal(found[source : source + count], found[target : target + count])
            covered[target : target + count] += 1
        assert covered.max() == 1
        assert np.array_equal(found[covered == 0], tokens[covered == 0])
        shares.append(covered.mean())
    assert set(shares) == {int(length * share) / length}
    assert share < 0.1 or len({count for n in range(40) for _, _, count in mix.returns(3, n)}) > 5


def test_a_share_without_a_passage_is_refused() -> None:
    with pytest.raises(ValueError, match=r"repeat_share = 0.001 is 4 of 4097 tokens, .* least 64"):
        RepeatMix(1.0, 4097, share=0.001)


def test_doublings_of_the_distance_are_equally_likely() -> None:
    mix = RepeatMix(1.0, 32769)
    # Where the room before a return is known, so are the doublings that fit.
    counts, expected = Counter(), Counter()
    for number in range(400):
        for source, target, count in mix.returns(0, number):
            doublings = (target // count).bit_length()
            counts[((target - source) // count).bit_length() - 1] += 1
            expected.update({each: 1 / doublings for each in range(doublings)})
    kinds = sorted(expected)
    found, wanted = ([each[kind] for kind in kinds] for each in (counts, expected))
    assert len(kinds) > 6 and stats.chisquare(found, wanted).pvalue > 1e-3
    far = sum(t - s > 8192 for number in range(400) for s, t, _ in mix.returns(0, number))
    assert far / sum(counts.values()) > 0.1


@pytest.mark.parametrize("streams", [1, 2, 16])
@pytest.mark.parametrize(("rate", "passkeys"), [(0.25, 0.0), (0.5, 0.5), (0.3, 0.1), (1.0, 0.5)])
def test_shares_hold_beside_retrieval_documents(streams, rate: float, passkeys: float) -> None:
    job = JobConfig()
    job.training.seq_len = SEQ_LEN
    job.lighthouse.repeat_mix, job.lighthouse.passkey_mix = rate, passkeys
    job.lighthouse.passkey_tasks = ["passkey"]
    mixes = mixes_of(job, ByteTokenizer(), streams)
    assert isinstance(mixes, Mixes)
    blank = np.arange(SEQ_LEN + 1)
    kinds = np.array(
        [
            2 if mixes.documents(stream, number) else mixes.text(blank, stream, number) is not blank
            for number in range(200)
            for stream in range(streams)
        ]
    ).reshape(200, streams)
    of_text = (kinds != 2).sum(0)
    assert np.all(np.abs((kinds == 2).sum(0) - 200 * passkeys) <= 1)
    assert np.all(np.abs((kinds == 1).sum(0) - rate * of_text) <= 1)
    if streams == 16 and rate < 1:
        # Streams do not take turns together.
        share = rate * (1 - passkeys)
        assert abs((kinds == 1).sum(1) / streams - share).max() < 0.35


def test_text_goes_on_as_without_the_mix(folder: Path) -> None:
    plain, some = (sequences(mixed(folder, rate), 80) for rate in (0.0, 0.5))
    same = np.array([torch.equal(one, other) for one, other in zip(plain, some, strict=True)])
    assert abs(same.mean() - 0.5) < 0.06
    for one, other in zip(plain, some, strict=True):
        # The rest is where it was, and what is changed stood earlier in the same sequence.
        changed = (one != other).float().mean()
        assert changed <= 0.125
    job = mixed(folder, 0.5)
    job.lighthouse.shuffle_seed = 3
    others = sequences(job, 80)
    again = [torch.equal(one, other) for one, other in zip(some, others, strict=True)]
    # One file has one order; the passages are other ones.
    assert 0.4 < np.mean(again) < 0.6


@pytest.mark.parametrize("passkeys", [0.0, 0.5])
def test_restarts_and_other_meshes_give_the_same_batches(folder: Path, passkeys: float) -> None:
    job = mixed(folder, 0.5, workers=1)
    job.lighthouse.passkey_mix, job.lighthouse.passkey_tasks = passkeys, ["passkey"]
    whole, _ = global_batches(job, 1, 9, None)
    for ranks in ((1, 1), (2, 1), (1, 4)):
        first, state = global_batches(job, ranks[0], 4, None)
        second, _ = global_batches(job, ranks[1], 5, state)
        assert [*first, *second] == whole


def test_short_stages_have_near_returns_and_resume(folder: Path) -> None:
    job = mixed(folder, 1.0, batch=1)
    job.training.steps = 6
    job.lighthouse.schedule = ["dense until=3 seq_len=256", "dense"]
    job.lighthouse.data_streams = 1

    def read(state, count: int):
        found = build_staged_dataloader(1, 0, ByteTokenizer(), job)
        if state is not None:
            found.load_state_dict(state)
        return [batch["input"] for batch, _ in islice(found, count)], found.state_dict()

    whole, _ = read(None, 3)
    assert all(batch.shape == (2, 256) for batch in whole)
    part, state = read(None, 2)
    assert torch.equal(read(state, 1)[0][0], whole[2])
    text = bytes(whole[1][0].tolist())
    # Short passages of the text, which has none that comes twice, come twice now.
    assert any(text.count(text[start : start + 16]) > 1 for start in range(240))


def test_too_short_a_stage_is_named(folder: Path) -> None:
    job = mixed(folder, 0.5, batch=1)
    job.training.steps = 6
    job.lighthouse.schedule = ["dense until=3 seq_len=128", "dense"]
    message = (
        r"stage 'dense until=3 seq_len=128': lighthouse.repeat_mix = 0.5 needs .* 256, got 128"
    )
    with pytest.raises(ValueError, match=message):
        build_staged_dataloader(1, 0, ByteTokenizer(), job)
