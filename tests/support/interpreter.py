"""Triton's interpreter without work that it repeats, which was nearly half of its time.

The interpreter puts its own versions of the language's functions in place when a kernel starts, and
again each time a kernel calls another function. Once a kernel is enough for each set of modules.
"""

import functools
import inspect
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


def prepare_language_once() -> None:
    """Let the interpreter of this process prepare the language once for each launch."""
    # There is no Triton for macOS.
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    prepare, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[str] = set()

    @functools.cache
    def language_of(function: Callable) -> frozenset[str]:
        """Names of the language's modules that a kernel sees, as ``_patch_lang`` finds them."""
        modules = filter(inspect.ismodule, function.__globals__.values())
        return frozenset(each.__name__ for each in modules if each in (language, language.core))

    @functools.wraps(prepare)
    def prepare_once(function: Callable) -> Any:
        modules = language_of(function)
        if modules and modules <= prepared:
            return None
        scope = prepare(function)
        prepared.update(modules)
        return scope

    @functools.wraps(execute)
    def execute_afresh(self: Any, *arguments: Any, **options: Any) -> None:
        # At its end a launch puts the language back.
        prepared.clear()
        try:
            execute(self, *arguments, **options)
        finally:
            prepared.clear()

    interpreter._patch_lang = prepare_once
    interpreter.GridExecutor.__call__ = execute_afresh
