"""What ``attn_implementation="lighthouse"`` does not compute is refused by a message."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers_models import METHOD, SIZE, N, build, tokens

import lighthouse.transformers as module
from lighthouse.transformers import register, settings_for


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Each test begins with these settings, and leaves none behind."""
    register(METHOD, dense_layers=[1])
    yield
    module._registered = None


def padded(side: str) -> torch.Tensor:
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, slice(0, 9) if side == "left" else slice(-9, None)] = 0
    return mask


PACKED = (torch.arange(N) % 64)[None]
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "left padding": ({"attention_mask": padded("left")}, "takes no attention_mask"),
    "right padding": ({"attention_mask": padded("right")}, "takes no attention_mask"),
    "boolean padding": ({"attention_mask": padded("left").bool()}, "takes no attention_mask"),
    "whole mask": ({"attention_mask": torch.ones(2, 1, N, N).tril()}, "takes no attention_mask"),
    "additive mask": ({"attention_mask": torch.zeros(2, 1, N, N)}, "takes no attention_mask"),
    "longer mask": ({"attention_mask": torch.ones(2, N + 4)}, "attention_mask of 132"),
    "packed": ({"position_ids": PACKED, "use_cache": False}, "position_ids"),
    "packed beside a cache": ({"position_ids": PACKED}, "position_ids"),
    "packed in one row": (
        {"position_ids": torch.stack([PACKED[0], torch.arange(N)])}, "position_ids",
    ),
    "gap in positions": ({"position_ids": torch.arange(N)[None] * 2}, "position_ids"),
    "falling positions": ({"position_ids": torch.arange(N).flip(0)[None]}, "position_ids"),
    "packed, flash": ({"cu_seq_lens_q": torch.tensor([0, 64, 128])}, "cu_seq_lens_q"),
    "weights": ({"output_attentions": True}, "output_attentions"),
    "cap": ({"softcap": 30.0}, "softcap"),
    "sinks": ({"s_aux": torch.zeros(4)}, "s_aux"),
    "bias": ({"position_bias": torch.zeros(1, 4, N, N)}, "position_bias"),
    "head mask": ({"head_mask": torch.ones(4)}, "head_mask"),
    "window of a layer": ({"sliding_window": 32}, "sliding_window"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_it_does_not_compute_are_refused(case: str) -> None:
    options, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        build()(tokens(), **options)


SETTINGS: list[tuple[int, dict[str, Any] | None, str]] = [
    (N - 1, {}, "length|multiple|positions"),
    (8, {}, "length|multiple|positions|top_k"),
    (N, {"levels": 1}, "config.lighthouse: levels"),
    (N, {"pooling_factor": 3}, "config.lighthouse: pooling_factor"),
    (N, {"top_k": 12}, "config.lighthouse: top_k"),
    (N, {"window": 16, "combine": "sum"}, "config.lighthouse: window"),
    (N, {"topk": 16}, "config.lighthouse: .*topk"),
    (N, {"dense_layers": [-1]}, "dense_layers"),
    (N, {"dense_layers": ["0"]}, "dense_layers"),
    (N, {"dense_layers": [True]}, "dense_layers"),
    (N, None, "must be a dict"),
]


@pytest.mark.parametrize(("length", "settings", "message"), SETTINGS)
def test_settings_that_do_not_fit_are_refused(
    length: int, settings: dict[str, Any] | None, message: str
) -> None:
    model = build()
    model.config.lighthouse = settings_for(METHOD) | settings if settings is not None else "fast"
    with pytest.raises((ValueError, TypeError), match=message):
        model(tokens(length=length))


def model_of(**settings: Any) -> Any:
    return build(LlamaConfig(**SIZE | settings))


def drop(_: Path) -> None:
    model_of(attention_dropout=0.1).train()(tokens())


def attend_both_ways(_: Path) -> None:
    config = LlamaConfig(**SIZE)
    config.is_causal = False
    build(config)(tokens())


def generate(_: Path) -> None:
    build().generate(tokens(1, 64), max_new_tokens=2, pad_token_id=0)


def generate_anew(_: Path) -> None:
    build().generate(tokens(1, 64), max_new_tokens=2, pad_token_id=0, use_cache=False)


def go_on_from_a_cache(_: Path) -> None:
    model = build()
    cache = model(tokens(), use_cache=True).past_key_values
    model(tokens(), past_key_values=cache)


def fill_a_static_cache(_: Path) -> None:
    model = build()
    model(tokens(), past_key_values=StaticCache(config=model.config, max_cache_len=2 * N))


def ask_for_weights_by_the_config(_: Path) -> None:
    model = build()
    model.config.output_attentions = True
    model(tokens())


def set_a_layer_that_is_not_there(_: Path) -> None:
    register(METHOD, dense_layers=[0, 3])
    build()(tokens())


def number_no_layers(_: Path) -> None:
    model = build()
    for layer in model.model.layers:
        del layer.self_attn.layer_idx
    model(tokens(), use_cache=False)


def change_positions_in_place(_: Path) -> None:
    model, positions = build(), torch.arange(N)[None]
    model(tokens(), position_ids=positions, use_cache=False)
    positions.copy_(PACKED)
    model(tokens(), position_ids=positions, attention_mask=torch.ones(2, N))


def differentiate_by_torch_func(_: Path) -> None:
    model = build()
    torch.func.grad(lambda x: model(inputs_embeds=x).logits.sum())(torch.randn(1, N, 64))


def mask_in_compiled_code(_: Path) -> None:
    compiled = torch.compile(build(), fullgraph=True, backend="eager")
    compiled(tokens(), attention_mask=torch.ones_like(tokens()), use_cache=False)


def pack_in_compiled_code(_: Path) -> None:
    compiled = torch.compile(build(), fullgraph=True, backend="eager")
    compiled(tokens(), position_ids=PACKED, use_cache=False)


class Rows(Dataset):
    """Rows of tokens of the given lengths."""

    def __init__(self, *lengths: int) -> None:
        self.rows = [tokens(1, length)[0].tolist() for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train_on(rows: Rows, collator: Any, folder: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    Trainer(build(), arguments, train_dataset=rows, data_collator=collator).train()


def pad_in_trainer(folder: Path) -> None:
    def padded_rows(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(rows), N, dtype=torch.long)
        for row, entry in zip(ids, rows, strict=True):
            row[: len(entry["input_ids"])] = torch.tensor(entry["input_ids"])
        return {"input_ids": ids, "labels": ids, "attention_mask": (ids != 0).long()}

    train_on(Rows(N, N - 20), padded_rows, folder)


def pack_in_trainer(folder: Path) -> None:
    train_on(Rows(N // 2, N // 2), DataCollatorWithFlattening(), folder)


def pack_for_flash_in_trainer(folder: Path) -> None:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=False)
    train_on(Rows(N // 2, N // 2), collator, folder)


def register_a_dict(_: Path) -> None:
    register({"levels": 3})  # pyrefly: ignore[bad-argument-type]


def register_a_number(_: Path) -> None:
    register(METHOD, dense_layers=1)  # pyrefly: ignore[bad-argument-type]


def register_text(_: Path) -> None:
    register(METHOD, dense_layers="01")  # pyrefly: ignore[bad-argument-type]


def set_a_config(_: Path) -> None:
    model = build()
    model.config.lighthouse = METHOD
    model(tokens())


def register_nothing(_: Path) -> None:
    module._registered = None
    build()(tokens())


MISUSES: dict[Callable[[Path], None], str] = {
    drop: "attention_dropout = 0.0",
    attend_both_ways: "both directions",
    generate: "set_attn_implementation.'sdpa'.",
    generate_anew: "sequence length must be a multiple",
    go_on_from_a_cache: "does not decode with a cache: 128 queries over 256 keys",
    fill_a_static_cache: "does not decode with a cache",
    ask_for_weights_by_the_config: "output_attentions",
    set_a_layer_that_is_not_there: "which are 0 to 2",
    number_no_layers: "has no layer_idx",
    change_positions_in_place: "position_ids do not run on",
    differentiate_by_torch_func: "torch.func",
    mask_in_compiled_code: "takes no attention_mask",
    pack_in_compiled_code: "start anew within a row",
    pad_in_trainer: "takes no attention_mask",
    pack_in_trainer: "position_ids",
    pack_for_flash_in_trainer: "cu_seq_lens_q",
    register_a_dict: "must be a LighthouseConfig",
    register_a_number: "dense_layers must be layer numbers",
    register_text: "dense_layers must be layer numbers",
    set_a_config: "see settings_for",
    register_nothing: "call lighthouse.transformers.register",
}


@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.__name__)
def test_misuse_is_refused(misuse: Callable[[Path], None], tmp_path: Path) -> None:
    # torch.compile wraps the errors of the code that it traces.
    with pytest.raises((ValueError, TypeError, RuntimeError), match=MISUSES[misuse]):
        misuse(tmp_path)


def test_thirty_misuses_are_tried() -> None:
    assert len(CALLS) + len(SETTINGS) + len(MISUSES) >= 30
