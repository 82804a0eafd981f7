"""What the compiled code asks of the machine and Python has no words for: raw memory, atomic counters, a BLAS by address.

numba compiles these into single instructions.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ....dropout import FACTORS

BARE = {
    "error_model": "numpy",  # no division by zero is looked for
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "no_rewrites": True,  # of constants and branches: there is nothing to rewrite, and looking for it takes time
}
PLAIN = {**BARE, "fastmath": {"contract"}}  # a product and a sum in one rounding; NaN and infinity do what they always do
INLINE = {**PLAIN, "forceinline": True}  # a loop that calls is not made of vector instructions
SUMS = {**BARE, "fastmath": {"contract", "reassoc"}}  # sums in vectors: the same order each time
"""How the functions here are compiled."""

WHOLE = True
"""Whether all layers are compiled, or `Linear` and `ReLU` only: `building` sets it before anything else here is imported."""


def rarely(function):
    """Compile what models of more than Linear and ReLU need; for others, put in its place what does nothing."""
    return njit(**PLAIN)(function if WHOLE else lambda *_: None)


FLOAT64, INT64 = np.float64(0), np.int64(0)

_i8, _i32, _i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


@intrinsic
def pointer(typing, address, like):  # address -> a pointer to numbers of the type of `like`
    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), code


@intrinsic
def size_of(typing, like):  # in bytes
    def code(context, builder, signature, arguments):
        return ir.Constant(_i64, like.bitwidth // 8)

    return types.int64(like), code


@intrinsic
def number(typing, like, value):  # `value` in the type of `like`
    def code(context, builder, signature, arguments):
        return context.cast(builder, arguments[1], signature.args[1], signature.return_type)

    return like(like, value), code


@intrinsic
def bits(typing, x):  # the bits of a floating number, as an integer of its size
    whole = types.int32 if x == types.float32 else types.int64

    def code(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(whole))

    return whole(x), code


@intrinsic
def from_bits(typing, n, like):  # the floating number of these bits
    whole = types.int32 if like == types.float32 else types.int64

    def code(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(like))

    return like(whole, like), code


@intrinsic
def either(typing, condition, x, y):  # `x` if the condition holds, else `y`: both are computed, so there is no branch
    def code(context, builder, signature, arguments):
        return builder.select(cgutils.is_true(builder, arguments[0]), arguments[1], arguments[2])

    return x(types.boolean, x, x), code


@intrinsic
def kept(typing, i, a, b, threshold):  # whether element `i` of a mask with the key `a`, `b` is kept, as `dropout` says
    def code(context, builder, signature, arguments):
        x, a, b, threshold = (builder.trunc(argument, _i32) for argument in arguments)

        def half(x):
            for shift, factor in zip((16, 15), FACTORS, strict=True):
                x = builder.mul(builder.xor(x, builder.lshr(x, ir.Constant(_i32, shift))), ir.Constant(_i32, factor))
            return x

        x = half(builder.xor(half(builder.add(x, a)), b))
        return builder.icmp_unsigned(">=", builder.lshr(x, ir.Constant(_i32, 8)), threshold)

    return types.boolean(types.int64, types.int64, types.int64, types.int64), code


@intrinsic
def atomic_add(typing, address, value):  # adds to the int64 there; what was there before
    def code(context, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _i64.as_pointer()), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), code


@intrinsic
def atomic_load(typing, address):
    def code(context, builder, signature, arguments):
        return builder.load_atomic(builder.inttoptr(arguments[0], _i64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), code


@intrinsic
def atomic_store(typing, address, value):
    def code(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], _i64.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def call(typing, function, a, b):  # the C function `int f(void*, void*)` at an address
    def code(context, builder, signature, arguments):
        kind = ir.FunctionType(_i32, [_i64, _i64])
        target = builder.inttoptr(arguments[0], kind.as_pointer())
        return builder.sext(builder.call(target, arguments[1:]), _i64)

    return types.int64(types.int64, types.int64, types.int64), code


@intrinsic
def product(typing, function, wide, ta, tb, m, n, k, A, lda, B, ldb, like, beta, C, ldc):
    """`C = op(A) op(B) + beta C` by the `cblas_?gemm` at the address `function`, whose integers are of 64 bits if `wide`.

    The arrays are given by their addresses, row after row, `ldx` elements apart; `t` is 112 for transposed, 111 for not.
    """
    whole = types.int64
    signature = types.void(
        whole, whole, whole, whole, whole, whole, whole, whole, whole, whole, whole, like, like, whole, whole
    )

    def code(context, builder, signature, arguments):
        function, wide, ta, tb, m, n, k, A, lda, B, ldb, _, beta, C, ldc = arguments
        real = context.get_value_type(like)

        def called(integer):
            kind = ir.FunctionType(
                ir.VoidType(),
                [_i32, _i32, _i32, integer, integer, integer, real, _i64, integer, _i64, integer, real, _i64, integer],
            )
            target = builder.inttoptr(function, kind.as_pointer())

            def size(x):
                return x if integer is _i64 else builder.trunc(x, integer)

            builder.call(
                target,
                [
                    ir.Constant(_i32, 101), builder.trunc(ta, _i32), builder.trunc(tb, _i32), size(m), size(n), size(k),
                    ir.Constant(real, 1.0), A, size(lda), B, size(ldb), beta, C, size(ldc),
                ],
            )  # fmt: skip

        with builder.if_else(cgutils.is_true(builder, wide)) as (then, otherwise):
            with then:
                called(_i64)
            with otherwise:
                called(_i32)
        return context.get_dummy_value()

    return signature, code


def _triple():
    from llvmlite.binding import get_process_triple

    return get_process_triple().partition("-")[0]


@intrinsic
def relax(typing):  # tells the processor that this is a loop that waits
    def code(context, builder, signature, arguments):
        if _triple() == "x86_64":
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        elif _triple() in ("aarch64", "arm64"):
            kind = ir.FunctionType(ir.VoidType(), [_i32])
            hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint")
            builder.call(hint, [ir.Constant(_i32, 1)])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def flush_denormals(typing):  # numbers below the smallest normal one are 0 from now on, in this thread; the mode before
    def code(context, builder, signature, arguments):
        if _triple() == "x86_64":
            slot = cgutils.alloca_once(builder, _i32)
            pointer = builder.bitcast(slot, _i8.as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [_i8.as_pointer()])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.stmxcsr"), [pointer])
            before = builder.load(slot)
            builder.store(builder.or_(before, ir.Constant(_i32, 0x8040)), slot)
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.ldmxcsr"), [pointer])
            return builder.zext(before, _i64)
        if _triple() in ("aarch64", "arm64"):
            get = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_i64, []), "llvm.aarch64.get.fpcr")
            put = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [_i64]), "llvm.aarch64.set.fpcr"
            )
            before = builder.call(get, [])
            builder.call(put, [builder.or_(before, ir.Constant(_i64, 1 << 24))])
            return before
        return ir.Constant(_i64, 0)

    return types.int64(), code


@intrinsic
def restore_denormals(typing, before):
    def code(context, builder, signature, arguments):
        if _triple() == "x86_64":
            slot = cgutils.alloca_once(builder, _i32)
            builder.store(builder.trunc(arguments[0], _i32), slot)
            kind = ir.FunctionType(ir.VoidType(), [_i8.as_pointer()])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.ldmxcsr")
            builder.call(function, [builder.bitcast(slot, _i8.as_pointer())])
        elif _triple() in ("aarch64", "arm64"):
            put = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [_i64]), "llvm.aarch64.set.fpcr"
            )
            builder.call(put, [arguments[0]])
        return context.get_dummy_value()

    return types.void(types.int64), code
