"""Families of transformers under Lighthouse attention: each trains, or is refused by a message."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers_models import METHOD, SIZE, VOCABULARY, WITH_WINDOW, N, build, tokens

import lighthouse.transformers as module
from lighthouse.transformers import register

# Names of sizes and dropouts in other families.
ALSO: dict[str, Any] = dict(
    n_embd=64, d_model=64, n_layer=2, n_layers=2, num_layers=2, n_head=4, n_heads=4,
    n_positions=256, num_hidden_layers=2, ffn_dim=96, rotary_dim=8, word_embed_proj_dim=64,
    attention_dropout=0.0, attn_pdrop=0.0, attention_probs_dropout_prob=0.0, num_experts=4,
    num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=96,
)  # fmt: skip
BY_NORM = {
    "Llama": {}, "Mistral": {"sliding_window": None}, "Mixtral": {}, "Qwen2": {}, "SmolLM3": {},
    "Gemma": {}, "Phi": {}, "Phi3": {"sliding_window": None}, "Olmo": {}, "Olmo2": {},
    "Granite": {}, "Cohere": {}, "Glm": {}, "Glm4": {}, "StableLm": {},
    "Starcoder2": {"sliding_window": None}, "Nemotron": {}, "Helium": {}, "Arcee": {},
    "SeedOss": {}, "Ernie4_5": {}, "BitNet": {}, "GPTNeoX": {}, "GPT2": {}, "OPT": {},
    "BioGpt": {}, "Moshi": {},
}  # fmt: skip
# They normalise queries and keys in every head.
BY_OUTPUT = {"Qwen3": {}, "Qwen3Moe": {}, "HunYuanDenseV1": {}, "NanoChat": {}, "Apertus": {}}
EXPERTS = {"Mixtral", "Qwen3Moe"}
OWN = "uses its mask in code of its own"
ANOTHER_MASK = "asks for another mask"
REFUSED = {
    "Mistral": ({"sliding_window": 32}, ANOTHER_MASK),
    "Gemma2": ({}, ANOTHER_MASK),
    "Gemma3Text": ({}, ANOTHER_MASK),
    "Llama4Text": ({}, ANOTHER_MASK),
    "Cohere2": ({}, ANOTHER_MASK),
    "Olmo3": ({}, ANOTHER_MASK),
    "GptOss": ({}, ANOTHER_MASK),
    "Bert": ({}, ANOTHER_MASK),
    "DeepseekV3": ({"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
                    "v_head_dim": 16}, "values as wide as keys"),
    "Bloom": ({}, OWN),
    "XGLM": ({}, OWN),
    "Mpt": ({}, OWN),
    "GPTNeoXJapanese": ({}, OWN),
}  # fmt: skip
CONFIGS = {config.__name__.removesuffix("Config"): config for config in MODEL_FOR_CAUSAL_LM_MAPPING}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Each test begins with these settings, and leaves none behind."""
    register(WITH_WINDOW)
    yield
    module._registered = None


def small(family: str, **settings: Any) -> Any:
    """The configuration of a small model of a family."""
    if family not in CONFIGS:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = CONFIGS[family]
    known = config().to_dict()
    return config(**{k: v for k, v in (SIZE | ALSO).items() if k in known} | settings)


@pytest.mark.parametrize("family", [*BY_NORM, *BY_OUTPUT])
def test_trains_and_stays_causal(family: str) -> None:
    if family in BY_OUTPUT:
        register(replace(WITH_WINDOW, scorer="gla"))
    config = small(family, **(BY_NORM | BY_OUTPUT)[family])
    model = build(config).train()
    rows = tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with patch.object(module, "lighthouse_attention", wraps=module.lighthouse_attention) as call:
        loss = model(rows, labels=rows, use_cache=False).loss
    assert call.call_count == config.num_hidden_layers
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert model(rows, labels=rows).loss < loss
        # Entries are picked in two strata, each by its own scores.
        changed, half = rows.clone(), N // 2
        changed[:, half:] = (changed[:, half:] + 1) % VOCABULARY
        before, after = (model(x).logits for x in (rows, changed))
        # Experts compute the tokens of a batch together, so that rounding may differ.
        bound = 1e-5 if family in EXPERTS else 0
        assert (before - after)[:, :half].abs().max() <= bound
        assert not torch.equal(before[:, half:], after[:, half:])
        model.set_attn_implementation("sdpa")
        assert model(rows).logits.isfinite().all()


@pytest.mark.parametrize("family", REFUSED)
def test_is_refused(family: str) -> None:
    settings, message = REFUSED[family]
    model = build(small(family, **settings))
    with pytest.raises((ValueError, TypeError, AttributeError), match=message) as error:
        model(tokens(), use_cache=False)
    assert "model.set_attn_implementation('sdpa') computes it" in str(error.value)


@pytest.mark.parametrize("family", ["OpenAIGPT", "XLM", "CpmAnt"])
def test_models_that_never_ask_stay_as_they_are(family: str) -> None:
    config, rows = small(family), tokens() % 256
    found = []
    for attention in ("lighthouse", "eager"):
        with patch.object(module, "attend", side_effect=AssertionError), torch.no_grad():
            found.append(build(config, attention)(rows).logits)
    assert torch.equal(*found)


def test_compiled_blocks_are_refused() -> None:
    """Llama 4 hands its layers no word of them, and the compiler knows no mask by name."""
    register(replace(WITH_WINDOW, scorer="gla"))
    model = build(small("Llama4Text", attention_chunk_size=32))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=ANOTHER_MASK):
        compiled(tokens(), use_cache=False)


@pytest.mark.parametrize("family", BY_OUTPUT)
def test_scores_by_norms_that_are_made_equal_are_refused(family: str) -> None:
    model = build(small(family, **BY_OUTPUT[family]))
    with pytest.raises(ValueError, match="scorer = 'norm'.*scorer = 'gla' or 'dilated'"):
        model(tokens())
    norms = []

    def spy(q: torch.Tensor, k: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        norms.append(k.norm(dim=-1))
        return lighthouse_attention(q, k, *arguments, **options)

    lighthouse_attention = module.lighthouse_attention
    register(replace(METHOD, scorer="dilated"))
    with patch.object(module, "lighthouse_attention", spy), torch.no_grad():
        model(tokens())
    # Apertus adds an eps that counts beside activations as small as those of random weights.
    spread = norms[0].std(dim=-1) / norms[0].mean(dim=-1)
    assert spread.max() < (0.2 if family == "Apertus" else 1e-3)


def test_every_keyword_of_an_attention_call_is_known() -> None:
    """A keyword that changes the result must not be dropped unseen in a newer transformers."""
    known = {
        "attention_mask", "dropout", "is_causal", "key", "position_ids", "query", "scaling",
        "value", "output_attentions",
        # They say how to compute the same.
        "deterministic", "max_length_k", "max_length_q",
    }  # fmt: skip
    found: dict[str, str] = {}
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for call in re.finditer(
            r"= attention_interface\(\n((?:\s{8,}.*\n)*?)\s*\)\n", file.read_text()
        ):
            for keyword in re.findall(r"^\s+(\w+)=[^=]", call[1], re.MULTILINE):
                found[keyword] = file.parent.name
    assert {"dropout", "scaling", "sliding_window"} <= set(found)
    unknown = {k: model for k, model in found.items() if k not in known | set(module.REFUSED)}
    assert not unknown, f"refuse these in lighthouse/transformers.py, or name them here: {unknown}"
