"""``attn_implementation="lighthouse"`` in models of transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import lighthouse.transformers as module
from lighthouse import LighthouseConfig
from lighthouse.transformers import RECOMMENDED, register, settings_for
from torchtitan.models.llama3_lighthouse.hugging_face.format import adapter, architecture
from torchtitan.models.llama3_lighthouse.model.model import (
    LighthouseModelArgs,
    LighthouseTransformer,
)

N, VOCABULARY = 128, 320
METHOD = LighthouseConfig(
    pooling_factor=2, top_k=16, picks_per_stratum=8, entry_score="first", combine="finest"
)
WITH_WINDOW = LighthouseConfig(
    pooling_factor=2,
    top_k=16,
    picks_per_stratum=8,
    entry_score="first",
    combine="finest",
    window=16,
)
SIZE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2 * N,
)  # fmt: skip


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Each test begins with these settings, and leaves none behind."""
    register(METHOD, dense_layers=[1])
    yield
    module._registered = None


def build(config: Any = None, **options: Any) -> PreTrainedModel:
    """A causal language model with random weights, under Lighthouse attention."""
    config = config or LlamaConfig(**SIZE)
    config._attn_implementation = "lighthouse"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    return model.eval()


def tokens(rows: int = 2, length: int = N) -> torch.Tensor:
    """Rows in which no token comes twice: the first layer would score both the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack(
        [torch.randperm(VOCABULARY, generator=generator)[:length] for _ in range(rows)]
    )


@pytest.mark.parametrize("method", [METHOD, WITH_WINDOW])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_equal_those_of_our_model(method: LighthouseConfig, kv_heads: int) -> None:
    args = LighthouseModelArgs(
        dim=64, n_layers=3, n_heads=4, n_kv_heads=kv_heads, vocab_size=VOCABULARY,
        max_seq_len=N, multiple_of=32, lighthouse=method, dense_layers=[1],
    )  # fmt: skip
    torch.manual_seed(0)
    ours = LighthouseTransformer(args)
    with torch.no_grad():
        ours.init_weights()
        for name, parameter in ours.named_parameters():
            # Attention far from uniform.
            parameter.mul_(5 if "wq" in name or "wk" in name else 1)
    theirs = build(LlamaConfig(**architecture(args), max_position_embeddings=N))
    theirs.load_state_dict(adapter(args).to_hf(ours.state_dict()), strict=True)
    register(method, dense_layers=[1])
    rows = tokens()
    with torch.no_grad():
        torch.testing.assert_close(theirs(rows).logits, ours(rows), rtol=0, atol=1e-5)
        theirs.set_attn_implementation("sdpa")
        dense = theirs(rows).logits
        assert (dense - ours(rows)).abs().max() > 1e-3
        ours.use_attention("dense")
        torch.testing.assert_close(dense, ours(rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [MistralConfig, Qwen2Config, Qwen3Config, GemmaConfig])
def test_other_families_train_and_stay_causal(config: type) -> None:
    settings = SIZE | ({"sliding_window": None} if config is MistralConfig else {})
    register(WITH_WINDOW)
    model = build(config(**settings)).train()
    rows = tokens()
    model(rows, labels=rows).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # Entries are picked in two strata, each by its own scores.
    changed, half = rows.clone(), N // 2
    changed[:, half:] = (changed[:, half:] + 1) % VOCABULARY
    before, after = (model(x).logits for x in (rows, changed))
    assert torch.equal(before[:, :half], after[:, :half])
    assert not torch.equal(before[:, half:], after[:, half:])


def test_key_value_heads_are_not_repeated() -> None:
    with patch.object(module, "lighthouse_attention", wraps=module.lighthouse_attention) as call:
        build()(tokens())
    assert [each.args[1].shape[1] for each in call.call_args_list] == [2, 2]


def test_own_settings_travel_with_the_model(tmp_path: Path) -> None:
    model, rows = build(), tokens()
    registered = model(rows).logits
    model.config.lighthouse = settings_for(WITH_WINDOW, dense_layers=[0, 2])
    own = model(rows).logits
    assert not torch.equal(own, registered)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="lighthouse"
    )
    assert torch.equal(again(rows).logits, own)
    assert again.config.lighthouse == settings_for(WITH_WINDOW, [2, 0])


def test_recommended_settings_are_the_default() -> None:
    register()
    assert module._registered is not None and module._registered.config == RECOMMENDED
    assert (RECOMMENDED.entry_score, RECOMMENDED.combine, RECOMMENDED.window) == (
        "first", "finest", 256,
    )  # fmt: skip


def test_gradient_checkpointing_repeats_the_selection() -> None:
    gradients, model = [], build().train()
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_model_compiles_into_one_graph() -> None:
    model = build(LlamaConfig(**SIZE | {"num_hidden_layers": 1})).train()
    register(WITH_WINDOW)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    rows = tokens()
    loss = compiled(rows, labels=rows, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, model(rows, labels=rows).loss)
    with pytest.raises(RuntimeError, match="start anew within a row"):
        compiled(rows, use_cache=False, position_ids=torch.arange(N)[None] % 64)
    with pytest.raises(Exception, match="takes no attention_mask"):
        compiled(rows, use_cache=False, attention_mask=torch.ones_like(rows))


def test_full_mask_is_no_mask() -> None:
    model, rows = build(), tokens()
    masked = model(rows, attention_mask=torch.ones_like(rows)).logits
    assert torch.equal(masked, model(rows).logits)


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


@pytest.mark.parametrize(
    ("length", "settings", "message"),
    [
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
    ],
)
def test_settings_that_do_not_fit_are_refused(
    length: int, settings: dict[str, Any] | None, message: str
) -> None:
    model = build()
    model.config.lighthouse = settings_for(METHOD) | settings if settings is not None else "fast"
    with pytest.raises((ValueError, TypeError), match=message):
        model(tokens(length=length))


def test_models_that_it_does_not_compute_are_refused() -> None:
    windowed = build(MistralConfig(**SIZE, sliding_window=32))
    with pytest.raises(ValueError, match="sliding window"):
        windowed(tokens())
    both_ways = LlamaConfig(**SIZE)
    both_ways.is_causal = False
    with pytest.raises(ValueError, match="both directions"):
        build(both_ways)(tokens())
    dropping = build(LlamaConfig(**SIZE, attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match="attention_dropout = 0.0"):
        dropping(tokens())
    with pytest.raises(ValueError, match='set_attn_implementation."sdpa".'):
        build().generate(tokens(1, 64), max_new_tokens=2, pad_token_id=0)
    with pytest.raises(TypeError, match="LighthouseConfig"):
        register({"levels": 3})
    module._registered = None
    with pytest.raises(ValueError, match="register"):
        build()(tokens())
