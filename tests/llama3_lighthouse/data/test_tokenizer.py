"""The byte tokenizer and its files for Hugging Face give the same ids."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from torchtitan.models.llama3_lighthouse.data.tokenizer import (
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    PADDED_VOCABULARY_SIZE,
    ByteTokenizer,
    build_tokenizer,
    save_hugging_face_tokenizer,
)
from torchtitan.models.llama3_lighthouse.job_config import BYTE_TOKENIZER_FOLDER

OURS = ByteTokenizer()
RAW = Tokenizer.from_file(f"{BYTE_TOKENIZER_FOLDER}/tokenizer.json")
RAW.encode_special_tokens = True
TRANSFORMERS = AutoTokenizer.from_pretrained(BYTE_TOKENIZER_FOLDER)

# Any text, names of special tokens, and pieces that other tokenizers split or merge.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from([BOS, EOS, "<|pad|>", " ", "  ", "\r\n", "\x00", "é", "don't", "😀"]))
    .map("".join),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_ids_are_bytes_in_every_tool(text: str) -> None:
    expected = list(text.encode())
    assert OURS.encode(text) == expected
    assert RAW.encode(text, add_special_tokens=False).ids == expected
    assert TRANSFORMERS.encode(text, add_special_tokens=False) == expected
    assert OURS.decode([BOS_ID, *expected, EOS_ID]) == text
    assert TRANSFORMERS.decode([BOS_ID, *expected, EOS_ID], skip_special_tokens=True) == text


def test_special_tokens() -> None:
    assert OURS.encode("a", add_bos=True, add_eos=True) == [BOS_ID, 97, EOS_ID]
    assert TRANSFORMERS.encode("a") == RAW.encode("a").ids == [BOS_ID, 97]
    assert (TRANSFORMERS.bos_token_id, TRANSFORMERS.eos_token_id) == (BOS_ID, EOS_ID)
    assert OURS.get_vocab_size() == len(TRANSFORMERS) <= PADDED_VOCABULARY_SIZE
    assert PADDED_VOCABULARY_SIZE == 320


def test_all_bytes_decode() -> None:
    assert OURS.decode(list(range(256))) == bytes(range(256)).decode(errors="replace")
    assert OURS.encode("\ud800") == [ord("?")]


def test_shipped_files_are_what_the_code_writes(tmp_path: Path) -> None:
    save_hugging_face_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        with open(f"{BYTE_TOKENIZER_FOLDER}/{file.name}") as shipped:
            assert shipped.read() == file.read_text()


def config(kind: str, folder: Path | str) -> SimpleNamespace:
    return SimpleNamespace(
        lighthouse=SimpleNamespace(tokenizer=kind),
        model=SimpleNamespace(hf_assets_path=str(folder)),
    )


def test_build(tmp_path: Path) -> None:
    assert isinstance(build_tokenizer(config("byte", tmp_path)), ByteTokenizer)
    hugging_face = build_tokenizer(config("hf", BYTE_TOKENIZER_FOLDER))
    assert hugging_face.encode("ab", add_bos=True, add_eos=True) == [BOS_ID, 97, 98, EOS_ID]
    with pytest.raises(ValueError, match=r"model\.hf_assets_path = .*pass --model\.hf_assets_path"):
        build_tokenizer(config("hf", tmp_path))
    with pytest.raises(ValueError, match="use 'byte' or 'hf'"):
        build_tokenizer(config("bpe", tmp_path))
