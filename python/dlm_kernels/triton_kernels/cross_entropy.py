"""The loss of the LM head's logits, and its gradients, without the logits in memory.

The loss's statistics are taken in the epilogue of the matrix product. The gradients take the vocabulary in chunks: of one chunk at
a time the logits' gradient is written, and multiplied twice.
"""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels import head, scores
from dlm_kernels.triton_kernels.head import grouped_block, head_tile, place
from dlm_kernels.triton_kernels.launch import Out, concatenate, dtype_name, launch, strides
from dlm_kernels.triton_kernels.numerics import exp, gradient_dot, tanh

CHUNK = 16384  # tokens whose logits' gradient is in memory at once


@triton.jit
def _loss_kernel(
    hidden,  # [R, D]
    weight,  # [V, D]
    targets,  # int32 [R]
    active,  # bool [R]
    top, total,  # float32 [R, SPANS]
    chosen,  # float32 [R]; the target's logit, written by the one program that has it
    rows, vocabulary, width,  # R, V, D
    hidden_r, hidden_d, weight_v, weight_d,
    SOFT_CAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, wanted, tokens = place(active, rows, BLOCK_R, BLOCK_V)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        value = head_tile(
            hidden, weight, row, wanted, tokens, vocabulary, width, hidden_r, hidden_d, weight_v, weight_d,
            BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        if SOFT_CAP is not None:
            value = SOFT_CAP * tanh(value * (1.0 / SOFT_CAP))
        value = tl.where((tokens < vocabulary)[None, :], value, float("-inf"))
        tops = tl.max(value, 1)
        totals, _ = scores.summarize(value, tops, 1)
        at = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(top + at, tops, mask=wanted)
        tl.store(total + at, totals, mask=wanted)
        target = tl.load(targets + row, mask=wanted, other=-1)
        hit = tokens[None, :] == target[:, None]
        mine = tl.max(hit.to(tl.int32), 1) > 0
        tl.store(chosen + row, tl.sum(tl.where(hit, value, 0.0), 1), mask=wanted & mine)


@triton.jit
def _loss_merge_kernel(
    top, total,  # float32 [R, SPANS]
    chosen,  # float32 [R]
    targets,  # int32 [R]
    active,  # bool [R]
    loss, lse,  # float32 [R]; both 0 where not active
    spans, vocabulary,  # SPANS, V
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active + row) != 0:
        _, _, _, base, whole = scores.merged(top, total, row, spans, BLOCK)
        value = base + tl.log(whole)
        target = tl.load(targets + row)
        known = (target >= 0) & (target < vocabulary)
        tl.store(lse + row, value)
        tl.store(loss + row, tl.where(known, value - tl.load(chosen + row), float("nan")))
    else:
        tl.store(lse + row, 0.0)
        tl.store(loss + row, 0.0)


def masked_cross_entropy_forward(hidden, weight, targets, active, *, logits_soft_cap):
    """hidden [R,D]; weight [V,D]; targets int32 [R]; active bool [R]. Returns loss and lse, float32 [R]; 0 where inactive."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    spans = triton.cdiv(vocabulary, head.SPAN)
    tiles, num_warps, num_stages = head.tiles(dtype_name(hidden), rows <= 64, False)
    top, total, chosen = launch(
        _loss_kernel,
        head.grid(hidden, tiles["BLOCK_R"], spans),
        inputs={"hidden": hidden, "weight": weight, "targets": targets, "active": active},
        outputs={
            "top": Out((rows, spans), "float32"), "total": Out((rows, spans), "float32"),
            "chosen": Out((rows,), "float32"),
        },
        scalars=head.sizes(hidden, weight),
        constants={**tiles, "SOFT_CAP": logits_soft_cap},
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return launch(
        _loss_merge_kernel,
        (rows,),
        inputs={"top": top, "total": total, "chosen": chosen, "targets": targets, "active": active},
        outputs={"loss": Out((rows,), "float32"), "lse": Out((rows,), "float32")},
        scalars={"spans": spans, "vocabulary": vocabulary},
        constants={"BLOCK": max(16, triton.next_power_of_2(spans))},
    )


@triton.jit
def _dlogits_kernel(
    hidden,  # [R, D]
    weight,  # [V, D]
    active,  # bool [R]
    targets,  # int32 [R]; one outside 0 <= target < V is in another part of the vocabulary
    lse, dloss,  # float32 [R]
    dlogits,  # [R, V]; inactive rows get zeros
    rows, vocabulary, width,  # R, V, D
    hidden_r, hidden_d, weight_v, weight_d,
    SOFT_CAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, wanted, tokens = place(active, rows, BLOCK_R, BLOCK_V)
    gradient = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        value = head_tile(
            hidden, weight, row, wanted, tokens, vocabulary, width, hidden_r, hidden_d, weight_v, weight_d,
            BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        gradient = tl.load(dloss + row, mask=wanted, other=0.0)[:, None]
        if SOFT_CAP is not None:
            bent = tanh(value * (1.0 / SOFT_CAP))
            value = SOFT_CAP * bent
            gradient = gradient * (1.0 - bent * bent)
        target = tl.load(targets + row, mask=wanted, other=-1)
        p = exp(value - tl.load(lse + row, mask=wanted, other=0.0)[:, None])
        gradient = gradient * (p - (tokens[None, :] == target[:, None]).to(tl.float32))
        # Zeros in the place of a row's hidden state are NaN times a weight that is infinite.
        gradient = tl.where(wanted[:, None], gradient, 0.0)
    at = dlogits + row.to(tl.int64)[:, None] * vocabulary + tokens[None, :]
    tl.store(at, gradient.to(dlogits.dtype.element_ty), mask=(row < rows)[:, None] & (tokens < vocabulary)[None, :])


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


def masked_cross_entropy_backward(hidden, weight, targets, active, lse, dloss, *, logits_soft_cap):
    """lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""

    def of_part(first, part):
        return {"targets": targets - first, "lse": lse, "dloss": dloss}, {}

    return head_gradients(_dlogits_kernel, hidden, weight, active, of_part, SOFT_CAP=logits_soft_cap)


def head_gradients(kernel, hidden, weight, active, of_part, target_width=0, **constants):
    """dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight.

    kernel writes the logits' gradient, dlogits [R, CHUNK], of a part of the weight, [CHUNK, D] from token `first` on; zeros where
    active is False. of_part(first, part): the inputs and the scalars that it has beside these. target_width: see `head.grid`. That
    the kernels know the part alone lets JAX, to which scalars are constants, compile one for all.
    """
    (rows, width), vocabulary, dtype = hidden.shape, weight.shape[0], dtype_name(hidden)
    tiles, num_warps, num_stages = head.tiles(dtype, rows <= 64, False)
    # float16 has not the range, see `gradient_dot`.
    dlogits_dtype = "float32" if dtype == "float16" else dtype
    dhidden, dweight = None, []
    for first in range(0, vocabulary, CHUNK):
        part = weight[first : first + CHUNK]
        chunk = part.shape[0]
        inputs, scalars = of_part(first, part)
        (dlogits,) = launch(
            kernel,
            head.grid(hidden, tiles["BLOCK_R"], triton.cdiv(chunk, tiles["BLOCK_V"]), target_width),
            inputs={"hidden": hidden, "weight": part, "active": active, **inputs},
            outputs={"dlogits": Out((rows, chunk), dlogits_dtype)},
            scalars={**head.sizes(hidden, part), **scalars},
            constants={**tiles, **constants},
            num_warps=num_warps,
            num_stages=num_stages,
        )
        last = first + chunk == vocabulary
        dhidden = _product(dlogits, (chunk, 1), part, None, dhidden, rows, width, chunk, dtype if last else "float32")
        # An inactive row's hidden state may be NaN, which a gradient of zero does not silence.
        dweight.append(_product(dlogits, (1, chunk), hidden, active, None, chunk, width, rows, dtype))
    return dhidden, concatenate(dweight)
