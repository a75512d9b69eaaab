"""Fused attention over key intervals, forward: online softmax in base 2, tiles of keys that no row sees are not visited.

The G query heads of a kv head are packed into the rows of a tile (row m is query m // G, head m % G), so that a key is read
once for all of them. With few queries the keys are split over programs, in runs whose length does not depend on the batch. Of a
head beyond 256 Hopper's registers hold half the output's columns: there two programs share a row, and each computes its scores.
"""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels.attention_backward import attention_backward, supports_attention_backward
from dlm_kernels.triton_kernels.attention_tiles import bounds_stride, intervals, refuse, tile_of_attention
from dlm_kernels.triton_kernels.launch import (
    Out,
    arch,
    dtype_name,
    launch,
    multiplies_by_warp,
    multiprocessors,
    strides,
    tuned,
)
from dlm_kernels.triton_kernels.numerics import LOG2_E, tanh

__all__ = ["attention_backward", "attention_forward", "supports_attention_backward", "supports_attention_forward"]

_LEAST_SPLIT = 256  # keys per program at least, and a multiple of every tile of keys
_MOST_SPLITS = 64  # the merge holds a row's parts in registers


@triton.jit
def _attend(
    out, best, total,  # float32 [BLOCK_M, BLOCK_V], [BLOCK_M], [BLOCK_M]; best before the factor below
    query,  # [BLOCK_M, BLOCK_H]
    key, value,  # of this batch row and kv head: [S, H]
    column,  # the first of value's BLOCK_V
    start, stop,  # int32 [BLOCK_M]; the row sees keys in [start, stop)
    first,  # the tile's first key
    length,  # S
    key_s, key_h, value_s, value_h, scale,
    SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys. Where not MASKED, every row sees all of it."""
    h = tl.arange(0, BLOCK_H)
    c = column + tl.arange(0, BLOCK_V)
    lane = tl.arange(0, BLOCK_N)
    s = first + lane
    # 64 bits for the tile's base alone: a tile of 64-bit offsets would fill the registers.
    wide = tl.cast(first, tl.int64)
    at_key = key + wide * key_s + (lane[None, :] * key_s + h[:, None] * key_h)
    at_value = value + wide * value_s + (lane[:, None] * value_s + c[None, :] * value_h)
    if MASKED:
        k = tl.load(at_key, mask=(s < length)[None, :] & (h < H)[:, None], other=0)
    elif H < BLOCK_H:
        k = tl.load(at_key, mask=(h < H)[:, None], other=0)
    else:
        k = tl.load(at_key)
    logits = tl.dot(query, k, input_precision=PRECISION)
    factor = (scale if SOFT_CAP is None else SOFT_CAP) * LOG2_E
    if SOFT_CAP is not None:
        logits = tanh(logits * (scale / SOFT_CAP))
    if MASKED:
        visible = (s[None, :] >= start[:, None]) & (s[None, :] < stop[:, None])
        logits = tl.where(visible, logits, float("-inf"))
    greater = tl.maximum(best, tl.max(logits, 1))
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    base = tl.where(greater == float("-inf"), 0.0, greater)
    # Subtract, then scale: scaled first, a fused multiply-subtract leaves the rounding of the maximum, which beyond 2e9 overflows
    # exp2.
    weights = tl.exp2((logits - base[:, None]) * factor)
    shrink = tl.exp2((best - base) * factor)
    total = total * shrink + tl.sum(weights, 1)
    if MASKED:
        v = tl.load(at_value, mask=(s < length)[:, None] & (c < H)[None, :], other=0)
        # Zero times the NaN of a key that no row sees would be NaN.
        v = tl.where((tl.max(visible.to(tl.int32), 0) > 0)[:, None], v, 0.0)
    elif H % BLOCK_V:
        v = tl.load(at_value, mask=(c < H)[None, :], other=0)
    else:
        v = tl.load(at_value)
    v = v.to(query.dtype)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return out, greater, total


@triton.jit
def _forward_kernel(
    query,  # [B, T, N, H]
    key, value,  # [B, S, K, H]
    bounds,  # int32 [1|B, T, 2 * PAIRS] | None; per pair a start (inclusive) and a stop (exclusive)
    out,  # [SPLITS, B, T, N, H]; query's dtype, or float32 where split
    lse,  # float32 [SPLITS, B, N, T]
    batch, queries, length, heads,  # B, T, S, N
    split,  # keys per program, a multiple of BLOCK_N
    scale,  # above zero
    query_b, query_t, query_n, query_h, key_b, key_s, key_k, key_h, value_b, value_s, value_k, value_h,
    bounds_b,  # 0 where one row of bounds serves every batch row
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,  # value's columns of one program
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    SHARES: tl.constexpr = (H + BLOCK_V - 1) // BLOCK_V
    tile, kv_head, rest = tile_of_attention(tl.cdiv(queries * GROUPS, BLOCK_M) * SHARES, heads // GROUPS)
    column = tile % SHARES * BLOCK_V
    tile = tile // SHARES
    b = (rest % batch).to(tl.int64)
    part = rest // batch
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < queries * GROUPS
    t = m // GROUPS
    n = kv_head * GROUPS + m % GROUPS
    h = tl.arange(0, BLOCK_H)
    at_query = query + b * query_b + t.to(tl.int64)[:, None] * query_t + n[:, None] * query_n + h[None, :] * query_h
    q = tl.load(at_query, mask=real[:, None] & (h < H)[None, :], other=0)
    key += b * key_b + kv_head * key_k
    value += b * value_b + kv_head * value_k
    part_first = part * split
    part_last = tl.minimum(length, part_first + split)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for pair in range(PAIRS if PAIRS > 0 else 1):
        at_bounds = b * bounds_b + t.to(tl.int64) * (2 * PAIRS)
        start, stop, first, last, inner_first, inner_last = intervals(bounds, at_bounds, pair, real, length, PAIRS)
        # Tiles begin at multiples of BLOCK_N: [first, last) are visited, [inner_first, inner_last) need no mask.
        first = tl.maximum(first, part_first) // BLOCK_N * BLOCK_N
        last = tl.minimum(last, part_last)
        inner_first = tl.maximum((inner_first + BLOCK_N - 1) // BLOCK_N * BLOCK_N, first)
        inner_last = tl.maximum(tl.minimum(inner_last, last) // BLOCK_N * BLOCK_N, inner_first)
        for j in range(inner_first, inner_last, BLOCK_N):
            acc, best, total = _attend(
                acc, best, total, q, key, value, column, start, stop, j, length, key_s, key_h, value_s, value_h, scale,
                SOFT_CAP, False, H, BLOCK_H, BLOCK_V, BLOCK_N, PRECISION,
            )  # fmt: skip
        left = tl.maximum(tl.cdiv(tl.minimum(inner_first, last) - first, BLOCK_N), 0)
        right = tl.maximum(tl.cdiv(last - inner_last, BLOCK_N), 0)
        for edge in range(0, left + right):
            j = tl.where(edge < left, first + edge * BLOCK_N, inner_last + (edge - left) * BLOCK_N)
            acc, best, total = _attend(
                acc, best, total, q, key, value, column, start, stop, j, length, key_s, key_h, value_s, value_h, scale,
                SOFT_CAP, True, H, BLOCK_H, BLOCK_V, BLOCK_N, PRECISION,
            )  # fmt: skip
    if H > 256:
        # As above, of the same tile, which the compiler cannot know: kept through the loop beside the accumulator they would spill.
        m = tl.minimum(tile, (queries * GROUPS - 1) // BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
        real = m < queries * GROUPS
        t = m // GROUPS
        n = kv_head * GROUPS + m % GROUPS
    none = total == 0.0
    acc = acc / tl.where(none, 1.0, total)[:, None]
    at_out = ((part.to(tl.int64) * batch + b) * queries + t)[:, None] * heads + n[:, None]
    c = column + tl.arange(0, BLOCK_V)
    tl.store(out + at_out * H + c[None, :], acc.to(out.dtype.element_ty), mask=real[:, None] & (c < H)[None, :])
    at_lse = ((part.to(tl.int64) * batch + b) * heads + n) * queries + t
    sums = best * (scale if SOFT_CAP is None else SOFT_CAP) + tl.log(tl.where(none, 1.0, total))
    tl.store(lse + at_lse, tl.where(none, float("-inf"), sums), mask=real & (column == 0))


@triton.jit
def _combine_kernel(
    part_out,  # float32 [SPLITS, B, T, N, H]
    part_lse,  # float32 [SPLITS, B, N, T]
    out,  # [B, T, N, H]
    lse,  # float32 [B, N, T]
    queries, heads, batch,  # T, N, B
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of [B, T, N]
    n = row % heads
    t = row // heads % queries
    b = row // heads // queries
    part = tl.arange(0, BLOCK_S).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    at = (b * heads + n) * queries + t
    sums = tl.load(part_lse + part * batch * heads * queries + at, mask=part < SPLITS, other=float("-inf"))
    best = tl.max(sums, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    weight = tl.exp(sums - base)
    whole = tl.sum(weight, 0)
    rows = part[:, None] * (batch * queries * heads) + row
    parts = tl.load(part_out + rows * H + h[None, :], mask=(part < SPLITS)[:, None] & (h < H)[None, :], other=0.0)
    mixed = tl.sum(parts * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + row * H + h, mixed.to(out.dtype.element_ty), mask=h < H)
    tl.store(lse + at, tl.where(whole == 0.0, float("-inf"), base + tl.log(tl.where(whole == 0.0, 1.0, whole))))


def supports_attention_forward(query, key, value, bounds, dense, **static) -> str | None:
    return refuse(dense)


@tuned("attention_forward")
def _tiles(dtype: str, h: int, few_rows: bool, pairs: int) -> tuple[dict, int, int]:
    """Constants of the tiles, the warps and the stages: the largest that spill no register on sm_80, sm_90 and sm_100."""
    if dtype == "float32" and h > 128:
        # Not as products of two parts, for which there are no registers.
        return {"BLOCK_M": 32, "BLOCK_N": 16, "PRECISION": "ieee"}, 8, 1
    if dtype == "float32":
        return {"BLOCK_M": 32 if h <= 64 else 16, "BLOCK_N": 32, "PRECISION": "tf32x3"}, 8, 1
    block_m = 64 if few_rows else 128
    ampere = multiplies_by_warp()
    if h > 256 and ampere:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "PRECISION": "ieee"}, 8, 2
    if h > 256 and arch() < 100:
        # With 64 rows and all columns both warpgroups would compute every score, in products of 16 keys, each of which would read
        # 2.5 KB of shared memory in the 8 cycles that it takes; and most masks would spill.
        return {"BLOCK_M": 128, "BLOCK_N": 16 if pairs == 2 else 32, "BLOCK_V": 256, "PRECISION": "ieee"}, 8, 2
    if h > 256:
        columns, num_stages = (256, 1) if pairs == 2 else (512, 2)
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_V": columns, "PRECISION": "ieee"}, 8, num_stages
    if h > 128:
        num_stages = 1 if pairs == 2 and arch() >= 100 else 2
        return {"BLOCK_M": 32 if ampere else 64, "BLOCK_N": 16 if pairs == 2 else 32, "PRECISION": "ieee"}, 8, num_stages
    if h > 64 and (pairs == 2 or ampere):
        return {"BLOCK_M": 64, "BLOCK_N": 32, "PRECISION": "ieee"}, 4 if pairs == 0 else 8, 2 if ampere else 3
    if ampere:
        return {"BLOCK_M": block_m, "BLOCK_N": 32, "PRECISION": "ieee"}, 8, 3
    if h == 128 and arch() < 100 and not few_rows:
        # Of 32 keys each of Hopper's products with the queries would read 3 KB of shared memory in the 16 cycles that it takes,
        # at 128 bytes a cycle.
        return {"BLOCK_M": 128, "BLOCK_N": 64 if pairs else 128, "PRECISION": "ieee"}, 8, 3 if pairs else 2
    return {"BLOCK_M": block_m, "BLOCK_N": 32 if h > 64 or pairs == 2 else 64, "PRECISION": "ieee"}, 4 if block_m == 64 else 8, 3


def _split(programs: int, length: int) -> tuple[int, int]:
    """Keys per program, and how many programs share a row's keys, where without sharing a batch row has `programs`.

    Where those leave more than a fifth of the multiprocessors idle at batch 1, as many as give two to each, and no more: every
    program writes its rows in float32 for the merge to read, on Hopper 264 times 128 x 128 at most, 17 MB (twice that of heads
    beyond 256), which stay in L2. 128 queries of LLaDA's 32 heads against 32768 keys read 537 MB; 64 parts instead of 8 would
    write 134 MB beside that.
    The batch is left out, or a row's bits would depend on what else is in it. Fewer keys than two programs' least stay together:
    the merge is a launch of its own.
    """
    if programs >= 0.8 * multiprocessors() or length < 2 * _LEAST_SPLIT:
        return length, 1
    wanted = min(2 * multiprocessors() // programs, _MOST_SPLITS)
    split = triton.cdiv(triton.cdiv(length, wanted), _LEAST_SPLIT) * _LEAST_SPLIT
    return split, triton.cdiv(length, split)


def attention_forward(query, key, value, bounds, dense, *, scale, logits_soft_cap):
    """query [B,T,N,H], key and value [B,S,K,H], bounds int32 [1|B,T,2|4], contiguous, or None.

    Returns out [B,T,N,H] in query's dtype and lse float32 [B,N,T].
    """
    if scale <= 0:
        # Logits are compared before they are scaled; and zero times the -inf of a key that is not seen would be NaN.
        query, scale = (-query, -scale) if scale else (query * 0, 1.0)
    batch, queries, heads, h = query.shape
    length, kv_heads = key.shape[1:3]
    groups = heads // kv_heads
    pairs = 0 if bounds is None else bounds.shape[-1] // 2
    tiles, num_warps, num_stages = _tiles(dtype_name(query), h, queries * groups <= 64, pairs)
    block_h = max(16, triton.next_power_of_2(h))
    tiles = {"BLOCK_V": block_h, **tiles}
    programs = triton.cdiv(queries * groups, tiles["BLOCK_M"]) * triton.cdiv(h, tiles["BLOCK_V"]) * kv_heads
    split, splits = _split(programs, length)
    out, lse = launch(
        _forward_kernel,
        (programs * batch * splits,),
        inputs={"query": query, "key": key, "value": value, "bounds": bounds},
        outputs={
            "out": Out((splits, batch, queries, heads, h)[splits == 1 :], "float32" if splits > 1 else dtype_name(query)),
            "lse": Out((splits, batch, heads, queries)[splits == 1 :], "float32"),
        },
        scalars={
            "batch": batch, "queries": queries, "length": length, "heads": heads,
            "split": split, "scale": float(scale),
            **strides(query, "query_b query_t query_n query_h", query_h=h),
            **strides(key, "key_b key_s key_k key_h", key_s=tiles["BLOCK_N"], key_h=h),
            **strides(value, "value_b value_s value_k value_h", value_s=tiles["BLOCK_N"], value_h=h),
            "bounds_b": bounds_stride(bounds),
        },
        constants={
            **tiles, "GROUPS": groups, "PAIRS": pairs,
            "SOFT_CAP": logits_soft_cap, "H": h, "BLOCK_H": block_h,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    if splits == 1:
        return out, lse
    return launch(
        _combine_kernel,
        (batch * queries * heads,),
        inputs={"part_out": out, "part_lse": lse},
        outputs={"out": Out(tuple(query.shape), dtype_name(query)), "lse": Out((batch, heads, queries), "float32")},
        scalars={"queries": queries, "heads": heads, "batch": batch},
        constants={"SPLITS": splits, "BLOCK_S": triton.next_power_of_2(splits), "H": h, "BLOCK_H": block_h},
    )
