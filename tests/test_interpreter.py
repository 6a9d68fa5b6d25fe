"""The interpreter leaves out work that it repeats, and runs kernels as before."""

import dataclasses
import os
from collections.abc import Callable

import pytest
import torch
from attention_cases import output_and_gradients, random_inputs
from interpreter import prepare_language_once

from lighthouse import LighthouseConfig, lighthouse_attention, select

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU runs the kernels"
)


def test_language_is_prepared_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a launch sees ``tl``, and its call of ``tl.sum`` sees ``tl.core`` too."""
    prepared: list[Callable] = []
    launches = []
    as_shipped = interpreter._patch_lang.__wrapped__
    execute = interpreter.GridExecutor.__call__.__wrapped__

    def watched(function: Callable) -> object:
        prepared.append(function)
        return as_shipped(function)

    def executed(self: object, *arguments: object, **options: object) -> None:
        launches.append(self)
        execute(self, *arguments, **options)

    config = LighthouseConfig(3, 2, 16, picks_per_stratum=4)
    case = dict(n=64, batch=1, heads=2, kv_heads=1, tied=True, seed=0)
    inputs = random_inputs(case, torch.float32, 16)
    monkeypatch.setattr(interpreter, "_patch_lang", watched)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", executed)
    slowly = select(*inputs, config, impl="triton")
    assert len(prepared) > 20 * len(launches) > 0
    prepare_language_once(interpreter)
    prepared.clear()
    launches.clear()
    quickly = select(*inputs, config, impl="triton")
    assert 0 < len(launches) <= len(prepared) <= 2 * len(launches)
    assert torch.equal(quickly.index, slowly.index) and torch.equal(quickly.slot, slowly.slot)


def test_kernels_compute_as_they_do_by_the_interpreter_as_shipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LighthouseConfig(2, 2, 8, picks_per_stratum=4, combine="finest", window=3)
    case = dict(n=40, batch=1, heads=2, kv_heads=1, tied=True, seed=0)
    inputs = random_inputs(case, torch.bfloat16, 16)
    grad = torch.randn(inputs[0].shape).bfloat16()

    def results() -> list[torch.Tensor]:
        attended = output_and_gradients(lighthouse_attention, inputs, grad, config, impl="triton")
        return [*attended, *select(*inputs, config, impl="triton")]

    quickly = results()
    described: list[object] = []
    core, semantic = interpreter.tl.core, type(interpreter.interpreter_semantic)
    quicker = (
        (interpreter, "_get_np_dtype"), (core.tensor, "__init__"),
        (core.block_type, "__init__"), (core.block_type, "to_ir"),
        (semantic, "binary_op_type_checking_impl"), (semantic, "broadcast_impl_value"),
    )  # fmt: skip
    for owner, name in quicker:
        as_shipped = getattr(owner, name).__wrapped__

        def watched(*arguments: object, as_shipped: Callable = as_shipped) -> object:
            described.append(as_shipped)
            return as_shipped(*arguments)

        monkeypatch.setattr(owner, name, watched)
    builder = interpreter.interpreter_builder
    assert not builder.options.sanitize_overflow and not builder.options.debug
    checked = dataclasses.replace(builder.options, sanitize_overflow=True)
    monkeypatch.setattr(builder, "options", checked)
    slowly = results()
    assert len(set(described)) == len(quicker)
    assert all(map(torch.equal, quickly, slowly))


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [([3], ValueError, "power of 2"), ([2.0], TypeError, "int"), ([], TypeError, "0d")],
)
def test_shapes_that_no_block_has_are_refused_each_time(
    lengths: list, error: type, message: str
) -> None:
    core = interpreter.tl.core
    assert list(core.block_type(core.float32, [2]).shape) == [2]
    for _ in range(2):
        with pytest.raises(error, match=message):
            core.block_type(core.float32, lengths)


def test_a_number_takes_the_type_and_the_shape_of_the_block_beside_it() -> None:
    core, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    divided = False, False, True, True
    for _ in range(2):
        for kind, length in ((core.int32, 4), (core.int64, 4), (core.float16, 4), (core.int32, 8)):
            block = semantic.full([length], 1, kind)
            left, right = semantic.binary_op_type_checking_impl(block, 2)
            assert left is block and right.type == block.type
            assert right.handle.data.tolist() == [2] * length
            both = semantic.binary_op_type_checking_impl(block, 2, *divided)
            expected = core.float32 if kind is core.float16 else kind
            assert [each.dtype for each in both] == [expected] * 2
