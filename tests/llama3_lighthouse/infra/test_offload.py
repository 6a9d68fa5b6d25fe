"""Layer inputs in host memory: the same bits, less memory, and no harm from any timing."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from launch import VALIDATED, Run, validation_losses
from small_model import DEVICE, THREE_LAYERS, N, build_on_device
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend
from torchtitan.distributed.activation_checkpoint import apply_ac

from lighthouse import LighthouseConfig
from torchtitan.models.llama3_lighthouse.infra import offload as module
from torchtitan.models.llama3_lighthouse.infra.activation_checkpoint import (
    apply_lighthouse_checkpoint,
)
from torchtitan.models.llama3_lighthouse.infra.cpu import use_sum_reductions
from torchtitan.models.llama3_lighthouse.infra.offload import LayerInputOffload
from torchtitan.models.llama3_lighthouse.infra.parallelize import RECOMPILE_LIMIT
from torchtitan.models.llama3_lighthouse.job_config import ActivationCheckpoint
from torchtitan.models.llama3_lighthouse.model.model import (
    LighthouseModelArgs,
    LighthouseTransformer,
)

STEPS, MICROBATCHES = 2, 2
# All four combinations would show no more than these two, and compiling takes long.
each_mode = pytest.mark.parametrize(("mode", "compiled"), [("lighthouse", True), ("full", False)])
on_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="the tests marked gpu are stricter")


@contextmanager
def offloading(model: nn.Module) -> Iterator[LayerInputOffload]:
    layers = model.layers.values()
    before = [(dict(x._forward_pre_hooks), dict(x._forward_hooks)) for x in layers]
    try:
        yield LayerInputOffload(layers)
    finally:
        for layer, (entering, leaving) in zip(layers, before, strict=True):
            for hooks, kept in (
                (layer._forward_pre_hooks, entering),
                (layer._forward_hooks, leaving),
            ):
                for key in hooks.keys() - kept.keys():
                    del hooks[key]


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).float().logsumexp(-1).sum()


def batches(n: int, vocabulary: int, device: str) -> torch.Tensor:
    """Tokens, [STEPS, MICROBATCHES, 1, N]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (STEPS, MICROBATCHES, 1, n), generator=generator)
    return tokens.to(device)


def gradients(model: nn.Module, *rows: torch.Tensor) -> list[torch.Tensor]:
    """Gradients accumulated over a forward and a backward pass for each of ``rows``."""
    model.zero_grad()
    for tokens in rows:
        loss_of(model, tokens).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def trained(
    model: nn.Module, tokens: torch.Tensor, after_step: Callable[[], object] = lambda: None
) -> list[torch.Tensor]:
    """Losses and gradients of a few steps, and the last weights; then restores the weights."""
    start = [parameter.detach().clone() for parameter in model.parameters()]
    found = []
    for step in tokens:
        with torch.no_grad():
            found.append(loss_of(model, step[0]))
        found += gradients(model, *step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-5 * parameter.grad
        after_step()
    found += [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
    return found


def same_bits(expected: list[torch.Tensor], found: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def compile_blocks(model: nn.Module, backend: str) -> None:
    for name, block in list(model.layers.items()):
        block = torch.compile(block, backend=backend, fullgraph=True)
        model.layers.register_module(name, block)


def small(mode: str, compiled: bool = False) -> LighthouseTransformer:
    model = build_on_device("lighthouse", "torch", ("wo",) if mode == "lighthouse" else None)
    if mode == "full":
        section = ActivationCheckpoint(mode="full")
        apply_ac(
            model, section, model_compile_enabled=compiled, op_sac_save_list=set(), base_folder=""
        )
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model, "aot_eager")
    return model


@cache
def shared(mode: str, compiled: bool) -> LighthouseTransformer:
    """``small``, compiled once for all tests that leave the model as they found it."""
    return small(mode, compiled)


@on_cpu
@each_mode
def test_steps_are_the_same_bits(mode: str, compiled: bool) -> None:
    """Gradients accumulate, passes without gradients come between, and buffers are made once."""
    model = shared(mode, compiled)
    tokens = batches(N, THREE_LAYERS.vocab_size, DEVICE)
    expected = trained(model, tokens)
    buffers = set()
    with offloading(model) as offload:
        found = trained(
            model, tokens, lambda: buffers.add(tuple(x.host.data_ptr() for x in offload.inputs))
        )
        assert [x.passes for x in offload.inputs] == [STEPS * MICROBATCHES] * THREE_LAYERS.n_layers
    assert same_bits(expected, found)
    assert len(buffers) == 1


@each_mode
def test_inputs_leave_the_device(mode: str, compiled: bool) -> None:
    """All inputs do but the last layer's, which backward begins with."""
    model = shared(mode, compiled)
    storages = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, arguments: storages.append(StorageWeakRef(arguments[0].untyped_storage()))
        )
        for layer in model.layers.values()
    ]
    tokens = batches(N, THREE_LAYERS.vocab_size, DEVICE)[0, 0]
    for offloads, living in ((False, [True, True, True]), (True, [False, False, True])):
        with offloading(model) if offloads else nullcontext():
            storages.clear()
            loss = loss_of(model, tokens)
            gc.collect()
            assert [not storage.expired() for storage in storages] == living
            loss.backward()
            del loss
            gc.collect()
            assert all(storage.expired() for storage in storages)
    for hook in hooks:
        hook.remove()


