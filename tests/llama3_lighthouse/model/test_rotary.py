"""Rotary embedding: equal to upstream's to the last bit, and compiled into one kernel."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch._inductor import metrics
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.models.llama3 import Transformer
from torchtitan.models.llama3.model.model import apply_rotary_emb, precompute_freqs_cis

from lighthouse import LighthouseConfig
from torchtitan.models.llama3_lighthouse.model.model import (
    LighthouseModelArgs,
    LighthouseTransformer,
)
from torchtitan.models.llama3_lighthouse.model.rotary import (
    rotate,
    rotate_complex,
    rotate_real,
    table_of,
    turns_at,
)

B, N, HEADS, KV_HEADS, D = 2, 96, 4, 2, 32
LONGEST = 200
FREQUENCIES = precompute_freqs_cis(D, LONGEST, theta=500000.0)
TABLE = table_of(FREQUENCIES)


def queries_and_keys(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(B, N, heads, D, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS)
    )


def positions_like(kind: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    shuffled = torch.randperm(LONGEST, generator=torch.Generator().manual_seed(1))[:N]
    if kind == "one":
        return shuffled[None]
    return torch.stack((shuffled, shuffled.flip(0)))


@pytest.mark.parametrize("function", [rotate_real, rotate_complex])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "one", "each"])
def test_equals_upstream_to_the_last_bit(function: Callable, dtype: torch.dtype, kind: str) -> None:
    ours, theirs = queries_and_keys(dtype), queries_and_keys(dtype)
    positions = positions_like(kind)
    turns = turns_at(TABLE, N, positions)
    got = [function(x, turns) for x in ours]
    expected = apply_rotary_emb(*theirs, FREQUENCIES, positions)
    upstream_grad = torch.randn(B, N, HEADS, D, generator=torch.Generator().manual_seed(2))
    for mine, want, x, y in zip(got, expected, ours, theirs, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, want)
        grad = upstream_grad[:, :, : x.shape[2]].to(dtype)
        mine.backward(grad)
        want.backward(grad)
        assert torch.equal(x.grad, y.grad)


def test_table_is_upstreams_memory() -> None:
    assert TABLE.data_ptr() == FREQUENCIES.data_ptr()
    assert torch.equal(TABLE.view(torch.float32), torch.view_as_real(FREQUENCIES))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", [pytest.param("none", marks=pytest.mark.slow), "each"])
def test_compiled_is_one_kernel_each_way_within_rounding(device: str, kind: str) -> None:
    """Compare with float64: a compiler may contract a product and a sum, and round less often."""
    torch._dynamo.reset()
    positions = positions_like(kind)
    if positions is not None:
        positions = positions.to(device)
    frequencies = FREQUENCIES.to(device)

    def rotary(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return rotate(x, turns_at(table, N, positions))

    x = queries_and_keys(torch.float32)[0].detach().to(device).requires_grad_()
    metrics.reset()
    out = torch.compile(rotary, fullgraph=True)(x, table_of(frequencies))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device)
    out.backward(grad)
    assert metrics.generated_kernel_count == 2

    angles = frequencies.to(torch.complex128)
    angles = angles[None, :N] if positions is None else angles[positions]
    pairs = torch.view_as_complex(x.detach().double().unflatten(-1, (-1, 2)))
    grads = torch.view_as_complex(grad.double().unflatten(-1, (-1, 2)))
    for got, exact in (
        (out, pairs * angles.unsqueeze(2)),
        (x.grad, grads * angles.conj().unsqueeze(2)),
    ):
        error = (got - torch.view_as_real(exact).flatten(-2)).abs()
        # Two roundings, each of at most half an ulp of the pair's length.
        bound = 1.5 * torch.finfo(torch.float32).eps * exact.abs().repeat_interleave(2, dim=-1)
        assert (error <= bound).all()


def test_mixed_precision_leaves_the_angles_alone() -> None:
    """FSDP casts a block's floating-point arguments; the table reaches attention bit for bit."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        args = LighthouseModelArgs(
            dim=64,
            n_layers=1,
            n_heads=2,
            vocab_size=320,
            max_seq_len=N,
            lighthouse=LighthouseConfig(2, 2, 16, picks_per_stratum=8),
            dense_layers=[0],
        )
        model = LighthouseTransformer(args)
        block = model.layers["0"]
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        seen = []
        block.attention.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:2]))
        block(torch.randn(1, N, 64), model.freqs_cis, None, None)
    finally:
        dist.destroy_process_group()
    x, table = seen
    assert x.dtype == torch.bfloat16
    turns = turns_at(table, N, None)[0, :, 0]
    assert torch.equal(torch.view_as_complex(turns), Transformer(args).freqs_cis)
