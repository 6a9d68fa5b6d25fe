"""The model is a Llama in every respect but what runs inside attention."""

from dataclasses import replace

import pytest
import torch
from small_model import METHOD, SIZE, N, build
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from lighthouse import LighthouseAttention, scoring
from lighthouse.config import SCORERS
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import (
    LighthouseModelArgs,
    LighthouseTransformer,
)


def test_state_dict_is_upstreams() -> None:
    ours, upstream = build(), build(Transformer, TransformerModelArgs(**SIZE))
    assert list(ours.state_dict()) == list(upstream.state_dict())
    for name, value in upstream.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("flavor", flavors)
def test_flavors_have_upstreams_keys(flavor: str) -> None:
    args = flavors[flavor]
    with torch.device("meta"):
        args = LighthouseModelArgs(**{**vars(args), "lighthouse": METHOD, "max_seq_len": N})
        ours, upstream = LighthouseTransformer(args), Transformer(args)
    assert list(ours.state_dict()) == list(upstream.state_dict())


def test_parameter_counts() -> None:
    counts = {}
    for flavor in ("270M", "530M"):
        with torch.device("meta"):
            model = Transformer(flavors[flavor])
        counts[flavor] = sum(p.numel() for p in model.parameters())
        assert model.layers["0"].feed_forward.w1.weight.shape[0] == 1536
    assert counts == {"270M": 268_104_704, "530M": 530_117_632}


def test_dense_attention_is_upstream_bit_for_bit() -> None:
    ours, upstream = build(), build(Transformer, TransformerModelArgs(**SIZE))
    ours.use_attention("dense")
    tokens = torch.randint(0, 320, (2, N))
    for model in (ours, upstream):
        model(tokens).logsumexp(-1).sum().backward()
    assert torch.equal(ours(tokens), upstream(tokens))
    for mine, theirs in zip(ours.parameters(), upstream.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_attention_switches_in_the_right_layers() -> None:
    model = build()
    wrapped = [isinstance(b.attention.inner_attention, LighthouseAttention)
               for b in model.layers.values()]  # fmt: skip
    assert wrapped == [False, True, True, False]
    tokens = torch.randint(0, 320, (1, N))
    lighthouse = model(tokens)
    model.use_attention("dense")
    dense = model(tokens)
    assert not torch.allclose(lighthouse, dense)
    model.use_attention("lighthouse")
    assert torch.equal(model(tokens), lighthouse)


@pytest.mark.parametrize("scorer", [scorer for scorer in SCORERS if scorer != "norm"])
def test_neither_state_dict_nor_dense_attention_notice_the_scorer(scorer: str) -> None:
    method = replace(METHOD, scorer=scorer)
    norm, other = build(), build(args=LighthouseModelArgs(**SIZE, lighthouse=method))
    tokens = torch.randint(0, 320, (1, N), generator=torch.Generator().manual_seed(1))
    # The scorers select differently, so that what is equal below is not equal for want of one.
    assert not torch.equal(norm(tokens), other(tokens))
    assert list(norm.state_dict()) == list(other.state_dict())
    for name, value in norm.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    for model in (norm, other):
        model.use_attention("dense")
        model(tokens).logsumexp(-1).sum().backward()
    assert torch.equal(norm(tokens), other(tokens))
    for mine, theirs in zip(norm.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_flops_of_the_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of "dilated" as torch counts them, without the causal mask.

    The mask leaves (N / d + 1) / (2 N / d) of them.
    """
    config = replace(METHOD, scorer="dilated", dilation=4)
    norm, dilated, gla, random = (
        LighthouseModelArgs(**SIZE, lighthouse=replace(config, scorer=scorer), dense_layers=[0])
        for scorer in ("norm", "dilated", "gla", "random")
    )
    base = norm.flops_per_token(0, N, "lighthouse")
    monkeypatch.setattr(scoring, "SDPA_BACKENDS", [SDPBackend.MATH])
    rows = [torch.randn(1, heads, N, 16) for heads in (4, 2, 2)]
    with FlopCounterMode(display=False) as counter:
        scoring.position_scores(*rows, config)
    steps = N // config.dilation
    unmasked = counter.get_total_flops() / N
    assert unmasked > 0
    assert dilated.flops_per_token(0, N, "lighthouse") - base == pytest.approx(
        3 * unmasked * (steps + 1) / (2 * steps)
    )
    # Two passes. Each step adds an outer product to a D x D state and multiplies a row with it.
    assert gla.flops_per_token(0, N, "lighthouse") - base == 3 * 2 * 4 * (2 + 2) * 16 * 16
    # Hashes take integer operations alone.
    assert random.flops_per_token(0, N, "lighthouse") == base
    for args in (dilated, gla, random):
        assert args.flops_per_token(0, N, "dense") == norm.flops_per_token(0, N, "dense")


def test_residual_stream_has_the_precision_of_autocast() -> None:
    model = build()
    seen = []
    for block in model.layers.values():
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    tokens = torch.randint(0, 320, (1, N))
    model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    layers = len(model.layers)
    assert seen == [torch.float32] * layers + [torch.bfloat16] * layers


@pytest.mark.parametrize("attention", ["lighthouse", "dense"])
def test_flops_count_what_runs(attention: str) -> None:
    """Compare with torch's own counter, which counts attention without its causal mask."""
    model = build()
    model.use_attention(attention)
    for module in model.modules():
        if isinstance(module, ScaledDotProductAttentionWrapper):
            # This backend runs batched products, which nothing else in the model does.
            module.sdpa_backends = [SDPBackend.MATH]
    args = model.model_args
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 320, (1, N)))
    counted = counter.get_flop_counts()["Global"]
    batched = sum(n for op, n in counted.items() if "bmm" in str(op))
    products = sum(counted.values()) - batched
    gathered = N // 4 + 2 * 2 * 16
    lengths = [N] * 4 if attention == "dense" else [N, gathered, gathered, N]
    assert batched == sum(4 * args.dim * length**2 for length in lengths)
    causal = sum(4 * args.dim * length * (length + 1) / 2 for length in lengths)

    parameters, flops = args.get_nparams_and_flops(model, N, attention)
    assert parameters == sum(p.numel() for p in model.parameters())
    norms = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 1)
    assert flops == pytest.approx(3 * (products + causal) / N + 6 * norms)
