"""Triton kernels against the oracle, on a GPU or in Triton's interpreter."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from attention_cases import (
    INFINITY,
    NAN,
    SCORES,
    output_and_gradients,
    random_inputs,
    relative_error,
    vectorised_selection,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lighthouse import LighthouseConfig, lighthouse_attention, reference, select
from lighthouse.config import COMBINATIONS, ENTRY_SCORES
from lighthouse.geometry import PyramidGeometry
from lighthouse.scoring import score

kernels = pytest.importorskip("lighthouse.kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(levels=3, p=2, m=4, strata=2, extra=1, batch=1, kv_heads=1, group=1, tied=False, seed=0,
         entry_score="max", combine="sum", window=0):  # fmt: skip
    config = LighthouseConfig(levels, p, m * strata, picks_per_stratum=m, entry_score=entry_score,
                              combine=combine, window=window)  # fmt: skip
    n = (m * strata + extra) * p ** (levels - 1)
    return dict(config=config, n=n, batch=batch, kv_heads=kv_heads, heads=kv_heads * group,
                tied=tied, seed=seed)  # fmt: skip


CASES = [
    case(),
    case(levels=2, p=4, m=2, strata=3, extra=4),
    case(levels=4, p=2, m=6, strata=1, extra=3, batch=2),
    case(levels=3, p=4, m=8, strata=2, extra=5, kv_heads=2, group=3),
    case(levels=3, p=2, m=4, strata=3, extra=2, batch=2, kv_heads=2, group=2, tied=True),
    case(levels=2, p=2, m=16, strata=1, extra=40, tied=True),
    case(levels=3, p=4, m=4, strata=2, extra=3, kv_heads=2, group=2, combine="finest"),
    case(levels=4, p=2, m=6, strata=1, extra=3, batch=2, entry_score="first", combine="finest"),
    case(levels=2, p=4, m=2, strata=3, extra=4, tied=True, entry_score="first"),
    case(levels=3, p=4, m=4, strata=2, kv_heads=2, group=2, entry_score="first", combine="finest",
         window=24),
    case(levels=4, p=2, m=6, strata=1, extra=3, combine="finest", window=1),
    case(levels=2, p=64, m=2, strata=1, entry_score="first", combine="finest", window=9),
    case(levels=2, p=32, m=2, strata=1),
]  # fmt: skip
# A stratum of more candidates than the smallest block.
IN_CHUNKS = case(levels=2, m=4, strata=1, extra=40, tied=True)
# The smallest case whose heads share keys, for tests that run it many times.
GROUPED = case(kv_heads=2, group=3)


def inputs(case, dtype, d):
    return [x.to(DEVICE) for x in random_inputs(case, dtype, d)]


@pytest.fixture
def poison(monkeypatch) -> None:
    """Let outputs start as NaN or as an index that does not exist: none of these may be left."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(float("nan") if out.dtype.is_floating_point else 2**30)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize(
    "number, d", [*((number, 32) for number in range(len(CASES))), (0, 96), (7, 96), (10, 256)]
)
def test_error_is_that_of_the_precision(number, d, poison) -> None:
    """The kernels err hardly more than vectorised PyTorch at this precision, against float64."""
    case = CASES[number]
    config = case["config"]
    # The interpreter is slow, so that cases take turns at the short types.
    short = (torch.bfloat16, torch.float16)
    for dtype in (torch.float32, *(short if DEVICE == "cuda" else short[number % 2 :][:1])):
        leaves = inputs(case, dtype, d)
        selection = reference.select(*leaves, config)
        grad = torch.randn(leaves[0].shape).to(DEVICE, dtype)
        exact = output_and_gradients(
            reference.lighthouse_attention, [x.double() for x in leaves], grad.double(), config,
            selection=selection,
        )  # fmt: skip
        rough = output_and_gradients(
            lighthouse_attention, leaves, grad, config, selection=selection, impl="torch"
        )
        ours = output_and_gradients(
            lighthouse_attention, leaves, grad, config, selection=selection, impl="triton"
        )
        for value, plain, want in zip(ours, rough, exact, strict=True):
            assert value.dtype == dtype
            # The interpreter truncates to bfloat16 where a GPU rounds.
            truncates = dtype == torch.bfloat16 and DEVICE == "cpu"
            # Backward reads the merged output, which is rounded.
            beside = 0.5 if config.window else 0.0
            factor = (3 if truncates else 1.5) + (2 if truncates else 1) * beside
            assert relative_error(value, want) <= factor * relative_error(plain, want) + 1e-7


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_and_coarsest_means(case, poison) -> None:
    config = case["config"]
    geometry = PyramidGeometry(config, case["n"])
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = inputs(case, dtype, 32)
        group = case["heads"] // case["kv_heads"]
        expected_a, expected_b = score(q, k, v, geometry)[1]
        coarsest, a = kernels.pool_coarsest(q, geometry, True)
        _, b = kernels.pool_coarsest(k, geometry, True)
        torch.testing.assert_close(a.unflatten(1, (-1, group)).amax(2), expected_a)
        torch.testing.assert_close(b, expected_b)
        means = q.double().unflatten(2, (geometry.lengths[-1], -1)).mean(3)
        torch.testing.assert_close(coarsest, means.to(dtype))


