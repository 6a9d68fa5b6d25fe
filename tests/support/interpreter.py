"""Triton's interpreter without work that it repeats, which was most of its time.

The interpreter puts its own versions of the language's functions in place when a kernel starts, and
again each time a kernel calls another function. Once a kernel is enough for each set of modules.

It also describes the type and the shape of every value anew, although few differ, converts operands
that agree, repeats each constant for each block, and computes whether integers overflow for an
assertion that it makes only when it debugs.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def speed_up_interpreter() -> None:
    """Let the interpreter of this process leave out what it repeats or does not use."""
    # There is no Triton for macOS.
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    prepare_language_once(interpreter)
    describe_types_once(interpreter)
    describe_shapes_once()
    combine_agreeing_operands_at_once()
    options = interpreter.interpreter_builder.options
    # Without ``debug``, nothing reads whether integers overflowed.
    if not options.debug:
        options = dataclasses.replace(options, sanitize_overflow=False)
        interpreter.interpreter_builder.options = options


def prepare_language_once(interpreter: ModuleType) -> None:
    """Prepare the language once for each launch."""
    from triton import language

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


def describe_types_once(interpreter: ModuleType) -> None:
    """Remember the types of numpy, and the types of blocks by their elements and shapes."""
    from triton.language import core

    numpy_type, describe = interpreter._get_np_dtype, core.block_type.__init__
    translate = core.block_type.to_ir
    numpy_types: dict[str, Any] = {}
    blocks: dict[tuple[Any, str], dict[str, Any]] = {}
    # Texts of the shapes that ``blocks`` keeps, by identity.
    texts: dict[int, str] = {}

    @functools.wraps(numpy_type)
    def remembered_numpy_type(each: Any) -> Any:
        if type(each) is core.block_type:
            each = each.element_ty
        # The name says all about a type, unless that is a pointer.
        if type(each) is not core.dtype:
            return numpy_type(each)
        if each.name not in numpy_types:
            numpy_types[each.name] = numpy_type(each)
        return numpy_types[each.name]

    @functools.wraps(describe)
    def describe_once(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is core.dtype:
            element = element_ty.name
        elif type(element_ty) is core.pointer_type:
            element = element_ty.name, element_ty.address_space
        else:
            describe(self, element_ty, shape)
            return
        # The text tells 2.0 from 2: only one of them is a length.
        key = element, texts.get(id(shape)) or repr(list(shape))
        if key not in blocks:
            describe(self, element_ty, shape)
            blocks[key] = dict(vars(self))
            texts[id(self.shape)] = key[1]
        vars(self).update(blocks[key])

    @functools.wraps(translate)
    def unchanged(self: Any, builder: Any) -> Any:
        # The interpreter's types are the language's own.
        return self

    interpreter._get_np_dtype = remembered_numpy_type
    core.block_type.__init__ = describe_once
    core.block_type.to_ir = unchanged


def describe_shapes_once() -> None:
    """Let values of one shape share what describes it; kernels cannot change it."""
    from triton.language import core

    describe = core.tensor.__init__
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    @functools.wraps(describe)
    def describe_once(self: Any, handle: Any, type: Any) -> None:
        lengths = tuple(type.shape) if type.is_block() else ()
        if lengths not in shapes:
            describe(self, handle, type)
            shapes[lengths] = self.numel, self.shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[lengths]

    core.tensor.__init__ = describe_once


def combine_agreeing_operands_at_once() -> None:
    """Convert neither operand when types agree, and a constant once for all blocks of a shape.

    Values of one shape share what describes it, so that identity tells whether shapes agree.
    """
    from triton.language import core, semantic

    combine = semantic.TritonSemantic.binary_op_type_checking_impl
    spread = semantic.TritonSemantic.broadcast_impl_value
    constants: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(spread)
    def spread_if_needed(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
        return (left, right) if left.shape is right.shape else spread(self, left, right)

    @functools.wraps(combine)
    def combine_at_once(
        self: Any, left: Any, right: Any, *options: bool, **named: bool
    ) -> tuple[Any, Any]:
        if named:
            return combine(self, left, right, *options, **named)
        # Two options let an operand be a pointer; only divisions have more, and convert both.
        if type(left) is core.tensor and type(left.dtype) is core.dtype:
            if type(right) is core.tensor and left.dtype is right.dtype and len(options) < 3:
                return spread_if_needed(self, left, right)
            if type(right) in (int, float):
                key = left.dtype.name, id(left.shape), type(right), right, options
                if key not in constants:
                    converted, constant = combine(self, left, right, *options)
                    if converted is not left:
                        return converted, constant
                    constants[key] = constant
                return left, constants[key]
        return combine(self, left, right, *options)

    semantic.TritonSemantic.binary_op_type_checking_impl = combine_at_once
    semantic.TritonSemantic.broadcast_impl_value = spread_if_needed