@on_cpu
def test_copies_go_beside_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test looks at the order in which streams are told to copy and to wait."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str = "copies") -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.name} wait for {other.name}")

    compute = Stream("compute")
    monkeypatch.setattr(torch.cpu, "Stream", Stream)
    monkeypatch.setattr(torch.cpu, "current_stream", lambda: compute)
    model = small("lighthouse")
    for number, layer in enumerate(model.layers.values()):

        def run(*arguments, number=number, forward=layer.forward, **options):
            out = forward(*arguments, **options)
            out.register_hook(lambda gradient: log.append(f"layer {number} backward"))
            log.append(f"layer {number} forward")
            return out

        layer.forward = run
    with offloading(model) as offload:
        copy = offload._copy

        def logged(target: torch.Tensor, source: torch.Tensor) -> None:
            copy(target, source)
            to_host, to_device = (
                [i for i, x in enumerate(offload.inputs) if getattr(x, kind) is target]
                for kind in ("host", "device")
            )
            log.append(f"save {to_host[0]}" if to_host else f"fetch {to_device[0]}")

        offload._copy = logged
        loss = loss_of(model, batches(N, THREE_LAYERS.vocab_size, DEVICE)[0, 0])
        forward, log[:] = log[:], []
        loss.backward()
    before_use, before_copy = "compute wait for copies", "copies wait for compute"
    assert forward == [
        line
        for i in range(3)
        for line in (before_use, before_copy, f"save {i}", f"layer {i} forward")
    ]
    assert log == [
        "layer 2 backward", before_use, before_copy, "fetch 1",
        "layer 1 backward", before_use, before_copy, "fetch 0",
        "layer 0 backward", before_use,
    ]  # fmt: skip


def test_a_pass_whose_place_was_taken_has_no_backward() -> None:
    model = small("lighthouse")
    first, second = batches(N, THREE_LAYERS.vocab_size, DEVICE)[0]
    expected = gradients(model, second)
    model.zero_grad()
    with offloading(model):
        loss = loss_of(model, first)
        found = gradients(model, second)
        with pytest.raises(RuntimeError, match="offload_inputs.*run backward before it"):
            loss.backward()
    if DEVICE == "cpu":
        assert same_bits(expected, found)


def test_a_layer_whose_input_is_not_saved_is_an_error() -> None:
    layer = torch.nn.Identity()
    LayerInputOffload([layer])
    with pytest.raises(RuntimeError, match="does not save the input .*set it to false"):
        layer(torch.ones(1, 2, 4, requires_grad=True))
    # Nothing is left behind.
    (torch.ones(2, requires_grad=True) ** 2).sum().backward()


