"""The byte-level tokenizer, and the same one as a file for Hugging Face's tools."""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torchtitan.components.tokenizer import BaseTokenizer, build_hf_tokenizer

from ..errors import UserValueError
from ..job_config import JobConfig
from .fingerprint import digest

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
# Rows of the embedding: all ids, padded to a multiple of 64, which suits tensor cores.
PADDED_VOCABULARY_SIZE = 320


class ByteTokenizer(BaseTokenizer):
    """Ids 0 to 255 are the bytes of UTF-8 text; BOS, EOS and PAD follow.

    A text that contains the name of a special token is encoded as plain text.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bos_id, self.eos_id, self.pad_id = BOS_ID, EOS_ID, PAD_ID

    def encode_array(self, text: str, add_bos: bool, add_eos: bool) -> np.ndarray:
        """Ids of ``text``, int32 [tokens]; characters that UTF-8 cannot hold become "?"."""
        text_bytes = np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)
        ids = np.empty(len(text_bytes) + add_bos + add_eos, dtype=np.int32)
        ids[add_bos : add_bos + len(text_bytes)] = text_bytes
        if add_bos:
            ids[0] = BOS_ID
        if add_eos:
            ids[-1] = EOS_ID
        return ids

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return self.encode_array(text, add_bos, add_eos).tolist()

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i < BOS_ID).decode("utf-8", errors="replace")

    def get_vocab_size(self) -> int:
        return PAD_ID + 1


def byte_symbols() -> list[str]:
    """The character that stands for each of the 256 bytes in byte-level BPE vocabularies.

    A printable Latin-1 character stands for its own byte. The characters from U+0100 on stand for
    the other bytes, in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols, next_character = [], 0x100
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(next_character))
            next_character += 1
    return symbols


def save_hugging_face_tokenizer(folder: str | Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` with the ids of ``ByteTokenizer``.

    ``tokenizer_config.json`` tells ``transformers`` that names of special tokens within a text are
    plain text. ``tokenizer.json`` cannot say so: users of ``tokenizers`` alone have to set
    ``tokenizer.encode_special_tokens = True`` after loading.
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_tokenizer(job_config: JobConfig) -> BaseTokenizer:
    """The tokenizer that ``lighthouse.tokenizer`` names.

    Raises:
        ValueError: the name is unknown, or model.hf_assets_path holds no tokenizer.
    """
    kind = job_config.lighthouse.tokenizer
    if kind == "byte":
        return ByteTokenizer()
    if kind != "hf":
        raise UserValueError(f"lighthouse.tokenizer = {kind!r} is not known; use 'byte' or 'hf'")
    folder = Path(job_config.model.hf_assets_path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise UserValueError(
            f"model.hf_assets_path = '{folder}' holds no tokenizer.json; "
            "pass --model.hf_assets_path FOLDER with the tokenizer's files"
        )
    return build_hf_tokenizer(job_config)


def tokenizer_fingerprint(tokenizer: BaseTokenizer) -> str:
    """A hash of all that a Hugging Face tokenizer does with text."""
    # pyrefly: ignore[missing-attribute]  torchtitan's class holds that of the tokenizers library.
    return digest(tokenizer.tokenizer.to_str())[:16]
