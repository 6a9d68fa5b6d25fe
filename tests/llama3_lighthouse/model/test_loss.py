"""The loss in chunks of tokens, against float64 and against the loss of whole logits."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import SMALL, arguments
from small_model import build as build_small
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.components.loss import IGNORE_INDEX, cross_entropy_loss
from torchtitan.models.llama3 import Transformer

from lighthouse import LighthouseConfig
from torchtitan.models.llama3_lighthouse.checks.configuration import check_config
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.memory_estimate import head_bytes
from torchtitan.models.llama3_lighthouse.model import cross_entropy_kernel, linear_cross_entropy
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.loss import build_loss, is_chunked
from torchtitan.models.llama3_lighthouse.model.model import (
    LighthouseModelArgs,
    LighthouseTransformer,
)

# A vocabulary that is no multiple of a kernel's block, and a chunk that does not divide T.
B, N, DIM, V, CHUNK = 2, 45, 32, 300, 16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COMPILED = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled for the GPU, not the CPU")
KERNEL_DEVICES = [pytest.param("cpu", marks=COMPILED), DEVICES[1]]
# Precision of parameters and products; under autocast, parameters are in float32.
PRECISIONS = ["float32", "bfloat16", "autocast"]


def configuration(**settings: Any) -> JobConfig:
    return LighthouseConfigManager().parse_args(arguments({**SMALL, **settings}))


def problem(device: str, precision: str = "float32") -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    hidden = torch.randn(B, N, DIM, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(V, DIM, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(0, V, (B, N), generator=generator)
    labels[0, :5] = labels[1, 20:40] = IGNORE_INDEX
    return hidden, weight, labels.to(device)


def exact(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float
) -> list[torch.Tensor]:
    """Loss and both gradients of the same inputs in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.T).flatten(0, 1)
    loss = cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    (loss * scale).backward()
    return [loss.detach(), hidden.grad, weight.grad]


