"""The interpreter prepares Triton's language once a launch, and runs kernels as before."""

import os
from collections.abc import Callable

import pytest
import torch
from attention_cases import random_inputs
from interpreter import prepare_language_once

from lighthouse import LighthouseConfig, select

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
    prepare_language_once()
    prepared.clear()
    launches.clear()
    quickly = select(*inputs, config, impl="triton")
    assert 0 < len(launches) <= len(prepared) <= 2 * len(launches)
    assert torch.equal(quickly.index, slowly.index) and torch.equal(quickly.slot, slowly.slot)
