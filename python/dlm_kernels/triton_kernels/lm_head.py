"""The LM head and the scores of its logits, taken in the epilogue of the matrix product."""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels import head, scores
from dlm_kernels.triton_kernels.head import head_tile, tile_of_head
from dlm_kernels.triton_kernels.launch import Out, launch, strides
from dlm_kernels.triton_kernels.numerics import gumbel, tanh


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
    sampled_score,  # float32 [R, SPANS] | None
    sampled,  # int32 [R, SPANS] | None
    sampled_logit,  # float32 [R, SPANS] | None
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
    row, wanted, tokens = tile_of_head(active, rows, HAS_ACTIVE, BLOCK_R, BLOCK_V)
    start = tl.program_id(1) * BLOCK_V
    if tl.max(wanted.to(tl.int32), 0) > 0:
        value = head_tile(
            hidden, weight, row, wanted, tokens, vocabulary, width, hidden_r, hidden_d, weight_v, weight_d,
            BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        if ROUND is not None:
            value = value.to(ROUND).to(tl.float32)
        if SOFT_CAP is not None:
            value = SOFT_CAP * tanh(value * (1.0 / SOFT_CAP))
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
                    counter = tl.load(counter_row + row, mask=wanted, other=0).to(tl.int64) * vocabulary  # of token 0
                    draw = gumbel(key0, key1, counter[:, None] + tokens[None, :])
                else:
                    at_noise = noise + row.to(tl.int64)[:, None] * noise_r + tokens.to(tl.int64)[None, :] * noise_v
                    draw = tl.load(at_noise, mask=wanted[:, None] & (tokens < vocabulary)[None, :], other=0.0)
                drawn = tl.where((heat > 0.0)[:, None], tempered + draw, tempered)
            if TEMPERED:
                value = tempered
            drawn_winner = tl.argmax(drawn, 1)
            of_winner = tl.where(tl.arange(0, BLOCK_V)[None, :] == drawn_winner[:, None], value, float("-inf"))
            tl.store(sampled_score + at, tl.max(drawn, 1), mask=wanted)
            tl.store(sampled + at, start + drawn_winner, mask=wanted)
            tl.store(sampled_logit + at, tl.max(of_winner, 1), mask=wanted)
        tops = tl.max(value, 1)
        # Before the sums: after them it takes more registers than let two programs share a multiprocessor.
        winner = tl.argmax(value, 1)
        totals, moments = scores.summarize(value, tops, 1)
        tl.store(top + at, tops, mask=wanted)
        tl.store(total + at, totals, mask=wanted)
        tl.store(moment + at, moments, mask=wanted)
        if SECOND:
            tl.store(second + at, scores.second_of(value, winner, 1), mask=wanted)
        tl.store(token + at, start + winner, mask=wanted)


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
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    tiles, num_warps, num_stages = head.tiles(hidden, temperature is not None)
    spans = triton.cdiv(vocabulary, head.SPAN)
    per_span = {**scores.STATISTICS, **scores.SAMPLES}
    outputs = {name: Out((rows, spans), dtype) for name, dtype in per_span.items()}
    if temperature is None:
        outputs |= dict.fromkeys(scores.SAMPLES)
    rounds = {None: None, "float32": None, "bfloat16": tl.bfloat16, "float16": tl.float16}
    results = launch(
        _scores_kernel,
        head.grid(hidden, tiles["BLOCK_R"], spans),
        inputs={
            "hidden": hidden, "weight": weight, "temperature": temperature,
            "key_data": key_data, "counter_row": counter_row, "noise": noise, "active": active, "banned": banned,
        },
        outputs=outputs,
        scalars={
            **head.sizes(hidden, weight, tiles["BLOCK_D"]),
            "banned_count": 0 if banned is None else banned.shape[0],
            **strides(hidden if noise is None else noise, "noise_r noise_v"),
        },
        constants={
            **tiles, "ROUND": rounds[None if logits_dtype is None else str(logits_dtype)],
            "TEMPERED": tempered_confidence, "SECOND": confidence == "margin", "SOFT_CAP": logits_soft_cap,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    statistics = dict(zip(outputs, results))
    return scores.merge(statistics, active, rows=rows, spans=spans, vocabulary=vocabulary, confidence=confidence)