def errors(function: Callable, precision: str, device: str) -> list[float]:
    """Largest error of the loss and of each gradient, relative to its largest value."""
    hidden, weight, labels = problem(device, precision)
    scale = 1 / 77
    with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
        loss = function(hidden, weight, labels)
    (loss * scale).backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == hidden.dtype and weight.grad.dtype == weight.dtype
    want = exact(hidden, weight, labels, scale)
    got = [loss.detach(), hidden.grad, weight.grad]
    return [((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True)]


def whole(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy_loss(torch.nn.functional.linear(hidden, weight), labels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("chunk", [1, CHUNK, B * N, 1000])
def test_errors_are_those_of_whole_logits(device: str, precision: str, chunk: int) -> None:
    def chunked(*inputs: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy.linear_cross_entropy(*inputs, chunk)

    ours, theirs = errors(chunked, precision, device), errors(whole, precision, device)
    epsilon = torch.finfo(torch.float32).eps
    for mine, plain, factor in zip(ours, theirs, (1.1, 1.5, 1.1), strict=True):
        # The hidden states' gradient in bfloat16 is rounded twice, before scaling and after it.
        assert mine <= factor * plain + 4 * epsilon


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("module", [cross_entropy_kernel, linear_cross_entropy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("differentiate", [True, False])
def test_rows_against_float64(
    device: str, module: ModuleType, dtype: torch.dtype, differentiate: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, columns = 5, 4999
    logits = (8 * torch.randn(tokens, columns, generator=generator)).to(device, dtype)
    # Far above the others, so that the running sum has to be rescaled.
    logits[1, 4500] = 300
    logits[2] -= 1000
    labels = torch.tensor([3, 4998, 0, IGNORE_INDEX, 4097], device=device)
    exact = logits.double().requires_grad_()
    expected = cross_entropy(exact, labels, reduction="none", ignore_index=IGNORE_INDEX)
    expected.sum().backward()

    gradient = logits.clone()
    losses = torch.full((tokens,), float("nan"), device=device)
    module.cross_entropy_(gradient, labels, losses, differentiate)
    # PyTorch rounds the logsumexp of the row that was shifted to an ulp of 1000.
    close = 1e-4 if module is linear_cross_entropy else 2e-6
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=close)
    assert losses[3] == 0
    if differentiate:
        # Triton's interpreter truncates to bfloat16 where a GPU rounds.
        rounding = torch.finfo(dtype).eps / (1 if device == "cpu" else 2) + close
        torch.testing.assert_close(gradient.double(), exact.grad, rtol=rounding, atol=1e-7)
        assert gradient[3].count_nonzero() == 0
    else:
        assert torch.equal(gradient, logits)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_label_beyond_the_vocabulary_gives_no_number(device: str) -> None:
    logits, label, losses = torch.zeros(1, 10), torch.tensor([10]), torch.zeros(1)
    logits, label, losses = (x.to(device) for x in (logits, label, losses))
    cross_entropy_kernel.cross_entropy_(logits, label, losses, False)
    assert losses.isnan().all()


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest result and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        self.products += "mm" in str(function)
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_never_holds_all_logits_and_multiplies_thrice() -> None:
    hidden, weight, labels = problem("cpu")
    with LargestTensor() as seen:
        linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, CHUNK).backward()
    assert seen.elements == max(weight.numel(), CHUNK * V) < B * N * V
    chunks = -(-B * N // CHUNK)
    assert seen.products == 3 * chunks
    with LargestTensor() as seen, torch.no_grad():
        linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, CHUNK)
    assert seen.products == chunks


def test_validation_has_the_loss_of_training() -> None:
    hidden, weight, labels = problem("cpu")
    training = linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, CHUNK)
    with torch.no_grad():
        validation = linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, CHUNK)
    assert training.requires_grad and not validation.requires_grad
    assert torch.equal(training, validation)


def test_second_backward_is_refused() -> None:
    loss = linear_cross_entropy.linear_cross_entropy(*problem("cpu"))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_buffer_is_a_gibibyte() -> None:
    assert linear_cross_entropy.tokens_per_chunk(128256, 2) == 4096
    assert linear_cross_entropy.tokens_per_chunk(128256, 4) == 2048
    assert linear_cross_entropy.tokens_per_chunk(2**31, 4) == 1


SIZE = dict(dim=64, n_layers=2, n_heads=4, vocab_size=V, max_seq_len=64, dense_layers=[0])
METHOD = LighthouseConfig(levels=2, pooling_factor=2, top_k=16, picks_per_stratum=8)


def build(chunked: bool) -> LighthouseTransformer:
    return build_small(args=LighthouseModelArgs(**SIZE, lighthouse=METHOD, chunked_loss=chunked))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(0, V, (3, 2, 1, 64), generator=generator))


def test_model_is_the_same_llama() -> None:
    chunked, plain = build(True), build(False)
    with torch.device("meta"):
        names = list(Transformer(plain.model_args).state_dict())
    assert list(chunked.state_dict()) == list(plain.state_dict()) == names
    for name, value in plain.state_dict().items():
        assert torch.equal(chunked.state_dict()[name], value), name
    hidden, weight = chunked(batches()[0][0])
    assert torch.equal(hidden @ weight.T, plain(batches()[0][0]))


def test_gradients_accumulate_over_microbatches() -> None:
    loss_function = build_loss(configuration())
    models = [build(True), build(False)]
    for tokens, labels in batches():
        losses = [loss_function(model(tokens), labels) / 192 for model in models]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        for loss in losses:
            loss.backward()
    for mine, plain in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("error:FSDP2-wrapped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp_gathers_and_reduces_the_weight(dtype: torch.dtype) -> None:
    """Validation and training take turns, with FSDP applied to torchtitan's groups of modules."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        loss_function = build_loss(configuration())
        gradients = []
        for chunked in (True, False):
            model = build(chunked)
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            fully_shard([model.norm, model.output], mp_policy=policy, reshard_after_forward=False)
            fully_shard(model, mp_policy=policy)
            for tokens, labels in batches():
                with torch.no_grad():
                    validation = loss_function(model(tokens), labels)
                training = loss_function(model(tokens), labels)
                training.backward()
                assert torch.equal(training, validation)
            assert not model.output.weight._backward_hooks
            gradients.append([p.grad.full_tensor() for p in model.parameters()])
            assert model.output.weight.grad.dtype == torch.float32
    finally:
        dist.destroy_process_group()
    for mine, plain in zip(*gradients, strict=True):
        close = 1e-4 if dtype == torch.float32 else 0.05
        assert (mine - plain).norm() <= close * plain.norm()


@pytest.mark.parametrize(
    ("loss", "vocabulary", "tensor_parallel", "expected"),
    [
        ("auto", 320, 1, False),
        ("auto", 128256, 1, True),
        ("auto", 128256, 2, False),
        ("chunked", 320, 1, True),
        ("whole", 128256, 1, False),
    ],
)
def test_rule(loss: str, vocabulary: int, tensor_parallel: int, expected: bool) -> None:
    config = configuration(
        **{"lighthouse.loss": loss, "parallelism.tensor_parallel_degree": tensor_parallel}
    )
    assert is_chunked(config, vocabulary) is expected


def test_chunks_of_a_sharded_vocabulary_are_refused(tmp_path: Path) -> None:
    settings = {"lighthouse.loss": "chunked", "job.dump_folder": tmp_path}
    check_config(configuration(**settings), flavors)
    settings["parallelism.tensor_parallel_degree"] = 2
    with pytest.raises(ValueError, match="lighthouse.loss = 'chunked'.*degree = 2.*'auto'"):
        check_config(configuration(**settings), flavors)


def test_dry_run_counts_what_the_loss_holds() -> None:
    whole, chunked = (
        LighthouseModelArgs(**{**vars(flavors["530M"]), "chunked_loss": chunked})
        for chunked in (False, True)
    )
    assert head_bytes(whole, 98304) == 98304 * 128256 * 10
    assert head_bytes(chunked, 98304) < 2.1e9