@pytest.mark.parametrize(
    "case, block",
    # Two cases select as others do.
    [*((case, 8192) for case in (*CASES[:6], *CASES[7:10], *CASES[11:])), (IN_CHUNKS, 16)],
    ids=str,
)
def test_selection_is_exact(case, block, poison, monkeypatch) -> None:
    """The same scores select the same entries in the same places, also in chunks of strata."""
    monkeypatch.setattr(kernels.selection, "LARGEST_BLOCK", block)
    geometry = PyramidGeometry(case["config"], case["n"])
    torch.manual_seed(case["seed"])
    batch, kv_heads = case["batch"], case["kv_heads"]
    group = case["heads"] // kv_heads
    # Sequences and key-value heads do not mix, so each gets scores of another kind.
    makers, planes = list(SCORES.values()), batch * kv_heads
    for start in range(0, len(makers), planes):
        a, b = (
            torch.stack(
                [make(rows, geometry.lengths[1]) for make in makers[start : start + planes]]
            )
            .view(batch, kv_heads * rows, -1)
            .to(DEVICE)
            for rows in (group, 1)
        )
        index, slot = kernels.select_from_norms(a, b, geometry)
        expected = vectorised_selection(a, b, geometry)
        assert torch.equal(index, expected.index)
        assert torch.equal(slot, expected.slot)


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
def test_what_is_not_finite_shows(spoiled, value) -> None:
    """It shows from its coarsest entry on and not before; nothing hangs."""
    each = CASES[0]
    leaves = inputs(each, torch.float32, 32)
    span = each["config"].pooling_factor ** (each["config"].levels - 1)
    position = each["n"] // 2
    leaves["qkv".index(spoiled)][:, :, position] = value
    out, *grads = output_and_gradients(
        lighthouse_attention, leaves, torch.ones_like(leaves[0]), each["config"], impl="triton"
    )
    start = position // span * span
    if spoiled != "v":
        # The dense attention multiplies masked values by zero, so they spread backwards too.
        assert out[:, :, :start].isfinite().all()
    assert not out[:, :, start:].isfinite().all()
    if value is NAN and spoiled != "q":
        # Every later query attends over every coarsest key and value.
        assert out[:, :, start + span :].isnan().all()
    # An infinite value leaves its own gradient finite: that depends on the weights alone.
    assert not all(x.isfinite().all() for x in grads)


def test_whole_agrees_with_the_vectorised_code() -> None:
    """Selections agree too, on scores without near-ties."""
    for each in (*CASES[1:3], GROUPED):
        leaves = inputs(each, torch.float32, 32)
        grad = torch.randn_like(leaves[0])
        config = each["config"]
        mine, theirs = (select(*leaves, config, impl=impl) for impl in ("triton", "torch"))
        assert torch.equal(mine.index, theirs.index) and torch.equal(mine.slot, theirs.slot)
        ours = output_and_gradients(lighthouse_attention, leaves, grad, config, impl="triton")
        other = output_and_gradients(lighthouse_attention, leaves, grad, config, impl="torch")
        for value, want in zip(ours, other, strict=True):
            assert relative_error(value, want) < 1e-6


