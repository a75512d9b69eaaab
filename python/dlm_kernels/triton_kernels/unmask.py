"""Scores of tokens from logits, read once; and the unmasking of the most confident, of given scores or in the same step."""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels import ranks, scores
from dlm_kernels.triton_kernels.launch import Out, launch, strides
from dlm_kernels.triton_kernels.numerics import GREATEST_GUMBEL, gumbel, mixed, tanh

_SPAN = 8192  # tokens per program, in registers
_GROUP = tl.constexpr(4)  # tokens that are read again where the greatest of a span is among them


@triton.jit
def _span_logits(
    logits,  # [R, V]
    unconditional,  # [R, V] | None
    guidance_scale,  # float32 [R] | None
    banned,  # int32 [M] | None
    row,  # int64
    start,  # int32, the span's first token
    vocabulary,  # V
    banned_count,  # M
    logits_r, logits_v, unconditional_r, unconditional_v,
    HAS_UNCONDITIONAL: tl.constexpr,
    HAS_BANNED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """float32 [SPAN]: the logits of a span, mixed, capped and banned; -inf past the vocabulary."""
    lane = tl.arange(0, SPAN)
    inside = lane < vocabulary - start
    token = start.to(tl.int64) + lane
    value = tl.load(logits + row * logits_r + token * logits_v, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_UNCONDITIONAL:
        other = tl.load(unconditional + row * unconditional_r + token * unconditional_v, mask=inside, other=float("-inf"))
        value = mixed(value, other.to(tl.float32), tl.load(guidance_scale + row))
    if SOFT_CAP is not None:
        value = tl.where(inside, SOFT_CAP * tanh(value * (1.0 / SOFT_CAP)), float("-inf"))
    if HAS_BANNED:
        for i in range(banned_count):
            ban = tl.load(banned + i)
            if (ban >= start) & (ban < start + SPAN):
                # By group and place in it, of which a thread has few; to keep its tokens takes as many registers as the values.
                group = tl.arange(0, SPAN // _GROUP) == (ban - start) // _GROUP
                place = tl.arange(0, _GROUP) == (ban - start) % _GROUP
                grouped = tl.reshape(value, [SPAN // _GROUP, _GROUP])
                value = tl.reshape(tl.where(group[:, None] & place[None, :], float("-inf"), grouped), [SPAN])
    return value


@triton.jit
def _score_kernel(
    logits,  # [R, V]
    unconditional,  # [R, V] | None
    guidance_scale,  # float32 [R] | None
    temperature,  # float32 [R] | None; given only where the distribution is tempered
    active,  # bool [R] | None
    banned,  # int32 [M] | None
    top, total, moment, second,  # float32 [R, SPANS]
    token,  # int32 [R, SPANS]
    vocabulary,  # V
    banned_count,  # M
    logits_r, logits_v, unconditional_r, unconditional_v,
    HAS_UNCONDITIONAL: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    HAS_BANNED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SECOND: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wanted = True
    if HAS_ACTIVE:
        wanted = tl.load(active + row) != 0
    if wanted:
        start = tl.program_id(1) * SPAN
        value = _span_logits(
            logits, unconditional, guidance_scale, banned, row, start, vocabulary, banned_count,
            logits_r, logits_v, unconditional_r, unconditional_v, HAS_UNCONDITIONAL, HAS_BANNED, SOFT_CAP, SPAN,
        )  # fmt: skip
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + row)
            value = value / tl.where(heat > 0.0, heat, 1.0)
        groups = tl.max(tl.reshape(value, [SPAN // _GROUP, _GROUP]), 1)
        tops = tl.max(groups, 0)
        totals, moments = scores.summarize(value, tops, 0)
        # Instructions bound this kernel, and to look for the token among all values in registers takes a sixth more.
        group = tl.arange(0, SPAN // _GROUP)
        near = start + _GROUP * tl.min(tl.where(groups == tops, group, SPAN // _GROUP - 1), 0)
        few = _span_logits(
            logits, unconditional, guidance_scale, banned, row, near, vocabulary, banned_count,
            logits_r, logits_v, unconditional_r, unconditional_v, HAS_UNCONDITIONAL, HAS_BANNED, SOFT_CAP, _GROUP,
        )  # fmt: skip
        if HAS_TEMPERATURE:
            few = few / tl.where(heat > 0.0, heat, 1.0)
        top_token = near + tl.argmax(few, 0)
        at = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(top + at, tops)
        tl.store(total + at, totals)
        tl.store(moment + at, moments)
        if SECOND:
            tl.store(second + at, scores.second_of(value, top_token - start, 0))
        tl.store(token + at, top_token)


@triton.jit
def _draw_kernel(
    logits,  # [R, V]
    unconditional,  # [R, V] | None
    guidance_scale,  # float32 [R] | None
    temperature,  # float32 [R]
    key_data,  # uint32 [R, 2] | None
    counter_row,  # int32 [R] | None
    noise,  # float32 [R, V] | None
    active,  # bool [R] | None
    banned,  # int32 [M] | None
    top,  # float32 [R, SPANS], of the spans' statistics
    token,  # int32 [R, SPANS]
    sampled_score,  # float32 [R, SPANS]
    sampled,  # int32 [R, SPANS]
    sampled_logit,  # float32 [R, SPANS]
    vocabulary,  # V
    spans,  # SPANS
    banned_count,  # M
    logits_r, logits_v, unconditional_r, unconditional_v, noise_r, noise_v,
    HAS_UNCONDITIONAL: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    HAS_BANNED: tl.constexpr,
    TEMPERED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least SPANS
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wanted = True
    if HAS_ACTIVE:
        wanted = tl.load(active + row) != 0
    if wanted:
        heat = tl.load(temperature + row)
        hot = heat > 0.0
        divisor = tl.where(hot, heat, 1.0)
        lane = tl.arange(0, BLOCK)
        tops = tl.load(top + row * spans + lane, mask=lane < spans, other=float("-inf"))
        # Without NaN, compared with which each lane of a warp would find another token, and go another way below.
        tops = tl.where(tops == tops, tops, float("-inf"))
        at = row * spans + tl.program_id(1)
        mine = tl.load(top + at)
        best = tl.max(tops, 0)
        if not TEMPERED:
            mine = mine / divisor
            best = best / divisor
        # What the row's greatest logit draws is beaten only by a span that comes within the greatest draw of it.
        bar = best
        if not HAS_NOISE:
            likely = tl.load(token + row * spans + tl.argmax(tops, 0))
            key0 = tl.load(key_data + 2 * row)
            key1 = tl.load(key_data + 2 * row + 1)
            counter = tl.load(counter_row + row).to(tl.int64) * vocabulary  # of token 0
            if hot:
                bar = best + gumbel(key0, key1, counter + likely) - GREATEST_GUMBEL
        else:
            bar = tl.where(hot, float("-inf"), best)
        if mine < bar:
            tl.store(sampled_score + at, float("-inf"))
            tl.store(sampled + at, 0)
            tl.store(sampled_logit + at, float("-inf"))
        else:
            start = tl.program_id(1) * SPAN
            tokens = start.to(tl.int64) + tl.arange(0, SPAN)
            value = _span_logits(
                logits, unconditional, guidance_scale, banned, row, start, vocabulary, banned_count,
                logits_r, logits_v, unconditional_r, unconditional_v, HAS_UNCONDITIONAL, HAS_BANNED, SOFT_CAP, SPAN,
            )  # fmt: skip
            tempered = value / divisor
            drawn = tempered
            if hot:
                if not HAS_NOISE:
                    drawn = tempered + gumbel(key0, key1, counter + tokens)
                else:
                    at_noise = noise + row * noise_r + tokens * noise_v
                    drawn = tempered + tl.load(at_noise, mask=tokens < vocabulary, other=0.0)
            if TEMPERED:
                value = tempered
            drawn_winner = tl.argmax(drawn, 0)
            tl.store(sampled_score + at, tl.max(drawn, 0))
            tl.store(sampled + at, start + drawn_winner)
            tl.store(sampled_logit + at, tl.max(tl.where(tl.arange(0, SPAN) == drawn_winner, value, float("-inf")), 0))


def _statistics(
    logits, unconditional, guidance_scale, temperature, key_data, counter_row, noise, active, banned,
    *, confidence, tempered_confidence, logits_soft_cap,
):  # fmt: skip
    """Of every span of every row, [R,SPANS], by the names of STATISTICS and SAMPLES; without a temperature these are None."""
    rows, vocabulary = logits.shape
    spans = triton.cdiv(vocabulary, _SPAN)
    source = {"logits": logits, "unconditional": unconditional, "guidance_scale": guidance_scale}
    sizes = {
        "vocabulary": vocabulary,
        "banned_count": 0 if banned is None else banned.shape[0],
        **strides(logits, "logits_r logits_v"),
        **strides(logits if unconditional is None else unconditional, "unconditional_r unconditional_v"),
    }
    constants = {"SOFT_CAP": logits_soft_cap, "SPAN": _SPAN}
    per_span = {name: Out((rows, spans), dtype) for name, dtype in scores.STATISTICS.items()}
    statistics = launch(
        _score_kernel,
        (rows, spans),
        inputs={**source, "temperature": temperature if tempered_confidence else None, "active": active, "banned": banned},
        outputs=per_span,
        scalars=sizes,
        constants={**constants, "SECOND": confidence == "margin"},
        num_warps=4,
    )
    statistics = dict(zip(per_span, statistics))
    samples = dict.fromkeys(scores.SAMPLES)
    if temperature is not None:
        drawn = {name: Out((rows, spans), dtype) for name, dtype in scores.SAMPLES.items()}
        samples = launch(
            _draw_kernel,
            (rows, spans),
            inputs={
                **source, "temperature": temperature, "key_data": key_data, "counter_row": counter_row, "noise": noise,
                "active": active, "banned": banned, "top": statistics["top"], "token": statistics["token"],
            },
            outputs=drawn,
            scalars={**sizes, "spans": spans, **strides(logits if noise is None else noise, "noise_r noise_v")},
            constants={
                **constants, "TEMPERED": tempered_confidence, "BLOCK": max(16, triton.next_power_of_2(spans)),
            },
            num_warps=8,
        )  # fmt: skip
        samples = dict(zip(drawn, samples))
    return statistics | samples


def score_tokens(
    logits,
    unconditional,
    guidance_scale,
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
):
    """logits, unconditional [R,V]; guidance_scale, temperature float32 [R]; key_data uint32 [R,2]; counter_row int32 [R];
    noise float32 [R,V]; active bool [R]; banned int32 [M]. Returns token int32, confidence, entropy, logsumexp float32, each [R].
    """
    source = logits, unconditional, guidance_scale, temperature, key_data, counter_row, noise, active, banned
    statistics = _statistics(
        *source, confidence=confidence, tempered_confidence=tempered_confidence, logits_soft_cap=logits_soft_cap
    )
    rows, vocabulary = logits.shape
    spans = triton.cdiv(vocabulary, _SPAN)
    return scores.merge(statistics, active, rows=rows, spans=spans, vocabulary=vocabulary, confidence=confidence)


def supports_unmask_topk(tokens, *operands, **rules) -> str | None:
    if tokens.shape[1] > ranks.MAX_LENGTH:
        return f"a row is ranked in registers, so at most {ranks.MAX_LENGTH} positions, and tokens has {tokens.shape[1]}"
    return None


def unmask_topk(
    tokens,
    proposal,
    confidence,
    entropy,
    eligible,
    editable,
    num_unmask,
    threshold,
    factor,
    entropy_budget,
    edit_threshold,
):
    """tokens, proposal int32, confidence, entropy float32, eligible, editable bool, each [B,L]; the rules [B], num_unmask int32,
    the others float32.

    Returns tokens int32 [B,L], unmasked bool [B,L], count int32 [B].
    """
    rules = dict(zip(ranks.RULES, (num_unmask, threshold, factor, entropy_budget, edit_threshold)))
    return ranks.unmask(tokens, eligible, editable, rules, scored=(proposal, confidence, entropy))


def supports_unmask_step(logits, *operands, **options) -> str | None:
    _, length, vocabulary = logits.shape
    if not ranks.merges(length, spans := triton.cdiv(vocabulary, _SPAN)):
        return f"a row's {length} positions of {spans} spans are more than one program merges: they are merged in a launch between"
    return None


def unmask_step(
    logits,
    unconditional,
    guidance_scale,
    temperature,
    key_data,
    counter_row,
    noise,
    active,
    banned,
    tokens,
    eligible,
    editable,
    *,
    confidence,
    tempered_confidence,
    logits_soft_cap,
    **rules,
):
    """As `score_tokens` and `unmask_topk`, without a launch between them: that of the second merges the spans too.

    The operands of `score_tokens` have the axes [B,L] for [R]; active is true where eligible or editable.
    """

    def rows(array, *width):
        return None if array is None else array.reshape(-1, *width)

    vocabulary = logits.shape[-1]
    statistics = _statistics(
        rows(logits, vocabulary), rows(unconditional, vocabulary), rows(guidance_scale), rows(temperature), rows(key_data, 2),
        rows(counter_row), rows(noise, vocabulary), rows(active), banned,
        confidence=confidence, tempered_confidence=tempered_confidence, logits_soft_cap=logits_soft_cap,
    )  # fmt: skip
    return ranks.unmask(
        tokens, eligible, editable, rules,
        statistics=statistics, spans=triton.cdiv(vocabulary, _SPAN), vocabulary=vocabulary, confidence=confidence,
    )  # fmt: skip
