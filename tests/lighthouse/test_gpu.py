"""The same promises on a CUDA device."""

import pytest
import torch
from test_against_oracle import output_and_gradients, relative_error
from test_interface import Dense
from test_properties import run_twice

from lighthouse import LighthouseAttention, LighthouseConfig, lighthouse_attention, select

pytestmark = pytest.mark.gpu

PAPER = LighthouseConfig(levels=3, pooling_factor=4, top_k=1536)
PAPER_LENGTH = 98304


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeated_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    """Ours everywhere; of the stock attention's backward we ask for its deterministic variant."""
    torch.use_deterministic_algorithms(True)
    try:
        run_twice("cuda", dtype, 4096, LighthouseConfig(3, 4, 128, picks_per_stratum=32))
    finally:
        torch.use_deterministic_algorithms(False)


def test_gather_and_scatter_repeat_without_asking_for_it() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(1, h, PAPER_LENGTH, 128, device="cuda").bfloat16() for h in (8, 2, 2)]
    grad = torch.randn_like(leaves[0])
    results = [
        output_and_gradients(
            lighthouse_attention,
            leaves,
            grad,
            PAPER,
            sdpa=lambda q, k, v, **_: q * k.mean() * v.mean(),
        )
        for _ in range(2)
    ]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_device_agrees_with_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    config = LighthouseConfig(3, 4, 96, picks_per_stratum=32)
    leaves = [torch.randn(2, 2048, h, 64, dtype=torch.float64).transpose(1, 2) for h in (4, 2, 2)]
    leaves = [x.to(dtype) for x in leaves]
    selection = select(*leaves, config)
    grad = torch.randn(2, 4, 2048, 64).to(dtype)
    exact = output_and_gradients(
        lighthouse_attention,
        [x.double() for x in leaves],
        grad.double(),
        config,
        selection=selection,
    )
    on_device = type(selection)(*(x.cuda() for x in selection))
    ours = output_and_gradients(
        lighthouse_attention, [x.cuda() for x in leaves], grad.cuda(), config, selection=on_device,
        impl="torch" if dtype == torch.float64 else None,
    )  # fmt: skip
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for value, want in zip(ours, exact, strict=True):
        assert relative_error(value.cpu(), want) < bound
    if dtype == torch.float64:
        chosen = select(*(x.cuda() for x in leaves), config, impl="torch")
        assert torch.equal(chosen.index.cpu(), selection.index)
        assert torch.equal(chosen.slot.cpu(), selection.slot)


def test_compiles_whole_at_the_papers_size() -> None:
    torch.manual_seed(2)
    module = LighthouseAttention(PAPER, Dense())
    compiled = torch.compile(module, fullgraph=True)
    leaves = [
        torch.randn(1, PAPER_LENGTH, 8, 128, device="cuda").bfloat16().transpose(1, 2)
        for _ in range(3)
    ]
    grad = torch.randn_like(leaves[0])

    def call(function):
        return output_and_gradients(lambda q, k, v, _: function(q, k, v), leaves, grad, PAPER)

    for value, want in zip(call(compiled), call(module), strict=True):
        assert relative_error(value, want) < 2e-2


def test_no_host_synchronisation() -> None:
    q, k, v = (torch.randn(1, 2, 4096, 64, device="cuda", requires_grad=True) for _ in range(3))
    config = LighthouseConfig(3, 4, 128, picks_per_stratum=32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lighthouse_attention(q, k, v, config).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
