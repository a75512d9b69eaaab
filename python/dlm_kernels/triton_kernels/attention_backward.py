"""Fused attention's gradients: one kernel owns a tile of keys, one a tile of queries; nothing is added atomically.

Both compute the weights again from lse. Rows are packed as in the forward kernel: row m is query m // G, head m % G.
"""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels.attention_tiles import bounds_stride, intervals, refuse, tile_of_attention
from dlm_kernels.triton_kernels.launch import Out, arch, dtype_name, launch, multiplies_by_warp, strides, tuned
from dlm_kernels.triton_kernels.numerics import LOG2_E, gradient_dot, tanh


@triton.jit
def _delta_kernel(
    out, dout,  # [B, T, N, H]
    dlse,  # float32 [B, N, T]
    delta,  # float32 [B, N, T]: sum(out * dout) - dlse
    queries, heads,  # T, N
    out_b, out_t, out_n, out_h, dout_b, dout_t, dout_n, dout_h,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    tile, n, b = tile_of_attention(tl.cdiv(queries, BLOCK_T), heads)
    b = b.to(tl.int64)
    t = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.arange(0, BLOCK_H)
    inside = (t < queries)[:, None] & (h < H)[None, :]
    o = tl.load(out + b * out_b + n * out_n + t[:, None] * out_t + h[None, :] * out_h, mask=inside, other=0)
    do = tl.load(dout + b * dout_b + n * dout_n + t[:, None] * dout_t + h[None, :] * dout_h, mask=inside, other=0)
    at = (b * heads + n) * queries + t
    change = tl.load(dlse + at, mask=t < queries, other=0.0)
    tl.store(delta + at, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) - change, mask=t < queries)


@triton.jit
def _visible(
    bounds,  # int32 [1|B, T, 2 * PAIRS], per pair a start (inclusive) and a stop (exclusive)
    at_bounds,  # int64 [BLOCK_M], where the rows' are
    real,  # bool [BLOCK_M], False for rows past the last
    s,  # int32 [BLOCK_N]
    length,  # S
    PAIRS: tl.constexpr,
):  # fmt: skip
    """bool [BLOCK_M, BLOCK_N]: which of the keys s each row sees."""
    visible = real[:, None] & (s < length)[None, :]
    if PAIRS > 0:
        seen = tl.zeros(visible.shape, tl.int1)
        for pair in tl.static_range(PAIRS):
            start = tl.load(bounds + at_bounds + 2 * pair, mask=real, other=0)[:, None]
            stop = tl.load(bounds + at_bounds + 2 * pair + 1, mask=real, other=0)[:, None]
            seen |= (s[None, :] >= start) & (s[None, :] < stop)
        visible &= seen
    return visible


@triton.jit
def _dlogits(
    left, dleft,  # q, do [BLOCK_M, BLOCK_H] where ROW_AXIS is 0; k, v [BLOCK_N, BLOCK_H] where it is 1
    right, dright,  # k, v where ROW_AXIS is 0; q, do where it is 1
    lse, delta,  # float32 [BLOCK_M]
    visible,  # bool [BLOCK_M, BLOCK_N] where ROW_AXIS is 0; [BLOCK_N, BLOCK_M] where it is 1
    scale,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_AXIS: tl.constexpr,  # which axis of the logits the rows are along
):  # fmt: skip
    """The weights and the gradient of the scaled logits, float32, shaped as visible; zero where that does not hold."""
    logits = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    if SOFT_CAP is None:
        logits *= scale * LOG2_E
    else:
        bent = tanh(logits * (scale / SOFT_CAP))
        logits = bent * (SOFT_CAP * LOG2_E)
    # Selected and not multiplied: an unseen key may hold NaN, and a row that sees nothing has lse -inf.
    p = tl.where(visible, tl.exp2(logits - tl.expand_dims(lse, 1 - ROW_AXIS) * LOG2_E), 0.0)
    ds = p * (tl.dot(dleft, tl.trans(dright), input_precision=PRECISION) - tl.expand_dims(delta, 1 - ROW_AXIS)) * scale
    if SOFT_CAP is not None:
        ds *= 1.0 - bent * bent
    return p, tl.where(visible, ds, 0.0)


