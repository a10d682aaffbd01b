# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, corrected where it differs from a GPU: bfloat16, TF32 and the order of float32 sums.

Unpatched, ``tl.dot`` multiplies bfloat16's bit patterns as if they were integers, as does other arithmetic on them, and
float32 → bfloat16 truncates instead of rounding to nearest even; TF32 products are computed in float32, and those of
float32 by NumPy, which sums in several chains. Here bfloat16 operands of a product become float32 first, conversions
round as the GPU's do, TF32 operands lose their last thirteen bits as they do there, and a float32 product is one chain
of FMAs.

Each call of a function in a kernel walks all of ``triton.language`` to replace its operations: half of the time.
Here the first call from each module does, in every launch. And each operation makes the types and shapes of its
operands and of its result anew, of Python objects for every axis: here there is one of each. Integer sums and
products are not computed once more in int64 and compared with their type's range, for an assertion that is dropped
wherever debug is off, as it always is in the interpreter: that took a fifth of the tests' time.
"""

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray, dropped: int) -> np.ndarray:
    """float32 bit patterns rounded to nearest even at bit `dropped`; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1)
    rounded = bits + half + ((bits >> np.uint32(dropped)) & np.uint32(1))
    quiet = bits | np.uint32(1 << 22)
    return np.where(np.isnan(values), quiet, rounded) & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)


def _operand(handle, input_precision) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return _to_float32(handle.data)
    if handle.dtype.scalar == tl.float32 and "TF32" in str(input_precision) and "x3" not in str(input_precision):
        return _rounded(handle.data, 13).view(np.float32)
    return handle.data


def _one_chain(a: np.ndarray, b: np.ndarray, d: np.ndarray) -> np.ndarray:
    """d + a · b in float32 as Triton compiles it: for each element one FMA after another, starting at d. (The products
    are exact in float64; that the sum is first rounded there shows in one of 2²⁹ elements.)"""
    a, b, total = a.astype(np.float64), b.astype(np.float64), d
    for k in range(a.shape[-1]):
        total = (a[..., k, None] * b[..., k, None, :] + total).astype(np.float32)
    return total


def repair() -> None:
    """Patch the interpreter, for this process."""
    builder = interpreter.InterpreterBuilder
    original_cast, original_binary = builder.cast_impl, builder.binary_op

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            src = interpreter.TensorHandle(_to_float32(src.data), tl.float32)
            return src if target == tl.float32 else original_cast(self, src, dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            values = src.data.astype(np.float32)
            return interpreter.TensorHandle((_rounded(values, 16) >> np.uint32(16)).astype(np.uint16), tl.bfloat16)
        return original_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast_impl(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.float32 and "IEEE" in str(input_precision):
            return interpreter.TensorHandle(_one_chain(a.data, b.data, d.data), tl.float32)
        product = np.matmul(_operand(a, input_precision), _operand(b, input_precision), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def binary_op(self, lhs, rhs, op):
        assert tl.bfloat16 not in (lhs.dtype.scalar, rhs.dtype.scalar), "bfloat16 arithmetic: convert to float32 first"
        return original_binary(self, lhs, rhs, op)

    builder.cast_impl, builder.create_dot, builder.binary_op = cast_impl, create_dot, binary_op
    builder.create_fp_to_fp = create_fp_to_fp
    launch, patch, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return None  # of a function's call, which drops it; a launch's own call is the first
        patched.add(id(fn.__globals__))
        return patch(fn)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_anew, patch_once
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast_impl)
    _keep_types(builder)
    _skip_dropped_assertions()


def _skip_dropped_assertions() -> None:
    """`device_assert`, to which the check for overflow comes down, does nothing without debug."""
    check = TritonSemantic.binary_op_sanitize_overflow_impl

    def check_in_debug(self, *given):
        if self.builder.options.debug:
            check(self, *given)

    TritonSemantic.binary_op_sanitize_overflow_impl = check_in_debug


def _keep_types(builder) -> None:
    original_np_dtype, np_dtypes = interpreter._get_np_dtype, {}
    original_init, shapes = tl.tensor.__init__, {}
    original_equal = tl.dtype.__eq__
    blocks: dict[tuple, tl.block_type] = {}

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = original_np_dtype(dtype)
        return np_dtypes[name]

    def get_block_ty(self, dtype, shape):
        key = (dtype.name, *shape)
        if key not in blocks:
            blocks[key] = tl.block_type(dtype, shape)
        return blocks[key]

    def with_element_ty(self, scalar_ty):
        return get_block_ty(None, scalar_ty, self.shape)

    def init(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            original_init(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def equal(self, other):
        return self is other or original_equal(self, other)

    interpreter._get_np_dtype, builder.get_block_ty, tl.tensor.__init__ = get_np_dtype, get_block_ty, init
    tl.block_type.with_element_ty, tl.dtype.__eq__ = with_element_ty, equal