class Executions(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("entry_score", ENTRY_SCORES)
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_all_around_attention_is_kernels(entry_score: str, combine: str) -> None:
    """Every setting runs the same operations of ours, each of which is one launch."""
    each = case(entry_score=entry_score, combine=combine)
    leaves = inputs(each, torch.float32, 32)
    with Executions() as executions:
        output_and_gradients(lighthouse_attention, leaves, leaves[0], each["config"], impl="triton")
    ours = {str(op): n for op, n in executions.counts.items() if op.namespace == "lighthouse"}
    assert ours == {
        "lighthouse.pool.default": 3,
        "lighthouse.select_from_norms.default": 1,
        "lighthouse.gather.default": 3,
        "lighthouse.spread.default": 4,
        "lighthouse.collect.default": 1,
    }


def test_two_attentions_are_merged_by_one_operation() -> None:
    """Each way; the second attention is the window of the base sequence."""
    each = case(combine="finest", window=9)
    leaves = inputs(each, torch.float32, 32)
    with Executions() as executions:
        output_and_gradients(lighthouse_attention, leaves, leaves[0], each["config"], impl="triton")
    ours = {str(op): n for op, n in executions.counts.items() if op.namespace == "lighthouse"}
    assert ours == {
        "lighthouse.pool.default": 3,
        "lighthouse.select_from_norms.default": 1,
        "lighthouse.gather.default": 3,
        "lighthouse.window.default": 2,
        "lighthouse.merge_outputs.default": 1,
        "lighthouse.collect_merged.default": 1,
        "lighthouse.window_backward.default": 2,
        "lighthouse.spread.default": 3,
    }
    # The gradients through the two attentions are added as they are spread.
    assert not any("aten.add" in str(op) for op in executions.counts)


def test_gradients_that_nobody_asks_for_are_not_spread() -> None:
    """Merged attentions have the gradients of q, k and v at hand; the others keep their bits."""
    each = case(levels=2, m=2, strata=1, group=2, combine="finest", window=3)
    leaves = inputs(each, torch.float32, 16)
    grad = torch.randn_like(leaves[0])
    expected = output_and_gradients(
        lighthouse_attention, leaves, grad, each["config"], impl="triton"
    )
    for asked in ((0,), (1, 2)):
        some = [x.clone().requires_grad_(number in asked) for number, x in enumerate(leaves)]
        out = lighthouse_attention(*some, each["config"], impl="triton")
        with Executions() as executions:
            out.backward(grad)
        assert executions.counts[torch.ops.lighthouse.spread.default] == len(asked)
        for number in asked:
            assert torch.equal(some[number].grad, expected[1 + number])


def test_output_lies_sequence_first() -> None:
    leaves = inputs(GROUPED, torch.float32, 32)
    out = lighthouse_attention(*leaves, GROUPED["config"], impl="triton")
    assert out.transpose(1, 2).is_contiguous()


def test_operations_are_well_formed() -> None:
    """Each operation is checked in several ways, on sizes that are small but differ."""
    each = case(m=2, strata=1, group=2)
    config = each["config"]
    geometry = PyramidGeometry(config, each["n"])
    q, k, _ = inputs(each, torch.float32, 16)
    p, levels = config.pooling_factor, config.levels
    ops = torch.ops.lighthouse
    pool = (q, p, levels, p)
    torch.library.opcheck(ops.pool.default, pool)
    coarsest, a = ops.pool(*pool)
    b = ops.pool(k, *pool[1:])[1]
    choose = (a, b, levels, p, config.picks_per_stratum, geometry.strata, False)
    torch.library.opcheck(ops.select_from_norms.default, choose)
    index, slot = ops.select_from_norms(*choose)
    gather = (q, coarsest, index, p, levels)
    torch.library.opcheck(ops.gather.default, gather)
    rows = ops.gather(*gather)
    assert rows.transpose(1, 2).is_contiguous()
    for onto in (None, q):
        spread = (rows, slot, each["n"], p, levels, False, False, onto)
        torch.library.opcheck(ops.spread.default, spread)
    for finest in (False, True):
        collect = (q, slot, geometry.gathered_length, p, levels, finest)
        torch.library.opcheck(ops.collect.default, collect)
        assert ops.collect(*collect).transpose(1, 2).is_contiguous()
        spread = (rows, slot, each["n"], p, levels, True, finest)
        torch.library.opcheck(ops.spread.default, spread)
        with_seam = (ops.spread(*spread), rows, slot, rows[:, :, : levels - 1], p, levels, finest)
        torch.library.opcheck(ops.spread_with_seam.default, with_seam)
    far, near = rows, q
    far_lse, near_lse = far[..., 0].contiguous(), near[..., 0].contiguous()
    merge = (far, far_lse, near, near_lse, slot, p, levels)
    torch.library.opcheck(ops.merge_outputs.default, merge)
    out, lse = ops.merge_outputs(*merge)
    collect_merged = (near, out, lse, far, far_lse, index, slot, p, levels)
    torch.library.opcheck(ops.collect_merged.default, collect_merged)
    seam, seam_lse = far[:, :, : levels - 1], far_lse[:, :, : levels - 1]
    crossing = (*merge, None, seam, seam_lse, None, 0, 2)
    torch.library.opcheck(ops.merge_outputs.default, crossing)
    sums = (near, out, lse, slot, seam_lse, p, levels, 0, 2)
    torch.library.opcheck(ops.seam_sums.default, sums)
    rows = ops.collect_merged(*collect_merged)
    add = (*rows, far, *ops.seam_sums(*sums), slot, each["n"], p, levels)
    torch.library.opcheck(ops.add_seam_sums.default, add)


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
}