@triton.jit
def _dkdv_kernel(
    query,  # [B, T, N, H]
    key, value,  # [B, S, K, H]
    bounds,  # int32 [1|B, T, 2 * PAIRS] | None; per pair a start (inclusive) and a stop (exclusive)
    dout,  # [B, T, N, H]
    lse, delta,  # float32 [B, N, T]
    dkey, dvalue,  # [B, S, K, H], contiguous
    queries, length, heads, kv_heads,  # T, S, N, K
    scale,
    query_b, query_t, query_n, query_h, key_b, key_s, key_k, key_h, value_b, value_s, value_k, value_h,
    dout_b, dout_t, dout_n, dout_h, bounds_b,
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,  # queries whose bounds are looked at at once
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head, b = tile_of_attention(tl.cdiv(length, BLOCK_N), kv_heads)
    b = b.to(tl.int64)
    first = tile * BLOCK_N
    s = first + tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_H)
    there = (s < length)[:, None] & (h < H)[None, :]
    at_key = key + b * key_b + kv_head * key_k + s.to(tl.int64)[:, None] * key_s + h[None, :] * key_h
    at_value = value + b * value_b + kv_head * value_k + s.to(tl.int64)[:, None] * value_s + h[None, :] * value_h
    k = tl.load(at_key, mask=there, other=0)
    v = tl.load(at_value, mask=there, other=0)
    dk = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    # The queries that see any of these keys, from t_first (inclusive) to t_last (exclusive); a condition in the loop below instead
    # would keep its loads from running ahead.
    t_first = 0
    t_last = queries
    if PAIRS > 0:
        t_first = queries
        t_last = 0
        for some in range(0, queries, BLOCK_T):
            t = some + tl.arange(0, BLOCK_T)
            there_t = t < queries
            sees = t < 0
            for pair in tl.static_range(PAIRS):
                at_bounds = bounds + b * bounds_b + t.to(tl.int64) * (2 * PAIRS) + 2 * pair
                start = tl.load(at_bounds, mask=there_t, other=0)
                stop = tl.load(at_bounds + 1, mask=there_t, other=0)
                sees |= (start < stop) & (start < first + BLOCK_N) & (stop > first)
            t_first = tl.minimum(t_first, tl.min(tl.where(sees, t, queries), 0))
            t_last = tl.maximum(t_last, tl.max(tl.where(sees, t + 1, 0), 0))
    for row in range(t_first * GROUPS // BLOCK_M * BLOCK_M, t_last * GROUPS, BLOCK_M):
        m = row + tl.arange(0, BLOCK_M)
        real = m < queries * GROUPS
        t = m // GROUPS
        visible = _visible(bounds, b * bounds_b + t.to(tl.int64) * (2 * PAIRS), real, s, length, PAIRS)
        inside = real[:, None] & (h < H)[None, :]
        # 64 bits for the rows alone: a tile of 64-bit offsets would fill the registers.
        wide, n = t.to(tl.int64), kv_head * GROUPS + m % GROUPS
        at = b * query_b + wide * query_t + n * query_n
        q = tl.load(query + at[:, None] + h[None, :] * query_h, mask=inside, other=0)
        at = b * dout_b + wide * dout_t + n * dout_n
        do = tl.load(dout + at[:, None] + h[None, :] * dout_h, mask=inside, other=0)
        at = (b * heads + n) * queries + t
        sums = tl.load(lse + at, mask=real, other=0.0)
        change = tl.load(delta + at, mask=real, other=0.0)
        p, ds = _dlogits(q, do, k, v, sums, change, visible, scale, SOFT_CAP, PRECISION, 0)
        dv = gradient_dot(tl.trans(p), do, dv, PRECISION)
        dk = gradient_dot(tl.trans(ds), q, dk, PRECISION)
    at = ((b * length + s) * kv_heads + kv_head)[:, None] * H + h[None, :]
    tl.store(dkey + at, dk.to(dkey.dtype.element_ty), mask=there)
    tl.store(dvalue + at, dv.to(dvalue.dtype.element_ty), mask=there)


@triton.jit
def _dq_kernel(
    query,  # [B, T, N, H]
    key, value,  # [B, S, K, H]
    bounds,  # int32 [1|B, T, 2 * PAIRS] | None; per pair a start (inclusive) and a stop (exclusive)
    dout,  # [B, T, N, H]
    lse, delta,  # float32 [B, N, T]
    dquery,  # [B, T, N, H], contiguous
    queries, length, heads,  # T, S, N
    scale,
    query_b, query_t, query_n, query_h, key_b, key_s, key_k, key_h, value_b, value_s, value_k, value_h,
    dout_b, dout_t, dout_n, dout_h, bounds_b,
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head, b = tile_of_attention(tl.cdiv(queries * GROUPS, BLOCK_M), heads // GROUPS)
    b = b.to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < queries * GROUPS
    t = m // GROUPS
    n = kv_head * GROUPS + m % GROUPS
    h = tl.arange(0, BLOCK_H)
    inside = real[:, None] & (h < H)[None, :]
    at = b * query_b + t.to(tl.int64)[:, None] * query_t + n[:, None] * query_n + h[None, :] * query_h
    q = tl.load(query + at, mask=inside, other=0)
    at = b * dout_b + t.to(tl.int64)[:, None] * dout_t + n[:, None] * dout_n + h[None, :] * dout_h
    do = tl.load(dout + at, mask=inside, other=0)
    at = (b * heads + n) * queries + t
    sums = tl.load(lse + at, mask=real, other=0.0)
    change = tl.load(delta + at, mask=real, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    key += b * key_b + kv_head * key_k
    value += b * value_b + kv_head * value_k
    at_bounds = b * bounds_b + t.to(tl.int64) * (2 * PAIRS)
    lane = tl.arange(0, BLOCK_N)
    for pair in range(PAIRS if PAIRS > 0 else 1):
        start, stop, first, last, _, _ = intervals(bounds, at_bounds, pair, real, length, PAIRS)
        for j in range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
            s = j + lane
            visible = (s[None, :] >= start[:, None]) & (s[None, :] < stop[:, None])
            there = (s < length)[:, None] & (h < H)[None, :]
            wide = tl.cast(j, tl.int64)
            k = tl.load(key + wide * key_s + (lane[:, None] * key_s + h[None, :] * key_h), mask=there, other=0)
            v = tl.load(value + wide * value_s + (lane[:, None] * value_s + h[None, :] * value_h), mask=there, other=0)
            if q.dtype == tl.float32:
                # A left operand that the loop keeps stays in registers, float32 in two parts: q and do would not fit.
                p, ds = _dlogits(k, v, q, do, sums, change, tl.trans(visible), scale, SOFT_CAP, PRECISION, 1)
                ds = tl.trans(ds)
            else:
                p, ds = _dlogits(q, do, k, v, sums, change, visible, scale, SOFT_CAP, PRECISION, 0)
            # Zero times the NaN of a key that no row sees would be NaN.
            k = tl.where((tl.max(visible.to(tl.int32), 0) > 0)[:, None], k, 0.0).to(q.dtype)
            dq = gradient_dot(ds, k, dq, PRECISION)
    at = ((b * queries + t) * heads + n)[:, None] * H + h[None, :]
    tl.store(dquery + at, dq.to(dquery.dtype.element_ty), mask=inside)


def supports_attention_backward(query, key, value, bounds, dense, out, lse, dout, dlse, **static) -> str | None:
    if dtype_name(query) == "float32" and query.shape[-1] > 256 and multiplies_by_warp():
        # Of the least tiles q, do, k and v are 128 KB, and sm_86, sm_89 and sm_120 have 99.
        return f"in float32 on this GPU it takes head sizes up to 256, and query's is {query.shape[-1]}"
    return refuse(dense)


@tuned("attention_backward")
def _tiles(dtype: str, h: int, pairs: int) -> tuple[dict, int, int]:
    """Constants of the tiles, the warps and the stages: the most that spill no register."""
    if dtype == "float32" and h > 128:
        return {"BLOCK_M": 16 if multiplies_by_warp() or h > 256 else 32, "BLOCK_N": 16, "PRECISION": "ieee"}, 8, 1
    if dtype == "float32":
        return {"BLOCK_M": 16, "BLOCK_N": 16, "PRECISION": "tf32x3"}, 8, 1
    if h > 256:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "PRECISION": "ieee"}, 8, 1
    if h > 128 or multiplies_by_warp():
        return {"BLOCK_M": 32, "BLOCK_N": 32, "PRECISION": "ieee"}, 8, 2
    num_stages = 1 if pairs == 2 and h > 64 and (arch() >= 100 or dtype == "float16") else 2
    # Of 64 keys at once, in more than one stage, ptxas would have Hopper's products wait for one another.
    return {"BLOCK_M": 64, "BLOCK_N": 32, "PRECISION": "ieee"}, 8, num_stages


def attention_backward(query, key, value, bounds, dense, out, lse, dout, dlse, *, scale, logits_soft_cap):
    """out, dout [B,T,N,H]; lse, dlse float32 [B,N,T], contiguous. Returns dquery, dkey, dvalue in query's dtype."""
    batch, queries, heads, h = query.shape
    length, kv_heads = key.shape[1:3]
    groups = heads // kv_heads
    dtype = dtype_name(query)
    pairs = 0 if bounds is None else bounds.shape[-1] // 2
    tiles, num_warps, num_stages = _tiles(dtype, h, pairs)
    sizes = {"H": h, "BLOCK_H": max(16, triton.next_power_of_2(h))}
    block_t = 16 if h > 256 else 32  # of out and dout 8192 elements at most, 64 for a thread
    (delta,) = launch(
        _delta_kernel,
        (triton.cdiv(queries, block_t) * heads * batch,),
        inputs={"out": out, "dout": dout, "dlse": dlse},
        outputs={"delta": Out((batch, heads, queries), "float32")},
        scalars={
            "queries": queries, "heads": heads, **strides(out, "out_b out_t out_n out_h", out_h=h),
            **strides(dout, "dout_b dout_t dout_n dout_h", dout_h=h),
        },
        constants={**sizes, "BLOCK_T": block_t},
    )  # fmt: skip
    inputs = {
        "query": query, "key": key, "value": value, "bounds": bounds, "dout": dout, "lse": lse, "delta": delta,
    }  # fmt: skip
    scalars = {
        "queries": queries, "length": length, "heads": heads, "scale": float(scale),
        **strides(query, "query_b query_t query_n query_h", query_h=h),
        **strides(key, "key_b key_s key_k key_h", key_s=tiles["BLOCK_N"], key_h=h),
        **strides(value, "value_b value_s value_k value_h", value_s=tiles["BLOCK_N"], value_h=h),
        **strides(dout, "dout_b dout_t dout_n dout_h", dout_h=h), "bounds_b": bounds_stride(bounds),
    }  # fmt: skip
    constants = {**tiles, **sizes, "GROUPS": groups, "PAIRS": pairs, "SOFT_CAP": logits_soft_cap}
    options = {"num_warps": num_warps, "num_stages": num_stages}
    dkey, dvalue = launch(
        _dkdv_kernel,
        (triton.cdiv(length, tiles["BLOCK_N"]) * kv_heads * batch,),
        inputs=inputs,
        outputs={"dkey": Out(tuple(key.shape), dtype), "dvalue": Out(tuple(key.shape), dtype)},
        scalars={**scalars, "kv_heads": kv_heads},
        constants={**constants, "BLOCK_T": 512},  # two for each of 256 threads
        **options,
    )
    (dquery,) = launch(
        _dq_kernel,
        (triton.cdiv(queries * groups, tiles["BLOCK_M"]) * kv_heads * batch,),
        inputs=inputs,
        outputs={"dquery": Out(tuple(query.shape), dtype)},
        scalars=scalars,
        constants=constants,
        **options,
    )
    return dquery, dkey, dvalue
