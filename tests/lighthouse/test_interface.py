"""The public interface: the module, compilation, and messages for bad input."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from attention_cases import Dense
from torch import nn

from lighthouse import (
    LighthouseAttention,
    LighthouseConfig,
    WindowAttention,
    lighthouse_attention,
    select,
    window_attention,
)
from lighthouse.config import SCORERS
from lighthouse.geometry import PyramidGeometry, fitting_length, length_step

CONFIG = LighthouseConfig(levels=3, pooling_factor=2, top_k=8, picks_per_stratum=4)
N = 64


def qkv(heads=4, kv_heads=2, n=N):
    torch.manual_seed(0)
    return [torch.randn(2, n, h, 8).transpose(1, 2) for h in (heads, kv_heads, kv_heads)]


def test_module_switches_between_lighthouse_and_dense() -> None:
    module = LighthouseAttention(CONFIG, Dense())
    q, k, v = qkv()
    assert module.enabled and not list(module.state_dict())
    sparse = module(q, k, v, enable_gqa=True)
    assert torch.equal(sparse, lighthouse_attention(q, k, v, CONFIG))
    assert module.sdpa.keywords == {"is_causal": True, "enable_gqa": True, "scale": None}
    module.enabled = False
    dense = module(q, k, v, enable_gqa=True, scale=0.5)
    expected = nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, scale=0.5
    )
    assert torch.equal(dense, expected)


def test_module_brings_dense_attention_of_its_own() -> None:
    module = LighthouseAttention(CONFIG)
    q, k, v = qkv(heads=4, kv_heads=4)
    assert not list(module.state_dict())
    assert torch.equal(module(q, k, v), lighthouse_attention(q, k, v, CONFIG))
    module.enabled = False
    assert torch.equal(
        module(q, k, v), nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    for option in ("attn_mask", "dropout_p"):
        with pytest.raises(TypeError, match=option):
            module(q, k, v, **{option: None})


def test_module_refuses_what_it_cannot_do() -> None:
    module = LighthouseAttention(CONFIG, Dense())
    with pytest.raises(ValueError, match="is_causal"):
        module(*qkv(), enable_gqa=True, is_causal=False)
    with pytest.raises(ValueError, match="enable_gqa"):
        module(*qkv())


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (dict(levels=1), ValueError, "levels = 1"),
        # The span of such an entry is a number of 12 million bits.
        (dict(levels=10**7), ValueError, "levels = 10000000"),
        (dict(pooling_factor=2**40), ValueError, "would pool more than"),
        (dict(levels="3"), TypeError, "levels.*'3'"),
        (dict(levels=True), TypeError, "levels.*True"),
        (dict(pooling_factor=6), ValueError, "pooling_factor = 6"),
        (dict(pooling_factor=1), ValueError, "pooling_factor = 1"),
        (dict(picks_per_stratum=3), ValueError, "picks_per_stratum = 3"),
        (dict(top_k=100), ValueError, "top_k = 100; round it to 128"),
        (dict(top_k=0), ValueError, "top_k = 0"),
        (dict(top_k=1.5), TypeError, "top_k.*1.5"),
        (dict(scorer="best"), ValueError, "scorer = 'best'"),
        (dict(scorer=1), TypeError, "scorer must be of type str, got 1 of type int"),
        (
            dict(entry_score="last"),
            ValueError,
            "entry_score must be one of max, first, got entry_score = 'last'",
        ),
        (dict(combine="mean"), ValueError, "combine must be one of sum, finest, got .*'mean'"),
        (dict(dilation=0), ValueError, "dilation = 0"),
        (
            dict(window=2**31, combine="finest"),
            ValueError,
            "window must be at most 2,147,483,647, got window = 2147483648; ",
        ),
    ],
)
def test_configuration_rules(values, error, message) -> None:
    with pytest.raises(error, match=message):
        LighthouseConfig(**values)


@pytest.mark.parametrize(
    ("n", "message"),
    [(63, "got 63; the nearest that fits is 64"), (28, "at least top_k = 8 entries, got 7"),
     (0, "nearest that fits is 32")],
)  # fmt: skip
def test_geometry_rules(n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PyramidGeometry(CONFIG, n)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("shortest", [0, 1, 32, 33, 60, 61, 95])
def test_fitting_length_is_the_next_that_fits(scorer: str, shortest: int) -> None:
    config = replace(CONFIG, scorer=scorer, dilation=6)

    def fits(n: int) -> bool:
        try:
            PyramidGeometry(config, n)
        except ValueError:
            return False
        return True

    n = fitting_length(config, shortest)
    assert n == next(length for length in range(shortest, 200) if fits(length))
    assert n % length_step(config) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q[0], k, v), ValueError, r"must be \[B, heads, N, D\]"),
        (lambda q, k, v: (q, k[:, :, :-4], v), ValueError, "same B, N and D"),
        (lambda q, k, v: (q[:, :3], k, v), ValueError, "must divide the query heads"),
        (lambda q, k, v: (q.double(), k, v), TypeError, "one dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), TypeError, "floating point"),
        (lambda q, k, v: (q.to("meta"), k, v), ValueError, "one device"),
        (lambda q, k, v: (q[:, :, 1:], k[:, :, 1:], v[:, :, 1:]), ValueError, "nearest that fits"),
    ],
)
def test_tensor_rules(change, error, message) -> None:
    for function in (lighthouse_attention, select):
        with pytest.raises(error, match=message):
            function(*change(*qkv()), CONFIG)


def test_modules_refuse_unknown_implementations_when_they_are_made() -> None:
    """Where a call would come minutes later, or never, as in the dense stage."""
    with pytest.raises(ValueError, match="impl must be one of triton, torch, got impl = 'flash4'"):
        LighthouseAttention(CONFIG, impl="flash4")
    with pytest.raises(ValueError, match="one of flash4, triton, torch, got impl = 'flash'"):
        WindowAttention(4, impl="flash")


def test_import_needs_no_torchtitan_and_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = sys.modules['torchtitan'] = None; import lighthouse, "
        "lighthouse.reference; assert not [m for m in sys.modules if m.startswith('torchtitan.')]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "backend",
    # The same graphs as inductor's, without the C++ that it compiles when its cache is empty.
    ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_compiles_whole_and_once(backend: str) -> None:
    """fullgraph, forward and backward, no second compilation, the eager result."""
    module = LighthouseAttention(CONFIG, Dense())
    torch._dynamo.reset()
    compilations = []

    def compiler(graph, example_inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    for seed in range(3):
        torch.manual_seed(seed)
        results = []
        leaves = [torch.randn(1, N, h, 8) for h in (4, 2, 2)]
        for function in (module, compiled):
            inputs = [x.clone().requires_grad_() for x in leaves]
            out = function(*(x.transpose(1, 2) for x in inputs), enable_gqa=True)
            out.square().sum().backward()
            results.append([out, *(x.grad for x in inputs)])
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5)
    assert len(compilations) == 1


def test_compiles_whole_again_for_other_shapes() -> None:
    """The numbers of heads and positions are symbols from the second shape on."""
    module = LighthouseAttention(CONFIG, Dense())
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for n, query_heads, heads in ((N, 4, 2), (2 * N, 6, 6), (3 * N, 8, 8), (2 * N, 8, 4)):
        rows = [torch.randn(1, h, n, 8) for h in (query_heads, heads, heads)]
        torch.testing.assert_close(
            compiled(*rows, enable_gqa=True), module(*rows, enable_gqa=True), rtol=1e-4, atol=1e-5
        )


def test_given_selection_is_used_whatever_its_strides() -> None:
    config = LighthouseConfig(3, 2, 8, picks_per_stratum=4)
    leaves = [torch.randn(2, heads, 36, 8) for heads in (4, 2, 2)]
    chosen = select(*leaves, config)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in chosen]
    assert not strided[0].is_contiguous()
    for impl in ("torch", "triton"):
        expected = lighthouse_attention(*leaves, config, selection=chosen, impl=impl)
        out = lighthouse_attention(*leaves, config, selection=strided, impl=impl)
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index, slot: (slot, index),
        lambda index, slot: (index[:1], slot[:1]),
        lambda index, slot: (index.repeat(1, 2, 1), slot.repeat(1, 2, 1)),
        lambda index, slot: (index[..., :-1], slot),
        lambda index, slot: (index.float(), slot.float()),
        lambda index, slot: (index.long(), slot),
        lambda index, slot: (index, slot.to("meta")),
    ],
)
def test_selection_of_other_tensors_is_refused(spoil) -> None:
    config = LighthouseConfig(3, 2, 8, picks_per_stratum=4)
    leaves = [torch.randn(2, heads, 36, 8) for heads in (4, 2, 2)]
    selection = spoil(*select(*leaves, config))
    with pytest.raises((TypeError, ValueError), match=r"selection\.(index|slot) must be"):
        lighthouse_attention(*leaves, config, selection=selection)


def test_dense_attention_of_another_layout_is_refused() -> None:
    config = LighthouseConfig(3, 2, 8, picks_per_stratum=4)
    leaves = [torch.randn(1, 2, 36, 8) for _ in range(3)]
    for sdpa in (
        lambda q, k, v, **_: q.transpose(1, 2),
        lambda q, k, v, **_: q[:, :, :-1],
        lambda q, k, v, **_: q.double(),
    ):
        with pytest.raises(ValueError, match=r"sdpa must return \[B, Hq, S, D\]"):
            lighthouse_attention(*leaves, config, sdpa=sdpa)


def test_second_gradients_are_refused_by_the_kernels() -> None:
    config = LighthouseConfig(3, 2, 8, picks_per_stratum=4)
    q = torch.randn(1, 2, 36, 8, requires_grad=True)
    out = lighthouse_attention(q, q, q, config, impl="triton", sdpa=lambda q, k, v, **_: q)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("settings", [{}, {"combine": "finest", "window": 5}], ids=str)
def test_transforms_of_torch_func_are_refused_by_name(impl: str, settings: dict) -> None:
    config = replace(CONFIG, **settings)
    q, k, v = qkv()
    for function in (
        lambda q: lighthouse_attention(q, k, v, config, impl=impl).sum(),
        lambda q: window_attention(q, k, v, 5).sum(),
    ):
        for transform in (torch.func.grad, torch.func.vmap):
            with pytest.raises(RuntimeError, match="of torch.func, .* by torch.autograd.grad or"):
                transform(function)(q)


def test_copies_of_a_module_with_a_window_attend_as_it_does() -> None:
    """A pipeline copies the model."""
    module = LighthouseAttention(
        LighthouseConfig(2, 2, 4, picks_per_stratum=2, combine="finest", window=3)
    )
    q, k, v = torch.randn(3, 1, 2, 32, 8)
    assert torch.equal(copy.deepcopy(module)(q, k, v), module(q, k, v))
