"""The LM head fused with what follows it: scores of tokens, and the training loss with its gradients.

The scores' and the loss's statistics are taken in the epilogue of the matrix product, so the logits are never written. The
gradients take the vocabulary in chunks: of one chunk at a time the logits' gradient is written, and multiplied twice.
"""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels import scores
from dlm_kernels.triton_kernels.launch import Out, arch, concatenate, dtype_name, launch, strides, tuned
from dlm_kernels.triton_kernels.numerics import gumbel, head_tile, tanh

_SPAN = 128  # tokens per program
_CHUNK = 16384  # tokens whose logits' gradient is in memory at once
_RESIDENT = 16 << 20  # bytes of hidden states that stay in L2 (40 MB on A100, 50 on H100) beside what streams through


@triton.jit
def grouped_block():
    """The block of axis 0 that is this program's, in a grid by `grouped`."""
    return tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)


def grouped(blocks: int, others: int, most: int) -> tuple[int, int, int]:
    """A grid of blocks by others, started in groups of `most` blocks: all of a group, for one of the others after another."""
    return min(blocks, most), others, triton.cdiv(blocks, most)


def _grid(hidden, block: int, spans: int) -> tuple[int, int, int]:
    """Blocks of rows by spans of the vocabulary: a group's hidden states stay in L2, and the weights pass by once for each group.

    2048 rows of LLaDA, 17 MB, are one group: 132 programs in flight are 8 spans, and all 988, 1.04 GB, are read once. 8192 rows
    would not stay in L2 from one span to the next, and would be read anew for every two, 33 GB; in 4 groups the weights are
    read 4 times.
    """
    rows, width = hidden.shape
    row_bytes = width * (4 if dtype_name(hidden) == "float32" else 2)
    return grouped(triton.cdiv(rows, block), spans, max(1, _RESIDENT // (row_bytes * block)))


@triton.jit
def _scores_kernel(
    hidden,  # [R, D]
    weight,  # [V, D]
    temperature,  # float32 [R] | None
    key_data,  # uint32 [R, 2] | None
    counter_row,  # int32 [R] | None
    noise,  # float32 [R, V] | None
    active,  # bool [R] | None
    banned,  # int32 [M] | None
    top, total, moment, second,  # float32 [R, SPANS]
    token,  # int32 [R, SPANS]
    choice,  # float32 [R, SPANS] | None
    choice_token,  # int32 [R, SPANS] | None
    picked,  # float32 [R, SPANS] | None
    rows, vocabulary, width,  # R, V, D
    banned_count,  # M
    hidden_r, hidden_d, weight_v, weight_d, noise_r, noise_v,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    HAS_BANNED: tl.constexpr,
    ROUND: tl.constexpr,  # the dtype that the logits are rounded to, or None
    TEMPERED: tl.constexpr,
    SECOND: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = grouped_block() * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * BLOCK_V
    tokens = start + tl.arange(0, BLOCK_V)
    wanted = row < rows
    if HAS_ACTIVE:
        wanted &= tl.load(active + row, mask=wanted, other=0) != 0
    if tl.max(wanted.to(tl.int32), 0) > 0:
        value = head_tile(
            hidden, weight, row, wanted, tokens, vocabulary, width, hidden_r, hidden_d, weight_v, weight_d,
            BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        if ROUND is not None:
            value = value.to(ROUND).to(tl.float32)
        if SOFT_CAP is not None:
            value = SOFT_CAP * tanh(value / SOFT_CAP)
        value = tl.where((tokens < vocabulary)[None, :], value, float("-inf"))
        if HAS_BANNED:
            for i in range(banned_count):
                ban = tl.load(banned + i)
                if (ban >= start) & (ban < start + BLOCK_V):
                    value = tl.where((tokens == ban)[None, :], float("-inf"), value)
        at = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + row, mask=wanted, other=0.0)
            tempered = value / tl.where(heat > 0.0, heat, 1.0)[:, None]
            drawn = tempered
            if tl.max(heat, 0) > 0.0:
                if not HAS_NOISE:
                    key0 = tl.load(key_data + 2 * row, mask=wanted, other=0)[:, None]
                    key1 = tl.load(key_data + 2 * row + 1, mask=wanted, other=0)[:, None]
                    first = tl.load(counter_row + row, mask=wanted, other=0).to(tl.int64) * vocabulary
                    draw = gumbel(key0, key1, first[:, None] + tokens[None, :])
                else:
                    at_noise = noise + row.to(tl.int64)[:, None] * noise_r + tokens.to(tl.int64)[None, :] * noise_v
                    draw = tl.load(at_noise, mask=wanted[:, None] & (tokens < vocabulary)[None, :], other=0.0)
                drawn = tl.where((heat > 0.0)[:, None], tempered + draw, tempered)
            if TEMPERED:
                value = tempered
            winner = tl.argmax(drawn, 1)
            of_winner = tl.where(tl.arange(0, BLOCK_V)[None, :] == winner[:, None], value, float("-inf"))
            tl.store(choice + at, tl.max(drawn, 1), mask=wanted)
            tl.store(choice_token + at, start + winner, mask=wanted)
            tl.store(picked + at, tl.max(of_winner, 1), mask=wanted)
        tops, totals, moments = scores.summarize(value, 1)
        tl.store(top + at, tops, mask=wanted)
        tl.store(total + at, totals, mask=wanted)
        tl.store(moment + at, moments, mask=wanted)
        if SECOND:
            tl.store(second + at, scores.second_of(value, tops, 1), mask=wanted)
        tl.store(token + at, start + tl.argmax(value, 1), mask=wanted)


@tuned("lm_head")
def _tiles(dtype: str, few_rows: bool, sampled: bool = False) -> tuple[dict, int, int]:
    """Constants of a head product, its warps and its stages: the largest that spill no register, of which noise takes many.

    The span never depends on the rows: see `scores`.
    """
    if dtype == "float32":
        return {"BLOCK_R": 16 if sampled else 32, "BLOCK_V": _SPAN, "BLOCK_D": 32, "PRECISION": "tf32x3"}, 8, 2
    block = 64 if few_rows or sampled else 128
    num_warps = 4 if few_rows and not sampled and arch() >= 90 else 8
    return {"BLOCK_R": block, "BLOCK_V": _SPAN, "BLOCK_D": 64, "PRECISION": "ieee"}, num_warps, 3


def supports_lm_head_scores(
    hidden, weight, temperature, key_data, counter_row, noise, active, banned, **static
) -> str | None:
    if len(weight.shape) != 2:
        return "it takes the weight as [V, D], not packed"
    return None


def lm_head_scores(
    hidden,
    weight,
    temperature,
    key_data,
    counter_row,
    noise,
    active,
    banned,
    *,
    confidence,
    tempered_confidence,
    logits_soft_cap,
    logits_dtype,
):
    """hidden [R,D]; weight [V,D]; the rest and the result as in `unmask.score_tokens`."""
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    tiles, num_warps, num_stages = _tiles(dtype_name(hidden), rows <= 64, temperature is not None)
    spans = triton.cdiv(vocabulary, _SPAN)
    per_span = {**scores.STATISTICS, **scores.CHOICES}
    outputs = {name: Out((rows, spans), dtype) for name, dtype in per_span.items()}
    if temperature is None:
        outputs |= dict.fromkeys(scores.CHOICES)
    rounds = {None: None, "float32": None, "bfloat16": tl.bfloat16, "float16": tl.float16}
    results = launch(
        _scores_kernel,
        _grid(hidden, tiles["BLOCK_R"], spans),
        inputs={
            "hidden": hidden, "weight": weight, "temperature": temperature,
            "key_data": key_data if noise is None else None, "counter_row": counter_row if noise is None else None,
            "noise": noise, "active": active, "banned": banned,
        },
        outputs=outputs,
        scalars={
            "rows": rows, "vocabulary": vocabulary, "width": width,
            "banned_count": 0 if banned is None else banned.shape[0],
            **strides(hidden, "hidden_r hidden_d"), **strides(weight, "weight_v weight_d"),
            **strides(hidden if noise is None else noise, "noise_r noise_v"),
        },
        constants={
            **tiles, "ROUND": rounds[None if logits_dtype is None else str(logits_dtype).removeprefix("torch.")],
            "TEMPERED": tempered_confidence, "SECOND": confidence == "margin", "SOFT_CAP": logits_soft_cap,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    results = dict(zip(outputs, results))
    return scores.merge(
        {name: results[name] for name in scores.STATISTICS},
        {name: results[name] for name in scores.CHOICES} if temperature is not None else None,
        active,
        rows=rows,
        spans=spans,
        vocabulary=vocabulary,
        confidence=confidence,
    )


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
    row = grouped_block() * BLOCK_R + tl.arange(0, BLOCK_R)
    tokens = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    wanted = row < rows
    wanted &= tl.load(active + row, mask=wanted, other=0) != 0
    if tl.max(wanted.to(tl.int32), 0) > 0:
        value = head_tile(
            hidden, weight, row, wanted, tokens, vocabulary, width, hidden_r, hidden_d, weight_v, weight_d,
            BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        if SOFT_CAP is not None:
            value = SOFT_CAP * tanh(value / SOFT_CAP)
        value = tl.where((tokens < vocabulary)[None, :], value, float("-inf"))
        tops, totals, _ = scores.summarize(value, 1)
        at = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(top + at, tops, mask=wanted)
        tl.store(total + at, totals, mask=wanted)
        target = tl.load(targets + row, mask=wanted, other=-1)
        hit = tokens[None, :] == target[:, None]
        mine = (tl.max(hit.to(tl.int32), 1) > 0) & (target < vocabulary)
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
        lane = tl.arange(0, BLOCK)
        tops = tl.load(top + row * spans + lane, mask=lane < spans, other=float("-inf"))
        totals = tl.load(total + row * spans + lane, mask=lane < spans, other=0.0)
        best = tl.max(tops, 0)
        base = tl.where(best == float("-inf"), 0.0, best)
        value = base + tl.log(tl.sum(totals * tl.exp(tops - base), 0))
        target = tl.load(targets + row)
        known = (target >= 0) & (target < vocabulary)
        tl.store(lse + row, value)
        tl.store(loss + row, tl.where(known, value - tl.load(chosen + row), float("nan")))
    else:
        tl.store(lse + row, 0.0)
        tl.store(loss + row, 0.0)


def supports_masked_cross_entropy_forward(hidden, weight, targets, active, **static) -> str | None:
    return None


def masked_cross_entropy_forward(hidden, weight, targets, active, *, logits_soft_cap):
    """hidden [R,D]; weight [V,D]; targets int32 [R]; active bool [R]. Returns loss and lse, float32 [R]; loss 0 where inactive."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    spans = triton.cdiv(vocabulary, _SPAN)
    tiles, num_warps, num_stages = _tiles(dtype_name(hidden), rows <= 64)
    top, total, chosen = launch(
        _loss_kernel,
        _grid(hidden, tiles["BLOCK_R"], spans),
        inputs={"hidden": hidden, "weight": weight, "targets": targets, "active": active},
        outputs={
            "top": Out((rows, spans), "float32"), "total": Out((rows, spans), "float32"),
            "chosen": Out((rows,), "float32"),
        },
        scalars=_sizes(hidden, weight),
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


def _sizes(hidden, weight):
    return {
        "rows": hidden.shape[0], "vocabulary": weight.shape[0], "width": hidden.shape[1],
        **strides(hidden, "hidden_r hidden_d"), **strides(weight, "weight_v weight_d"),
    }  # fmt: skip


@triton.jit
def _dlogits_kernel(
    hidden,  # [R, D]
    weight,  # [V, D]
    targets,  # int32 [R]
    active,  # bool [R]
    lse, dloss,  # float32 [R]
    dlogits,  # [R, CHUNK] in hidden's dtype; columns past the vocabulary and inactive rows get zeros
    rows, vocabulary, width,  # R, V, D
    first,  # the chunk's first token
    chunk,  # CHUNK
    hidden_r, hidden_d, weight_v, weight_d,
    SOFT_CAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = grouped_block() * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    tokens = first + column
    wanted = row < rows
    wanted &= tl.load(active + row, mask=wanted, other=0) != 0
    gradient = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        value = head_tile(
            hidden, weight, row, wanted, tokens, vocabulary, width, hidden_r, hidden_d, weight_v, weight_d,
            BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        gradient = tl.load(dloss + row, mask=wanted, other=0.0)[:, None]
        if SOFT_CAP is not None:
            bent = tanh(value / SOFT_CAP)
            value = SOFT_CAP * bent
            gradient = gradient * (1.0 - bent * bent)
        target = tl.load(targets + row, mask=wanted, other=-1)
        p = tl.exp(value - tl.load(lse + row, mask=wanted, other=0.0)[:, None])
        gradient = gradient * (p - (tokens[None, :] == target[:, None]).to(tl.float32))
        gradient = tl.where(wanted[:, None] & (tokens < vocabulary)[None, :], gradient, 0.0)
    at = dlogits + row.to(tl.int64)[:, None] * chunk + column[None, :]
    tl.store(at, gradient.to(dlogits.dtype.element_ty), mask=(row < rows)[:, None] & (column < chunk)[None, :])


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
    right_at = right + inner.to(tl.int64)[:, None] * right_k + j[None, :] * right_n
    step = tl.full([1, 1], BLOCK_K, tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = inner < k - start
        a = tl.load(left_at, mask=(i < m)[:, None] & inside[None, :], other=0)
        if HAS_SEEN:
            inside &= tl.load(seen + start + inner, mask=inside, other=0) != 0
        b = tl.load(right_at, mask=inside[:, None] & (j < n)[None, :], other=0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left_at += step * left_k
        right_at += step * right_k
    at = i.to(tl.int64)[:, None] * n + j[None, :]
    inside = (i < m)[:, None] & (j < n)[None, :]
    if HAS_ADDEND:
        total += tl.load(addend + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def _product(left, left_strides, right, seen, addend, m, n, k, dtype):
    """left [m, k] @ right [k, n] (+ addend) in `dtype`; left by its strides, so that it may be a transposed array."""
    if dtype_name(left) == "float32":
        tiles, num_warps, num_stages = {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 32, "PRECISION": "tf32x3"}, 8, 2
    else:
        tiles, num_warps, num_stages = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "PRECISION": "ieee"}, 8, 3
    return launch(
        _product_kernel,
        # 128 programs in flight make a square of tiles, 8 by 16, which reads 24 blocks of the operands and not 129.
        grouped(triton.cdiv(m, tiles["BLOCK_M"]), triton.cdiv(n, tiles["BLOCK_N"]), 8),
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


def supports_masked_cross_entropy_backward(hidden, weight, targets, active, lse, dloss, **static) -> str | None:
    return None


def masked_cross_entropy_backward(hidden, weight, targets, active, lse, dloss, *, logits_soft_cap):
    """lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    dtype = dtype_name(hidden)
    tiles, num_warps, num_stages = _tiles(dtype, rows <= 64)
    dhidden, dweight = None, []
    for first in range(0, vocabulary, _CHUNK):
        chunk = min(_CHUNK, vocabulary - first)
        (dlogits,) = launch(
            _dlogits_kernel,
            _grid(hidden, tiles["BLOCK_R"], triton.cdiv(chunk, tiles["BLOCK_V"])),
            inputs={
                "hidden": hidden, "weight": weight, "targets": targets, "active": active, "lse": lse, "dloss": dloss,
            },
            outputs={"dlogits": Out((rows, chunk), dtype)},
            scalars={**_sizes(hidden, weight), "first": first, "chunk": chunk},
            constants={**tiles, "SOFT_CAP": logits_soft_cap},
            num_warps=num_warps,
            num_stages=num_stages,
        )  # fmt: skip
        last = first + chunk == vocabulary
        weights = weight[first : first + chunk]
        dhidden = _product(
            dlogits, (chunk, 1), weights, None, dhidden, rows, width, chunk, dtype if last else "float32"
        )
        # An inactive row's hidden state may be NaN, which a gradient of zero does not silence.
        dweight.append(_product(dlogits, (1, chunk), hidden, active, None, chunk, width, rows, dtype))
    return dhidden, concatenate(dweight)
