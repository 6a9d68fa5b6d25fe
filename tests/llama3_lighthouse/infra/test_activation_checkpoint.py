"""Mode "lighthouse": it keeps and repeats what it says, and gradients stay the same."""

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_model import DEVICE, DTYPE, FFN, THREE_LAYERS, N, build_on_device
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from watched_memory import Watch

from torchtitan.models.llama3_lighthouse.infra.activation_checkpoint import (
    ATTENTION,
    SELECTION,
    WINDOW,
)
from torchtitan.models.llama3_lighthouse.job_config import ActivationCheckpoint
from torchtitan.models.llama3_lighthouse.memory_estimate import kept_bytes as estimated_bytes

KEPT = [(), ("wo",), ("wo", "w1", "w3"), ("wq", "wk", "wv", "wo", "w1", "w3")]
MM = torch.ops.aten.mm.default


def loss_of(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, THREE_LAYERS.vocab_size, (1, N), generator=generator)
    return model(tokens.to(DEVICE)).float().logsumexp(-1).sum()


def assert_equal_gradients(expected: list, found: list, exact: bool) -> None:
    """Check for equal bits on a CPU if ``exact``, and otherwise for equality within rounding.

    On a GPU, attention's backward adds in any order.
    """
    for one, other in zip(expected, found, strict=True):
        if exact and DEVICE == "cpu":
            assert torch.equal(one, other)
        else:
            scale = one.abs().max().item()
            torch.testing.assert_close(other, one, rtol=0, atol=scale * 8 * torch.finfo(DTYPE).eps)


def repeated_products(attention: str, keep_products: tuple[str, ...]) -> int:
    """Matrix products that an eager backward of the three layers repeats."""
    lighthouse = 2 if attention == "lighthouse" else 0
    names = {"wq", "wk", "wv", "wo", "w1", "w3"}
    kept_in_dense = len(names & set(keep_products))
    kept_in_lighthouse = len({"wo", "w1", "w3"} & set(keep_products))
    return 6 * 3 - (3 - lighthouse) * kept_in_dense - lighthouse * kept_in_lighthouse


@pytest.mark.parametrize(
    ("attention", "impl", "keep_products"),
    [
        *(("lighthouse", "torch", products) for products in KEPT),
        *(("dense", None, products) for products in KEPT),
        pytest.param("lighthouse", "triton", KEPT[1], marks=pytest.mark.slow),
    ],
)
def test_gradients_are_the_same_bits_and_attention_runs_once(
    attention, impl, keep_products
) -> None:
    reference = build_on_device(attention, impl)
    loss_of(reference).backward()
    model = build_on_device(attention, impl, keep_products)
    with Watch() as watch:
        loss_of(model).backward()
    expected, found = ([p.grad for p in m.parameters()] for m in (reference, model))
    assert_equal_gradients(expected, found, exact=True)
    assert sum(watch.count[operation] for operation in ATTENTION) == 3
    selections = sum(watch.count[operation] for operation in SELECTION)
    assert selections == (2 if attention == "lighthouse" else 0)
    products = 3 * (3 * 7 + 1) + repeated_products(attention, keep_products)
    assert watch.count[MM] == products


WITH_WINDOW = replace(THREE_LAYERS.lighthouse, combine="finest", window=40)
ALONE = replace(THREE_LAYERS, window=40)
BESIDE = replace(THREE_LAYERS, lighthouse=WITH_WINDOW)


@pytest.mark.parametrize("keep_products", KEPT)
@pytest.mark.parametrize("args, attentions", [(ALONE, 2), (BESIDE, 4)], ids=["alone", "beside"])
def test_windows_run_once(keep_products: tuple[str, ...], args, attentions: int) -> None:
    """Beside the selection there are two attentions with a logsumexp in each of two layers."""
    reference = build_on_device("lighthouse", None, args=args)
    loss_of(reference).backward()
    model = build_on_device("lighthouse", None, keep_products, args)
    with Watch() as watch:
        loss_of(model).backward()
    expected, found = ([p.grad for p in m.parameters()] for m in (reference, model))
    assert_equal_gradients(expected, found, exact=True)
    assert sum(watch.count[operation] for operation in WINDOW) == attentions
    assert sum(watch.count[operation] for operation in ATTENTION) == 1
    # Backward needs the queries, keys and values that a dense layer needs.
    assert watch.count[MM] == 3 * (3 * 7 + 1) + repeated_products("dense", keep_products)


