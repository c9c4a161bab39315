"""Denormal numbers, which processors are slow at: update loops take them for zero, on x86-64.

A moment that decays without gradients would end there: below 1.2e-38 in float32. It now ends where what it would lose is
denormal, or at zero. The flags are the thread's, so a loop sets
them when it begins and leaves them as they were. On other processors denormal numbers stay what they are.
"""

import platform
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

ZERO = 0x8040  # of MXCSR, the control register of SSE and AVX: denormal results, and denormal inputs


@intrinsic
def _flush_x86(typing_context: Any) -> Any:
    """Take denormal numbers for zero in this thread; returns what was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        before = _stored(builder)
        _load(builder, builder.or_(before, ir.Constant(ir.IntType(32), ZERO)))
        return before

    return types.uint32(), generate


@intrinsic
def _restore_x86(typing_context: Any, before: Any) -> Any:
    """Take them as before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _load(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.uint32), generate


@njit(error_model="numpy")
def _nothing() -> Any:
    return 0


@njit(error_model="numpy")
def _nothing_to_restore(before: Any) -> None:
    pass


def _stored(builder: Any) -> Any:
    place = builder.alloca(ir.IntType(32))
    _call(builder, "llvm.x86.sse.stmxcsr", place)
    return builder.load(place)


def _load(builder: Any, value: Any) -> None:
    place = builder.alloca(ir.IntType(32))
    builder.store(value, place)
    _call(builder, "llvm.x86.sse.ldmxcsr", place)


def _call(builder: Any, name: str, place: Any) -> None:
    byte_pointer = ir.IntType(8).as_pointer()
    function = builder.module.declare_intrinsic(name, fnty=ir.FunctionType(ir.VoidType(), [byte_pointer]))
    builder.call(function, [builder.bitcast(place, byte_pointer)])


IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
flush, restore = (_flush_x86, _restore_x86) if IS_X86 else (_nothing, _nothing_to_restore)
