"""Attention over a window by FlashAttention 4: the choice, messages, and how it is called."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import relative_error

from lighthouse import window
from lighthouse.implementation import choose_window_implementation as choose
from lighthouse.kernels import flash4

HEAD = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (1, 1, 1, 64), "device": "cuda:0"}


def head(**changes: Any) -> Any:
    """A tensor on a GPU, as far as the choice looks at one."""
    return SimpleNamespace(**HEAD | changes)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that installs a package of the name, a version and an interface for this test."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    # Anew for each test.
    monkeypatch.setattr(flash4, "_functions", flash4._functions.__wrapped__)

    def add(version: str, interface: str) -> None:
        note = tmp_path / f"flash_attn_4-{version}.dist-info/METADATA"
        code = tmp_path / "flash_attn/cute/interface.py"
        for file, text in (
            (note, f"Metadata-Version: 2.4\nName: flash-attn-4\nVersion: {version}\n"),
            (code, interface),
        ):
            file.parent.mkdir(parents=True)
            file.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    return add


@pytest.fixture
def absent(install, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise flash4.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(flash4.metadata, "version", version)


WHOLE = "def _flash_attn_fwd(): ...\ndef _flash_attn_bwd(): ...\n"


def test_is_the_default_where_it_is_installed_and_computes(install) -> None:
    install(flash4.LEAST_VERSION, WHOLE)
    assert choose(None, head()) == choose("flash4", head()) == "flash4"
    assert choose("triton", head()) == choose(None, head(dtype=torch.float32)) == "triton"
    assert choose("torch", head()) == choose(None, head(dtype=torch.float64)) == "torch"
    assert choose(None, head(shape=(1, 1, 8, 320))) == "torch"
    assert choose(None, head(is_cuda=False)) == "torch"


@pytest.mark.parametrize("generation", [8, 10, 12])
def test_other_gpus_keep_our_kernel(install, monkeypatch, generation: int) -> None:
    """Even where the package is broken: it is not looked for."""
    install("4.0.0b2", "raise OSError")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    assert choose(None, head()) == "triton"
    with pytest.raises(ValueError, match=f'for Hopper GPUs, .*got {generation}.x; pass impl="tr'):
        choose("flash4", head())


def test_head_dimensions_with_wrong_gradients_keep_our_kernel(install) -> None:
    install(flash4.LEAST_VERSION, WHOLE)
    assert choose(None, head(shape=(1, 1, 8, 40))) == "triton"
    with pytest.raises(ValueError, match=r"is right for head dimensions of \(32, .*got 40; pass"):
        choose("flash4", head(shape=(1, 1, 8, 40)))


def test_absent_package(absent) -> None:
    assert choose(None, head()) == "triton"
    with pytest.raises(ImportError, match="which is not installed: pip install 'flash-attn-4"):
        choose("flash4", head())
    with pytest.raises(ValueError, match="FlashAttention 4 computes bfloat16 and float16, got"):
        choose("flash4", head(dtype=torch.float32))


@pytest.mark.parametrize(
    ("version", "interface", "message"),
    [
        ("4.0.0b9", WHOLE, "flash-attn-4 4.0.0b9 is older than 4.0.0b36, .*: pip install"),
        ("4.0.0", "raise OSError('no libcuda')", r"cannot be used \(OSError: no libcuda\); inst"),
        ("4.1", "import absent_one", "cannot be used .ModuleNotFoundError: .*install it anew: pip"),
        ("4.1", "def _flash_attn_fwd(): ...", "cannot be used .AttributeError: .*_flash_attn_bwd"),
    ],
)
@pytest.mark.parametrize("impl", [None, "flash4"])
def test_broken_package_is_no_absent_one(install, impl, version, interface, message) -> None:
    install(version, interface)
    with pytest.raises(ImportError, match=f"{message}.*or remove it with pip uninstall"):
        choose(impl, head())


def test_extra_installs_what_the_code_asks_for() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"{flash4.REQUIREMENT}' in text


def stand_in_forward(q, k, v, *, softmax_scale, causal, window_size_left, window_size_right,
                     return_lse):  # fmt: skip
    """As FlashAttention 4's: rows [B, N, H, D], and five results."""
    assert causal and return_lse and window_size_right == 0 and window_size_left + 1 < q.shape[1]
    rows = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out, lse = torch.ops.lighthouse.window(*rows, window_size_left + 1, softmax_scale)
    return out.transpose(1, 2).contiguous(), lse, None, None, None