def kept_bytes(
    layer: int, attention: str, keep_products: tuple[str, ...], itemsize: int = DTYPE.itemsize
) -> int:
    """Bytes that one layer keeps for backward beside its input."""
    heads, kv_heads, head_dim = 4, 2, 16
    widths = {"wq": 64, "wk": 32, "wv": 32, "wo": 64, "w1": FFN, "w3": FFN}
    lighthouse = attention == "lighthouse" and layer != 0
    s = N // 4 + 2 * 2 * 16
    length = s if lighthouse else N
    elements = length * heads * head_dim
    words = length * heads
    if lighthouse:
        elements += s * (heads + 2 * kv_heads) * head_dim
        words += kv_heads * (s + N + N // 2 + N // 4)
    for name in keep_products:
        if not (lighthouse and name in ("wq", "wk", "wv")):
            elements += N * widths[name]
    return itemsize * elements + 4 * words


def assert_bytes(found: int, expected: int) -> None:
    """On a GPU, allow for the seed and the offset that attention keeps as well."""
    assert expected <= found <= expected + (64 if DEVICE == "cuda" else 0)


@pytest.mark.parametrize("attention", ["lighthouse", "dense"])
@pytest.mark.parametrize("keep_products", [KEPT[0], KEPT[3]])
def test_eager_keeps_what_it_says(attention: str, keep_products: tuple[str, ...]) -> None:
    """Measured between forward and backward, by the memory that is in use."""
    model = build_on_device(attention, "triton", keep_products)
    for layer in (0, 1):
        x = torch.randn(1, N, 64, device=DEVICE, dtype=DTYPE, requires_grad=True)
        with Watch() as watch:
            out = model.layers[str(layer)](x, model.freqs_cis, None)
        # Triton's interpreter leaves reference cycles.
        gc.collect()
        del watch.storages[out.untyped_storage()._cdata]
        assert_bytes(watch.living_bytes(), kept_bytes(layer, attention, keep_products))


class Graphs:
    """A backend for torch.compile that runs graphs uncompiled and remembers where they were cut."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.Graph] = []
        self.backward: list[torch.fx.Graph] = []

        def remember(graphs: list[torch.fx.Graph]) -> Callable:
            return lambda graph, inputs: graphs.append(graph.graph) or graph.forward

        self.backend = aot_autograd(
            fw_compiler=remember(self.forward),
            bw_compiler=remember(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    def count(self, *operations: torch._ops.OpOverload) -> int:
        graphs = self.forward + self.backward
        return sum(node.target in operations for graph in graphs for node in graph.nodes)

    def saved_bytes(self) -> int:
        """Bytes that the forward computes and hands to the backward."""
        (graph,) = self.forward
        saved = [node for node in graph.output_node().args[0][1:] if node.op != "placeholder"]
        return sum(value.nbytes for value in (node.meta["val"] for node in saved))


@pytest.mark.parametrize("attention", ["lighthouse", "dense"])
@pytest.mark.parametrize("keep_products", [pytest.param(KEPT[0], marks=pytest.mark.slow), KEPT[2]])
def test_compiled_keeps_what_it_says(attention: str, keep_products: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    model = build_on_device(attention, "triton", keep_products)
    block = model.layers["1"]
    graphs = Graphs()
    compiled = torch.compile(block, backend=graphs.backend, fullgraph=True)
    x = torch.randn(1, N, 64, device=DEVICE, dtype=DTYPE, requires_grad=True)
    out = compiled(x, model.freqs_cis, None)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    assert graphs.count(*ATTENTION) == 1
    assert graphs.count(*SELECTION) == (attention == "lighthouse")
    repeated = {"wq", "wk", "wv"} if attention == "dense" else set()
    repeated = (repeated | {"wo", "w1", "w3"}) - set(keep_products)
    assert graphs.count(MM) == 3 * 7 + len(repeated)
    expected = kept_bytes(1, attention, keep_products)
    if attention == "lighthouse":
        # Backward does not read the selection's index, which eager code keeps with its slot.
        expected -= 4 * 2 * (N // 4 + 2 * 2 * 16)
    assert_bytes(graphs.saved_bytes(), expected)
    found = [x.grad, *(parameter.grad for parameter in block.parameters())]

    reference = build_on_device(attention, "triton").layers["1"]
    expected_x = x.detach().requires_grad_()
    (reference(expected_x, model.freqs_cis, None) * weights).sum().backward()
    expected = [expected_x.grad, *(parameter.grad for parameter in reference.parameters())]
    assert_equal_gradients(expected, found, exact=False)


@pytest.mark.parametrize("keep_products", KEPT)
def test_dry_run_counts_the_same(keep_products: tuple[str, ...]) -> None:
    section = ActivationCheckpoint(mode="lighthouse", keep_products=list(keep_products))
    for attention in ("lighthouse", "dense"):
        layers = sum(
            kept_bytes(layer, attention, keep_products, 2) + 2 * N * 64 for layer in range(3)
        )
        assert estimated_bytes(THREE_LAYERS, N, N, section, attention)[-1] == pytest.approx(layers)
        offloaded = replace(section, offload_inputs=True)
        # Two of the three layers' inputs are on the device at once.
        layers -= 2 * N * 64
        found = estimated_bytes(THREE_LAYERS, N, N, offloaded, attention)
        assert found[-1] == pytest.approx(layers)
