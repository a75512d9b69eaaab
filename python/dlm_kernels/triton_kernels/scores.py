"""A row's statistics over its vocabulary, span by span: what a span leaves behind, and how the spans of a row merge.

A span is a fixed run of the vocabulary, whatever the number of rows, so that a row's bits do not depend on its batch.
Of each span remain: `top`, the greatest value; `total`, the sum of exp(value - top); `moment`, the sum of
(value - top) * exp(value - top); `second`, the value after the greatest, which equals it on a tie; `token`, where the
greatest is. At a temperature there are also `sampled_score`, the greatest of value / temperature + noise; `sampled`, that
token; and `sampled_logit`, its value.
"""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels.launch import Out, launch
from dlm_kernels.triton_kernels.numerics import exp

STATISTICS = {"top": "float32", "total": "float32", "moment": "float32", "second": "float32", "token": "int32"}
SAMPLES = {"sampled_score": "float32", "sampled": "int32", "sampled_logit": "float32"}


@triton.jit
def summarize(value, top, axis: tl.constexpr):
    """total and moment of float32 values along an axis; -inf counts for nothing, NaN or +inf makes total NaN."""
    away = value - tl.expand_dims(tl.where(top == float("-inf"), 0.0, top), axis)
    weight = exp(away)
    # At -1000 the weight is 0, which times -inf would be NaN.
    return tl.sum(weight, axis), tl.sum(tl.maximum(away, -1000.0) * weight, axis)


@triton.jit
def second_of(value, place, axis: tl.constexpr):
    """The greatest value along the last axis but for the one at `place`."""
    here = tl.arange(0, value.shape[axis]) == tl.expand_dims(place, axis)
    return tl.max(tl.where(here, float("-inf"), value), axis)


@triton.jit
def merged(
    top, total,  # float32 [R, SPANS]
    row,  # int64, or int64 [N] with AXIS 1
    spans,  # SPANS
    BLOCK: tl.constexpr,
    AXIS: tl.constexpr = 0,
):  # fmt: skip
    """Of a row's spans top, total and how much each counts, float32 [BLOCK]; of the row its greatest value, 0 for -inf, and the sum
    of exp(value - that). With AXIS 1 of N rows, [N, BLOCK] and [N].
    """
    lane = tl.arange(0, BLOCK)
    at = tl.expand_dims(row, AXIS) * spans + lane
    tops = tl.load(top + at, mask=lane < spans, other=float("-inf"))
    totals = tl.load(total + at, mask=lane < spans, other=0.0)
    best = tl.max(tops, AXIS)
    base = tl.where(best == float("-inf"), 0.0, best)
    share = exp(tops - tl.expand_dims(base, AXIS))
    return tops, totals, share, base, tl.sum(totals * share, AXIS)


