"""Layer inputs in host memory: the same gradients, and copies in an order that cannot race."""

from types import SimpleNamespace

import pytest
import torch
from test_activation_checkpoint import DEVICE, DTYPE, assert_equal_gradients, build, loss_of

from torchtitan.models.llama3_lighthouse.infra.offload import LayerInputOffload


class Log:
    """A stand-in for ``torch.cuda`` on a CPU, where copies are immediate: writes down the order."""

    def __init__(self) -> None:
        log, self.lines = self, []

        class Event:
            def record(self, stream) -> None:
                log.lines.append(("record", stream.name, self))

        class Stream:
            def __init__(self, name="copies") -> None:
                self.name = name

            def wait_stream(self, other) -> None:
                log.lines.append(("wait for all", self.name, other.name))

            def wait_event(self, event) -> None:
                assert any(line[2] is event for line in log.lines if line[0] == "record")
                log.lines.append(("wait", self.name, event))

        compute = Stream("compute")
        self.module = SimpleNamespace(
            Event=Event, Stream=Stream, stream=torch.cpu.stream, current_stream=lambda: compute
        )


def offloading(model, device_module=torch.cpu) -> LayerInputOffload:
    offload = LayerInputOffload(device_module, pin_memory=False)
    offload.attach(model.layers.values())
    return offload


def gradients(model) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.skipif(DEVICE == "cuda", reason="there, the GPU's own test is the harder one")
@pytest.mark.parametrize("keep_products", [None, ("wo",)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_are_the_same_bits(keep_products, compiled: bool) -> None:
    """Accumulated over two passes; buffers are made in the first and used again in the second."""
    found = []
    for offloads in (False, True):
        torch._dynamo.reset()
        model = build("lighthouse", "torch", keep_products)
        if compiled:
            for name, block in model.layers.items():
                block = torch.compile(block, backend="aot_eager", fullgraph=True)
                model.layers.register_module(name, block)
        offload = offloading(model) if offloads else None
        for _ in range(2):
            loss_of(model).backward()
        found.append(gradients(model))
        if offloads:
            # Each with one to spare: a buffer is free again only when its graph is.
            assert 3 <= offload.buffers_made <= 4
            with torch.no_grad():
                loss_of(model)
            assert offload.buffers_made <= 4
    assert_equal_gradients(*found, exact=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="reads the order in which a CPU is asked")
def test_inputs_leave_the_device_and_come_back_ahead_of_use() -> None:
    log = Log()
    model = build("lighthouse", "torch", ())
    offload = offloading(model, log.module)
    loss = loss_of(model)
    first, second = offload._under_way[0].previous, offload._under_way[0]
    # Of three layers the first one's input is gone, after the compute stream waits for its copy.
    assert first.source is None and second.source is not None
    assert log.lines[-1] == ("wait", "compute", first.copied)
    before = len(log.lines)
    loss.backward()
    backward = log.lines[before:]
    fetched = backward.index(("record", "copies", first.arrived))
    assert backward[fetched - 1] == ("wait for all", "copies", "compute")
    used = backward.index(("wait", "compute", first.arrived))
    # Asked for when the second layer's backward begins, before its own.
    assert fetched < used
    assert backward.index(("wait", "compute", second.copied)) < fetched
    assert sum(line[:2] == ("record", "copies") for line in backward) == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="reads the order in which a CPU is asked")
def test_a_graph_without_backward_gives_its_buffers_back() -> None:
    model = build("dense", None, ())
    offload = offloading(model)
    for _ in range(3):
        loss_of(model)
    assert offload.buffers_made <= 6


def test_a_layer_whose_input_is_not_saved_is_an_error() -> None:
    offload = LayerInputOffload(torch.cpu, pin_memory=False)
    layer = torch.nn.Identity()
    offload.attach([layer])
    with pytest.raises(RuntimeError, match="offload_inputs: backward does not save"):
        layer(torch.ones(1, 2, 4, requires_grad=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_on_a_gpu_are_the_same_bits(compiled: bool) -> None:
    """Large enough to overlap; with deterministic attention, accumulated over three passes."""
    found = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for offloads in (False, True):
            torch._dynamo.reset()
            found.append(_gpu_gradients(offloads, compiled))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def _gpu_gradients(offloads: bool, compiled: bool) -> list[torch.Tensor]:
    from torch.nn.attention import SDPBackend

    from lighthouse import LighthouseConfig
    from torchtitan.models.llama3_lighthouse import LighthouseTransformer
    from torchtitan.models.llama3_lighthouse.infra.activation_checkpoint import (
        apply_lighthouse_checkpoint,
    )
    from torchtitan.models.llama3_lighthouse.job_config import ActivationCheckpoint
    from torchtitan.models.llama3_lighthouse.model import LighthouseModelArgs

    n = 16384
    torch.manual_seed(0)
    args = LighthouseModelArgs(
        dim=1024, n_layers=6, n_heads=8, ffn_dim_multiplier=0.5625, vocab_size=320, max_seq_len=n,
        lighthouse=LighthouseConfig(3, 4, 256), dense_layers=[0],
    )  # fmt: skip
    model = LighthouseTransformer(args).cuda()
    with torch.no_grad():
        model.init_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPE)
    for layer in model.modules():
        if hasattr(layer, "sdpa_backends"):
            layer.sdpa_backends = [SDPBackend.FLASH_ATTENTION]
    apply_lighthouse_checkpoint(model, ActivationCheckpoint(mode="lighthouse"))
    if compiled:
        for name, block in model.layers.items():
            model.layers.register_module(name, torch.compile(block, fullgraph=True))
    if offloads:
        LayerInputOffload().attach(model.layers.values())
    tokens = torch.randint(0, 320, (3, 1, n), device="cuda")
    for batch in tokens:
        model(batch).float().logsumexp(-1).sum().backward()
    return gradients(model)
