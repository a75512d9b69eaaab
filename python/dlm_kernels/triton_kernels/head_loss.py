"""The gradients of a loss of an LM head's logits by hidden states and weight.

They take the vocabulary in chunks: of one chunk at a time the logits' gradient is written, and multiplied twice.
"""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels import head
from dlm_kernels.triton_kernels.head import grouped_block
from dlm_kernels.triton_kernels.launch import Out, concatenate, dtype_name, launch, strides
from dlm_kernels.triton_kernels.numerics import gradient_dot

CHUNK = 16384  # tokens whose logits' gradient is in memory at once


@triton.jit
def _product_kernel(
    left,  # [M, K] by its strides
    right,  # [K, N]
    seen,  # bool [K] | None; False: that row of `right` is not read and counts as zeros
    addend,  # float32 [M, N] | None
    out,  # [M, N]
    m, n, k,  # M, N, K
    left_m, left_k, right_k, right_n,
    HAS_SEEN: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i = grouped_block() * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    left_at = left + i.to(tl.int64)[:, None] * left_m + inner.to(tl.int64)[None, :] * left_k
    right_at = right + inner.to(tl.int64)[:, None] * right_k + j.to(tl.int64)[None, :] * right_n
    step = tl.full([1, 1], BLOCK_K, tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = inner < k - start
        a = tl.load(left_at, mask=(i < m)[:, None] & inside[None, :], other=0)
        if HAS_SEEN:
            inside &= tl.load(seen + start + inner, mask=inside, other=0) != 0
        b = tl.load(right_at, mask=inside[:, None] & (j < n)[None, :], other=0)
        total = gradient_dot(a, b, total, PRECISION)
        left_at += step * left_k
        right_at += step * right_k
    at = i.to(tl.int64)[:, None] * n + j[None, :]
    inside = (i < m)[:, None] & (j < n)[None, :]
    if HAS_ADDEND:
        total += tl.load(addend + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def _product(left, left_strides, right, seen, addend, m, n, k, dtype):
    """left [m, k] @ right [k, n] (+ addend) in `dtype`; left by its strides, so that it may be a transposed array."""
    if dtype_name(right) == "float32":
        tiles, num_warps, num_stages = {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 32, "PRECISION": "tf32x3"}, 8, 2
    else:
        tiles, num_warps, num_stages = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "PRECISION": "ieee"}, 8, 3
        if dtype_name(left) == "float32":  # of which Ampere's shared memory holds two stages
            num_stages = 2
    return launch(
        _product_kernel,
        # 128 programs in flight make a square of tiles, 8 by 16, which reads 24 blocks of the operands and not 129.
        head.grouped(triton.cdiv(m, tiles["BLOCK_M"]), triton.cdiv(n, tiles["BLOCK_N"]), 8),
        inputs={"left": left, "right": right, "seen": seen, "addend": addend},
        outputs={"out": Out((m, n), dtype)},
        scalars={
            "m": m, "n": n, "k": k, "left_m": left_strides[0], "left_k": left_strides[1],
            **strides(right, "right_k right_n"),
        },
        constants=tiles,
        num_warps=num_warps,
        num_stages=num_stages,
    )[0]  # fmt: skip


def head_gradients(kernel, hidden, weight, active, of_part, target_width=0, **constants):
    """dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight.

    kernel writes the logits' gradient, dlogits [R, CHUNK], of a part of the weight, [CHUNK, D] from token `first` on; zeros where
    active is False. of_part(first, part, BLOCK_D): the inputs and the scalars that it has beside these. target_width: see
    `head.grid`. That the kernels know the part alone lets JAX, to which scalars are constants, compile one for all.
    """
    (rows, width), vocabulary, dtype = hidden.shape, weight.shape[0], dtype_name(hidden)
    tiles, num_warps, num_stages = head.tiles(hidden)
    # float16 has not the range, see `gradient_dot`.
    dlogits_dtype = "float32" if dtype == "float16" else dtype
    dhidden, dweight = None, []
    for first in range(0, vocabulary, CHUNK):
        part = weight[first : first + CHUNK]
        chunk = part.shape[0]
        inputs, scalars = of_part(first, part, tiles["BLOCK_D"])
        (dlogits,) = launch(
            kernel,
            head.grid(hidden, tiles["BLOCK_R"], triton.cdiv(chunk, tiles["BLOCK_V"]), target_width),
            inputs={"hidden": hidden, "weight": part, "active": active, **inputs},
            outputs={"dlogits": Out((rows, chunk), dlogits_dtype)},
            scalars={**head.sizes(hidden, part, tiles["BLOCK_D"]), **scalars},
            constants={**tiles, **constants},
            num_warps=num_warps,
            num_stages=num_stages,
        )
        last = first + chunk == vocabulary
        dhidden = _product(dlogits, (chunk, 1), part, None, dhidden, rows, width, chunk, dtype if last else "float32")
        # An inactive row's hidden state may be NaN, which a gradient of zero does not silence.
        dweight.append(_product(dlogits, (1, chunk), hidden, active, None, chunk, width, rows, dtype))
    return dhidden, concatenate(dweight)