@triton.jit
def merged_scores(
    top, total, moment, second,  # float32 [R, SPANS]
    token,  # int32 [R, SPANS]
    sampled_score,  # float32 [R, SPANS] | None
    sampled,  # int32 [R, SPANS] | None
    sampled_logit,  # float32 [R, SPANS] | None
    row,  # int64, or int64 [N] with AXIS 1
    spans,  # SPANS
    vocabulary,  # V
    HAS_SAMPLED: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    BLOCK: tl.constexpr,
    AXIS: tl.constexpr = 0,
):  # fmt: skip
    """A row's token, confidence, entropy and logsumexp; with AXIS 1 of N rows, each [N]."""
    tops, totals, share, base, whole = merged(top, total, row, spans, BLOCK, AXIS)
    best = tl.max(tops, AXIS)
    lane = tl.arange(0, BLOCK)
    inside = lane < spans
    at = tl.expand_dims(row, AXIS) * spans + lane
    moments = tl.load(moment + at, mask=inside, other=0.0)
    # A span of nothing but -inf has total 0 and an infinite distance: their product would be NaN.
    moments = tl.where(totals == 0.0, 0.0, moments + (tops - tl.expand_dims(base, AXIS)) * totals)
    mean = tl.sum(moments * share, AXIS) / whole
    # Without NaN, compared with which each lane of a warp would find another winner, perhaps past the last span.
    winner = tl.argmax(tl.where(tops == tops, tops, float("-inf")), AXIS)
    if not HAS_SAMPLED:
        value = best
        chosen = tl.load(token + row * spans + winner)
    else:
        drawn = tl.load(sampled_score + at, mask=inside, other=float("-inf"))
        drawn_winner = tl.argmax(tl.where(drawn == drawn, drawn, float("-inf")), AXIS)
        value = tl.load(sampled_logit + row * spans + drawn_winner)
        chosen = tl.load(sampled + row * spans + drawn_winner)
    entropy = tl.log(whole) - mean
    if CONFIDENCE == "probability":
        sure = exp(value - base) / whole
    elif CONFIDENCE == "margin":
        seconds = tl.load(second + at, mask=inside, other=float("-inf"))
        others = tl.where(lane == tl.expand_dims(winner, AXIS), float("-inf"), tops)
        after = tl.maximum(tl.max(seconds, AXIS), tl.max(others, AXIS))
        sure = (1.0 - exp(after - base)) / whole
    else:
        sure = -entropy
    defined = (best > float("-inf")) & (best < float("inf")) & (whole > 0.0)
    sure = tl.where(defined, sure, float("nan"))
    entropy = tl.where(defined, entropy, float("nan"))
    # log(0) + 0 for a row that is all -inf; +inf stays +inf, NaN stays NaN.
    logsumexp = tl.where(best == float("inf"), best, base + tl.log(whole))
    return tl.minimum(tl.maximum(chosen, 0), vocabulary - 1), sure, entropy, logsumexp


@triton.jit
def _merge_kernel(
    top, total, moment, second,  # float32 [R, SPANS]
    token,  # int32 [R, SPANS]
    sampled_score,  # float32 [R, SPANS] | None
    sampled,  # int32 [R, SPANS] | None
    sampled_logit,  # float32 [R, SPANS] | None
    active,  # bool [R] | None
    out_token,  # int32 [R]
    out_confidence, out_entropy, out_logsumexp,  # float32 [R]
    spans,  # SPANS
    vocabulary,  # V
    HAS_SAMPLED: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wanted = True
    if HAS_ACTIVE:
        wanted = tl.load(active + row) != 0
    if wanted:
        chosen, sure, uncertain, logsumexp = merged_scores(
            top, total, moment, second, token, sampled_score, sampled, sampled_logit,
            row, spans, vocabulary, HAS_SAMPLED, CONFIDENCE, BLOCK,
        )  # fmt: skip
        tl.store(out_token + row, chosen)
        tl.store(out_confidence + row, sure)
        tl.store(out_entropy + row, uncertain)
        tl.store(out_logsumexp + row, logsumexp)
    else:
        tl.store(out_token + row, -1)
        tl.store(out_confidence + row, float("-inf"))
        tl.store(out_entropy + row, float("inf"))
        tl.store(out_logsumexp + row, float("-inf"))


def merge(statistics, active, *, rows, spans, vocabulary, confidence):
    """statistics: [R, SPANS] by the names of STATISTICS and SAMPLES, which may be None. Returns the four results, each [R]."""
    block = max(16, triton.next_power_of_2(spans))
    return launch(
        _merge_kernel,
        (rows,),
        inputs={**statistics, "active": active},
        outputs={
            "out_token": Out((rows,), "int32"),
            **{f"out_{name}": Out((rows,), "float32") for name in ("confidence", "entropy", "logsumexp")},
        },
        scalars={"spans": spans, "vocabulary": vocabulary},
        constants={"CONFIDENCE": confidence, "BLOCK": block},
        num_warps=4 if block <= 2048 else 8,
    )
