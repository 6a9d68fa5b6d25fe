"""The attention's promises, kept on a CUDA device."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from attention_cases import (
    SCORES,
    Dense,
    output_and_gradients,
    relative_error,
    run_twice,
    vectorised_selection,
)

from lighthouse import (
    ContextParallel,
    LighthouseAttention,
    LighthouseConfig,
    kernels,
    lighthouse_attention,
    select,
)
from lighthouse.config import COMBINATIONS, SCORERS
from lighthouse.geometry import PyramidGeometry
from lighthouse.scoring import score

pytestmark = pytest.mark.gpu

PAPER = LighthouseConfig(levels=3, pooling_factor=4, top_k=1536, entry_score="max", combine="sum")
PAPER_LENGTH = 98304
WITH_WINDOW = replace(PAPER, entry_score="first", combine="finest", window=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeated_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    """Our operations always repeat; the stock attention's backward does so on request."""
    torch.use_deterministic_algorithms(True)
    try:
        for combine, window in (("sum", 0), ("finest", 0), ("finest", 200)):
            config = LighthouseConfig(
                3, 4, 128, picks_per_stratum=32, combine=combine, window=window
            )
            run_twice("cuda", dtype, 4096, config)
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


@pytest.mark.parametrize("config", [PAPER, WITH_WINDOW], ids=["paper", "window"])
def test_compiles_whole_at_the_papers_size(config: LighthouseConfig) -> None:
    torch.manual_seed(2)
    module = LighthouseAttention(config, Dense())
    compiled = torch.compile(module, fullgraph=True)
    leaves = [
        torch.randn(1, PAPER_LENGTH, 8, 128, device="cuda").bfloat16().transpose(1, 2)
        for _ in range(3)
    ]
    grad = torch.randn_like(leaves[0])

    def call(function):
        return output_and_gradients(lambda q, k, v, _: function(q, k, v), leaves, grad, config)

    for value, want in zip(call(compiled), call(module), strict=True):
        assert relative_error(value, want) < 2e-2