@on_cpu
@pytest.mark.parametrize("reshards", [False, True])
def test_sharded_layers_are_offloaded_in_the_precision_that_fsdp_casts_to(reshards: bool) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = small("lighthouse")
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = dist.init_device_mesh("cpu", (1,))
        for part in (*model.layers.values(), model):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards)
        use_sum_reductions(model)
        first, second = batches(N, THREE_LAYERS.vocab_size, DEVICE)[0]
        expected = [x.to_local() for x in gradients(model, first, second)]
        with offloading(model) as offload:
            found = [x.to_local() for x in gradients(model, first, second)]
        assert same_bits(expected, found)
        assert {x.host.dtype for x in offload.inputs} == {torch.bfloat16}
    finally:
        dist.destroy_process_group()


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "compiled"), [(4, False), (2, True)], ids=["fsdp2-cp2", "cp2-compile"]
)
def test_training_on_a_mesh_is_the_same(tmp_path: Path, processes: int, compiled: bool) -> None:
    """FSDP and context parallelism, both stages, two microbatches a step, and validation."""
    settings = {
        **VALIDATED, "activation_checkpoint.mode": "lighthouse", "compile.enable": compiled,
        "parallelism.context_parallel_degree": 2, "training.global_batch_size": processes,
        "checkpoint.enable": False, "lighthouse.picks_per_stratum": 4,
    }  # fmt: skip
    runs = []
    for offloads in (False, True):
        folder = tmp_path / str(offloads)
        folder.mkdir()
        changed = {**settings, "activation_checkpoint.offload_inputs": offloads}
        runs.append(Run(folder, changed, processes, ANY_DEVICE="1").succeed())
    plain, offloaded = ([[*map(of_step, run.lines(0))], validation_losses(run)] for run in runs)
    assert len(plain[0]) == 3 and plain == offloaded


def of_step(line: dict) -> dict:
    return {key: value for key, value in line.items() if key != "pid"}


# A model for GPUs, large enough for copies and layers to run at the same time.

GPU_N, GPU_DIM, GPU_LAYERS = 16384, 1024, 8
INPUT_BYTES = GPU_N * GPU_DIM * 2
# Clock cycles, about 10 ms: several layers run in that time, or many copies are made.
LONG = 20_000_000


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask for deterministic algorithms, as errors: warnings leave attention's backward as it is.

    This also fills new memory with NaN, which shows where something is read before it is written.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@cache
def large(compiled: bool, dense_layers: tuple[int, ...] = ()) -> LighthouseTransformer:
    torch.manual_seed(0)
    args = LighthouseModelArgs(
        dim=GPU_DIM, n_layers=GPU_LAYERS, n_heads=8, ffn_dim_multiplier=0.5625, vocab_size=320,
        max_seq_len=GPU_N, lighthouse=LighthouseConfig(3, 4, 256), dense_layers=[*dense_layers],
    )  # fmt: skip
    model = LighthouseTransformer(args).cuda()
    with torch.no_grad():
        model.init_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    for part in model.modules():
        if hasattr(part, "sdpa_backends"):
            part.sdpa_backends = [SDPBackend.FLASH_ATTENTION]
    apply_lighthouse_checkpoint(model, ActivationCheckpoint(mode="lighthouse"))
    if compiled:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        compile_blocks(model, "inductor")
    return model


both = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@pytest.mark.gpu
@both
def test_steps_on_a_gpu_are_the_same_bits(compiled: bool, repeatable: None) -> None:
    """Steps equal those of two runs without offloading, which must agree with each other first."""
    model = large(compiled, dense_layers=(0, GPU_LAYERS - 1))
    tokens = batches(GPU_N, 320, "cuda")
    expected = trained(model, tokens)
    assert same_bits(expected, trained(model, tokens)), "not repeatable without offloading"
    pinned = []
    with offloading(model) as offload:

        def after_step() -> None:
            allocations = torch.cuda.host_memory_stats()["num_host_alloc"]
            pinned.append((allocations, *(x.host.data_ptr() for x in offload.inputs)))

        assert same_bits(expected, trained(model, tokens, after_step))
        assert all(x.host.is_pinned() for x in offload.inputs)
        assert all(x.device is None for x in offload.inputs)
    assert pinned == pinned[:1] * STEPS


