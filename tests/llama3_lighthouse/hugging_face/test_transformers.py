"""``attn_implementation="lighthouse"`` in models of transformers."""

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers import LlamaConfig
from transformers_models import METHOD, VOCABULARY, WITH_WINDOW, N, build, tokens

import lighthouse.transformers as module
from lighthouse import LighthouseConfig
from lighthouse.transformers import RECOMMENDED, register, settings_for
from torchtitan.models.llama3_lighthouse.hugging_face.format import adapter, architecture
from torchtitan.models.llama3_lighthouse.model.model import (
    LighthouseModelArgs,
    LighthouseTransformer,
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Each test begins with these settings, and leaves none behind."""
    register(METHOD, dense_layers=[1])
    yield
    module._registered = None


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


def test_full_mask_is_no_mask() -> None:
    model, rows = build(), tokens()
    masked = model(rows, attention_mask=torch.ones_like(rows)).logits
    assert torch.equal(masked, model(rows).logits)