@pytest.mark.parametrize("scorer", SCORERS)
def test_no_host_synchronisation(scorer: str) -> None:
    q, k, v = (torch.randn(1, 2, 4096, 64, device="cuda", requires_grad=True) for _ in range(3))
    config = LighthouseConfig(3, 4, 128, scorer, picks_per_stratum=32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lighthouse_attention(q, k, v, config).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_scores_at_the_papers_size(scorer: str, kv_heads: int) -> None:
    """Scores repeat bit for bit, and differ from PyTorch in float32 by rounding alone."""
    torch.manual_seed(8)
    geometry = PyramidGeometry(replace(PAPER, scorer=scorer), PAPER_LENGTH)
    rows = [
        torch.randn(1, PAPER_LENGTH, heads, 128, device="cuda").bfloat16().transpose(1, 2)
        for heads in (8, kv_heads, kv_heads)
    ]
    a, b = kernels.score(*rows, geometry)
    for one, other in zip((a, b), kernels.score(*rows, geometry), strict=True):
        assert torch.equal(one, other)
    a = a.unflatten(1, (kv_heads, -1)).amax(2)
    exact = score(*(x.float() for x in rows), geometry)[1]
    for ours, want in zip((a, b), exact, strict=True):
        assert relative_error(ours, want) < 2**-8


@pytest.mark.parametrize("n, top_k", [(PAPER_LENGTH, 1536), (524288, 8192)])
def test_long_sequences_repeat_bit_for_bit(n: int, top_k: int) -> None:
    """The stock attention repeats too. The second gathered sequence is longer than 65,535."""
    torch.use_deterministic_algorithms(True)
    try:
        run_twice("cuda", torch.bfloat16, n, LighthouseConfig(3, 4, top_k))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", SCORES)
def test_strata_of_thousands(kind: str) -> None:
    """Try strata of about 10,922, 5,461, 341 and 85 coarsest entries."""
    torch.manual_seed(6)
    for n, config in (
        # More candidates than one program keeps on chip.
        (2**22, LighthouseConfig(3, 4, 24 * 128)),
        (2**22, LighthouseConfig(3, 4, 48 * 128)),
        (2**16, LighthouseConfig(3, 4, 48 * 64, picks_per_stratum=64)),
        (2**18, LighthouseConfig(4, 2, 96 * 128)),
    ):
        geometry = PyramidGeometry(config, n)
        a, b = (SCORES[kind](2, h, geometry.lengths[1]).cuda() for h in (4, 2))
        index, slot = kernels.select_from_norms(a, b, geometry)
        expected = vectorised_selection(a, b, geometry)
        assert torch.equal(index, expected.index)
        assert torch.equal(slot, expected.slot)


def test_beyond_two_billion_elements() -> None:
    """Compare random positions of a tensor past all 32-bit offsets with sums written out here."""
    n, heads, d, levels, p = 2**22, 5, 128, 4, 4
    config = LighthouseConfig(levels, p, 3 * 5504, entry_score="max", combine="sum")
    geometry = PyramidGeometry(config, n)
    assert n * heads * d > 2**31

    torch.manual_seed(3)
    q = torch.randn(1, n, heads, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    grad = torch.randn_like(q)
    selection = select(q, q, q, config)
    same = select(q, q, q, config)
    assert torch.equal(selection.index, same.index)
    leaf = q.detach().requires_grad_()
    out = lighthouse_attention(leaf, q, q, config, selection=selection, sdpa=lambda q, k, v, **_: q)
    (dq,) = torch.autograd.grad(out, leaf, grad)
    out = out.detach()

    def reached(t: int, head: int, shifted: bool) -> list[tuple[int, int]]:
        """(span, entry) of the included entries above t, or of those that write to it."""
        found = []
        for level, span in enumerate(geometry.spans):
            entry = (t - span + 1) // span if shifted else t // span
            offset = geometry.offsets[level]
            if entry >= 0 and selection.slot[0, head, offset + entry] >= 0:
                found.append((span, entry))
        return found

    generator = torch.Generator().manual_seed(4)
    positions = torch.randint(0, n, (100,), generator=generator).tolist()
    for t in [*positions, *range(n - 10, n)]:
        for head in (0, heads - 1):
            mean = sum(q[0, head, i * w : (i + 1) * w].double().mean(0)
                       for w, i in reached(t, head, shifted=True))  # fmt: skip
            torch.testing.assert_close(out[0, head, t].double(), mean, rtol=0.02, atol=0.02)
            share = sum(grad[0, head, (i + 1) * w - 1 : (i + 2) * w - 1].double().sum(0) / w
                        for w, i in reached(t, head, shifted=False))  # fmt: skip
            torch.testing.assert_close(dq[0, head, t].double(), share, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "entry_score, combine, window",
    [("max", "sum", 0), ("first", "finest", 0), ("first", "finest", 256)],
)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_error_of_the_whole_is_that_of_vectorised_pytorch(
    d: int, entry_score: str, combine: str, window: int
) -> None:
    """Compare both with float64, at the paper's pooling, with this device's stock attention."""
    torch.manual_seed(5)
    config = LighthouseConfig(
        3, 4, 256, picks_per_stratum=64, entry_score=entry_score, combine=combine, window=window
    )
    leaves = [torch.randn(2, 8192, h, d).transpose(1, 2) for h in (4, 2, 2)]
    grad = torch.randn_like(leaves[0])
    for dtype in (torch.bfloat16, torch.float16):
        rounded = [x.to("cuda", dtype) for x in leaves]
        selection = select(*rounded, config)

        def run(impl, dtype, rounded=rounded, selection=selection):
            return output_and_gradients(
                lighthouse_attention, [x.to(dtype) for x in rounded], grad.to("cuda", dtype),
                config, selection=selection, impl=impl,
            )  # fmt: skip

        exact = run("torch", torch.float64)
        for ours, plain, want in zip(run("triton", dtype), run("torch", dtype), exact, strict=True):
            # Beside a window, vectorised PyTorch keeps its probabilities in float32.
            least = torch.finfo(dtype).eps if window else 0.0
            assert relative_error(ours, want) <= max(1.05 * relative_error(plain, want), least)


class TwoChunksOnOneRank(ContextParallel):
    """Context parallelism over two chunks without a second rank."""

    chunks = 2

    def held_by(self, rank: int) -> tuple[int, ...]:
        return (0, 1)

    def send(self, *parts: torch.Tensor, step: int = 1) -> Callable[[], list[torch.Tensor]]:
        # The operations know layouts over ranks alone. tests/llama3_lighthouse/infra has them.
        pairs = [part.unflatten(0, (-1, 2)) for part in parts]
        came = [torch.zeros_like(pair) for pair in pairs]
        for zeros, pair in zip(came, pairs, strict=True):
            first, second = (0, 1) if step > 0 else (1, 0)
            zeros[:, second] = pair[:, first]
        return lambda: [pair.flatten(0, 1) for pair in came]


@pytest.fixture
def one_rank():
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 2)])
def test_chunks_and_their_seam_give_what_the_whole_gives(
    one_rank, heads: int, kv_heads: int, combine: str
) -> None:
    """Forward gives the same bits. Backward adds the seam's share after rounding, not before."""
    torch.manual_seed(7)
    config = replace(PAPER, combine=combine)
    leaves = [
        torch.randn(1, PAPER_LENGTH, h, 128, device="cuda").bfloat16().transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    ]
    grad = torch.randn_like(leaves[0])
    layouts = (None, ContextParallel(one_rank, 0, 1), TwoChunksOnOneRank(one_rank, 0, 1))
    torch.use_deterministic_algorithms(True)
    try:
        whole, one, two = (
            output_and_gradients(
                lighthouse_attention, leaves, grad, config,
                **({"context_parallel": layout} if layout else {}),
            )
            for layout in layouts
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    for value, want in zip(one, whole, strict=True):
        assert torch.equal(value, want)
    assert torch.equal(two[0], whole[0])
    for value, want in zip(two[1:], whole[1:], strict=True):
        assert relative_error(value, want) < 2e-3
        after = slice(PAPER_LENGTH // 2 - 16, PAPER_LENGTH // 2 + 16)
        assert relative_error(value[:, :, after], want[:, :, after]) < 1e-2