@pytest.mark.gpu
@both
def test_device_memory_is_less_by_the_inputs(compiled: bool) -> None:
    """Between forward and backward one input is left; at the peak, in backward, two are."""
    model = large(compiled)
    tokens = batches(GPU_N, 320, "cuda")[0, 0]

    def measure() -> tuple[int, int]:
        for _ in range(2):
            # Gradients are kept, so that each layer's backward needs the same memory.
            torch.cuda.reset_peak_memory_stats()
            loss = loss_of(model, tokens)
            kept = torch.cuda.memory_stats()["requested_bytes.all.current"]
            loss.backward()
            del loss
        return kept, torch.cuda.memory_stats()["requested_bytes.all.peak"]

    kept, peak = measure()
    with offloading(model):
        kept_less, peak_less = measure()
    assert kept - kept_less == (GPU_LAYERS - 1) * INPUT_BYTES
    saved = GPU_LAYERS - module.INPUTS_ON_DEVICE
    # The peak may move to another moment, one input more or less.
    assert abs(peak - peak_less - saved * INPUT_BYTES) <= INPUT_BYTES


@contextmanager
def slow_layers(model: nn.Module, offload: LayerInputOffload) -> Iterator[None]:
    """Delay the layers, so that copies which do not wait for them come too early."""

    def sleep(*_: object) -> None:
        torch.cuda._sleep(LONG)

    def after_forward(layer: nn.Module, arguments: tuple, out: torch.Tensor) -> None:
        sleep()
        if out.requires_grad:
            out.register_hook(sleep)

    handles = [layer.register_forward_hook(after_forward) for layer in model.layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def slow_copies(model: nn.Module, offload: LayerInputOffload) -> Iterator[None]:
    """Delay the copies, so that memory which is not held for them is reused too early."""
    copy = offload._copy

    def slow(target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(offload.copies):
            torch.cuda._sleep(LONG)
        copy(target, source)

    with patch.object(offload, "_copy", slow):
        yield


@pytest.mark.gpu
@both
@pytest.mark.parametrize("slow", [slow_layers, slow_copies])
def test_no_timing_changes_a_bit(compiled: bool, slow: Callable, repeatable: None) -> None:
    """Passes of other tokens before and after, in the same memory, change nothing either."""
    model = large(compiled, dense_layers=(0, GPU_LAYERS - 1))
    rows = batches(GPU_N, 320, "cuda").flatten(0, 1)
    expected = [gradients(model, tokens) for tokens in rows]
    with offloading(model) as offload, slow(model, offload):
        for tokens, one in zip(rows, expected, strict=True):
            assert same_bits(one, gradients(model, tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("left_out", ["copies wait for compute", "compute waits for copies"])
def test_leaving_out_a_wait_is_noticed(left_out: str, repeatable: None) -> None:
    """Without either wait the test above fails: both are needed, and it is strict enough."""
    model = large(False, dense_layers=(0, GPU_LAYERS - 1))
    rows = batches(GPU_N, 320, "cuda")[0]
    expected = [gradients(model, tokens) for tokens in rows]
    with offloading(model) as offload:
        # Creates the stream and the buffers.
        gradients(model, rows[0])
        if left_out == "copies wait for compute":
            slow, broken = slow_layers, patch.object(offload.copies, "wait_stream", lambda _: None)
        else:
            slow, broken = slow_copies, patch.object(offload, "_wait_for_copies", lambda: None)
        found = []
        with slow(model, offload), broken:
            for tokens in rows:
                found.append(gradients(model, tokens))
                # No copy may come so late that it overwrites what the next pass selects.
                torch.cuda.synchronize()
    assert not any(map(same_bits, expected, found))