@pytest.mark.parametrize(
    "saved", [pytest.param("nothing", marks=pytest.mark.slow), "attention and selection"]
)
def test_checkpointing_repeats_the_same_bits(saved) -> None:
    each = GROUPED
    # In this precision the device's stock attention is one operation.
    leaves = inputs(each, torch.float32 if DEVICE == "cpu" else torch.bfloat16, 32)
    config, grad = each["config"], torch.randn_like(leaves[0])
    select_op = torch.ops.lighthouse.select_from_norms.default
    keep = [] if saved == "nothing" else [select_op, *ATTENTION]

    def checkpointed(*arguments, **options):
        return checkpoint(
            lighthouse_attention, *arguments, **options, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(keep),
        )  # fmt: skip

    torch.use_deterministic_algorithms(True)
    try:
        plain = output_and_gradients(lighthouse_attention, leaves, grad, config, impl="triton")
        with Executions() as executions:
            repeated = output_and_gradients(checkpointed, leaves, grad, config, impl="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for value, want in zip(repeated, plain, strict=True):
        assert torch.equal(value, want)
    times = 2 if saved == "nothing" else 1
    assert executions.counts[select_op] == times
    assert sum(executions.counts[operation] for operation in ATTENTION) == times


@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_steps_do_not_recompile(window: int) -> None:
    combine = "finest" if window else "sum"
    each = case(m=2, strata=1, group=2, combine=combine, window=window)
    # Compilations of this function by other tests count as well.
    torch.compiler.reset()
    compiled = torch.compile(lighthouse_attention, fullgraph=True, backend="aot_eager")
    leaves = inputs(each, torch.float32, 32)
    grad = torch.randn_like(leaves[0])
    expected = output_and_gradients(lighthouse_attention, leaves, grad, each["config"],
                                    impl="triton")  # fmt: skip
    for step in range(2):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            results = output_and_gradients(compiled, leaves, grad, each["config"], impl="triton")
        for value, want in zip(results, expected, strict=True):
            torch.testing.assert_close(value, want)


# Case 2 has the widest rows and 64-bit offsets, and case 3 lengths of one; the GPU tests compile
# smaller ones as well.
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) for case in (*"01234", "long", "loss")],
)
def test_every_kernel_compiles_for_ampere(case: str, tmp_path: Path) -> None:
    """Triton's compiler refuses more than its interpreter, and needs no GPU either.

    The text of kernels stays short, also for pooling factors so large that they must not read all
    rows of an entry one by one.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    subprocess.run(
        [sys.executable, script, "80", case],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        check=True,
    )


def test_unsupported_tensors_are_refused() -> None:
    config = CASES[0]["config"]
    with pytest.raises(ValueError, match="impl must be one of triton, torch, got impl = \"?'cuda"):
        lighthouse_attention(*inputs(CASES[0], torch.float32, 32), config, impl="cuda")
    with pytest.raises(ValueError, match='got torch.float64; pass impl="torch"'):
        lighthouse_attention(*inputs(CASES[0], torch.float64, 32), config, impl="triton")
    with pytest.raises(ValueError, match="at most 256, got 512"):
        lighthouse_attention(*inputs(CASES[0], torch.float32, 512), config, impl="triton")