def stand_in_backward(q, k, v, out, dout, lse, *, dlse, deterministic, softmax_scale, causal,
                      window_size_left, window_size_right):  # fmt: skip
    assert deterministic and causal and window_size_right == 0
    assert lse.is_contiguous() and (dlse is None or dlse.is_contiguous())
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v, out)]
    grads = torch.ops.lighthouse.window_backward(
        dout.transpose(1, 2), dlse, *rows, lse, window_size_left + 1, softmax_scale
    )
    # Gradients lie in memory as their tensors.
    pairs = zip(grads, (q, k, v), strict=True)
    return tuple(torch.empty_like(x).copy_(grad.transpose(1, 2)) for grad, x in pairs)


@pytest.mark.parametrize("sequence_first", [True, False])
def test_is_called_as_it_should(monkeypatch: pytest.MonkeyPatch, sequence_first: bool) -> None:
    """Forward and backward, with gradients of the logsumexp, in one operation each."""
    functions = stand_in_forward, stand_in_backward
    monkeypatch.setattr(flash4, "_functions", lambda: functions)
    torch.manual_seed(0)
    rows = [torch.randn(2, 40, h, 8) for h in (4, 2, 2, 4)]
    *inputs, grad = (x.transpose(1, 2) for x in rows)
    if not sequence_first:
        inputs = [x.contiguous() for x in inputs]
    grad_lse = torch.randn(4, 40).expand(2, 4, 40)

    def run(attend: Callable[..., Any]) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = attend(*leaves)
        torch.autograd.backward((out, lse), (grad, grad_lse))
        return [out.detach(), lse.detach(), *(x.grad for x in leaves)]

    def attend(impl: str) -> Callable[..., Any]:
        return lambda *x: window._WindowAttention.apply(*x, 7, 0.5, impl, True)

    expected = run(attend("torch"))
    compiled = torch.compile(attend("flash4"), fullgraph=True, backend="aot_eager")
    for function in (attend("flash4"), compiled):
        for value, want in zip(run(function), expected, strict=True):
            assert relative_error(value, want) < 1e-6
    out, lse = expected[:2]
    operations = torch.ops.lighthouse
    torch.library.opcheck(operations.flash4_window.default, (*inputs, 7, 0.5))
    for each in (None, grad_lse):
        torch.library.opcheck(
            operations.flash4_window_backward.default, (grad, *inputs, out, lse, each, 7, 0.5)
        )


def test_window_of_the_whole_sequence_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gathered sequence too, in both directions."""
    calls: list[Any] = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(flash4, f"window_{name}", lambda *x, name=name: calls.append((name, x)))
    q = torch.empty(1, 1, 8, 8)
    forward, backward = window.operations_by("flash4")
    for size in (8, 9):
        forward(q, q, q, size, 0.5)
        backward(q, None, q, q, q, q, q[..., 0], size, 0.5)
    assert [name for name, _ in calls] == ["forward", "backward"] * 2
    assert [len(x) for _, x in calls] == [5, 9] * 2


def test_compiler_takes_the_choice_as_it_is(install) -> None:
    """Traced whole, although the choice reads a package's metadata."""
    install(flash4.LEAST_VERSION, WHOLE)

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if flash4.flash4_is_installed() and flash4._generation(x.device) == 9 else x

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [2, 2]
