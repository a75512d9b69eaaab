"""The unmasking of the most confident, by counting ranks: of scores that are given, or merged here from the spans' statistics."""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels import scores
from dlm_kernels.triton_kernels.launch import Out, launch

MAX_LENGTH = 8192  # positions of a row, in registers
RULES = "num_unmask", "threshold", "factor", "entropy_budget", "edit_threshold"
_COMPARED = 8192  # pairs of positions that a program compares at once, in registers
_MERGED = 4096  # statistics of a kind that a program merges at once, in registers
_MOST_MERGED = 2 * _MERGED  # of a row, a power of two of positions and of spans: more are left to a program per position


@triton.jit
def _quotient(a, n):
    """a / n of a whole n below 2^14, rounded as on other platforms: a confidence may be the bound that it makes. A GPU's own
    quotient is off by up to two units in the last place, and tl.div_rn is a call, for which some kernels keep registers on a stack.
    """
    rough = a / n
    # Exact in float64. What it comes to is too small for the rounding of 1 / n to count.
    rest = a.to(tl.float64) - rough.to(tl.float64) * n.to(tl.float64)
    exact = rough.to(tl.float64) + rest * (1.0 / n).to(tl.float64)
    return tl.where(tl.abs(rough) < float("inf"), exact.to(tl.float32), rough)


@triton.jit
def _topk_kernel(
    top, total, moment, second,  # float32 [B * L, SPANS] | None
    token,  # int32 [B * L, SPANS] | None
    sampled_score,  # float32 [B * L, SPANS] | None
    sampled,  # int32 [B * L, SPANS] | None
    sampled_logit,  # float32 [B * L, SPANS] | None
    tokens,  # int32 [B, L]
    eligible,  # bool [B, L]
    editable,  # bool [B, L] | None
    num_unmask,  # int32 [B] | None
    threshold, factor, entropy_budget, edit_threshold,  # float32 [B] | None
    proposal,  # int32 [B, L]; it, confidence and entropy are read, and written before where the statistics are given
    confidence,  # float32 [B, L]
    entropy,  # float32 [B, L] | None
    out_tokens,  # int32 [B, L]
    unmasked,  # bool [B, L]
    count,  # int32 [B]
    length, spans, vocabulary,  # L, SPANS, V
    HAS_TOP: tl.constexpr,
    HAS_SAMPLED: tl.constexpr,
    HAS_EDITABLE: tl.constexpr,
    HAS_NUM_UNMASK: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_ENTROPY_BUDGET: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least L
    OTHERS: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,  # a power of two, at least SPANS
    MERGED: tl.constexpr,  # positions
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < length
    row = b * length
    is_eligible = (tl.load(eligible + row + at, mask=inside, other=0) != 0) & inside
    wanted = is_eligible
    if HAS_EDITABLE:
        is_editable = (tl.load(editable + row + at, mask=inside, other=0) != 0) & inside
        wanted |= is_editable
    # Nothing outside changes, and a block is a small part of a long canvas: [first, last).
    first = tl.min(tl.where(wanted, at, BLOCK), 0)
    last = tl.max(tl.where(wanted, at + 1, 0), 0)
    if HAS_TOP:
        for start in range(first, last, MERGED):
            i = start + tl.arange(0, MERGED)
            there = i < last
            chosen, merged, uncertain, _ = scores.merged_scores(
                top, total, moment, second, token, sampled_score, sampled, sampled_logit,
                row + tl.minimum(i, last - 1), spans, vocabulary, HAS_SAMPLED, CONFIDENCE, BLOCK_SPANS, 1,
            )  # fmt: skip
            tl.store(proposal + row + i, chosen, mask=there)
            tl.store(confidence + row + i, merged, mask=there)
            if HAS_ENTROPY_BUDGET:
                tl.store(entropy + row + i, uncertain, mask=there)
        # Other threads read below what these have written.
        tl.debug_barrier()
    raw = tl.load(confidence + row + at, mask=inside, other=float("-inf"))
    sure = tl.where(raw != raw, float("-inf"), raw)
    order = sure
    if HAS_ENTROPY_BUDGET:
        mine = tl.load(entropy + row + at, mask=inside, other=float("inf"))
        order = tl.where(mine != mine, float("-inf"), -mine)
    rank = tl.zeros([BLOCK], tl.int32)
    spent = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, OTHERS):
        j = start + tl.arange(0, OTHERS)
        there = j < last
        there &= tl.load(eligible + row + j, mask=there, other=0) != 0
        if not HAS_ENTROPY_BUDGET:
            other = tl.load(confidence + row + j, mask=there, other=float("-inf"))
            other = tl.where(other != other, float("-inf"), other)
        else:
            uncertain = tl.load(entropy + row + j, mask=there, other=0.0)
            other = tl.where(uncertain != uncertain, float("-inf"), -uncertain)
        before = other[None, :] > order[:, None]
        before |= (other[None, :] == order[:, None]) & (j[None, :] < at[:, None])
        before &= there[None, :]
        rank += tl.sum(before.to(tl.int32), 1)
        if HAS_ENTROPY_BUDGET:
            spent += tl.sum(tl.where(before, uncertain[None, :], 0.0), 1)
    all_eligible = tl.sum(is_eligible.to(tl.int32), 0)
    n = 0
    if HAS_NUM_UNMASK:
        n = tl.maximum(n, tl.load(num_unmask + b))
    if HAS_THRESHOLD:
        above = is_eligible & (sure > tl.load(threshold + b))
        n = tl.maximum(n, tl.maximum(1, tl.sum(above.to(tl.int32), 0)))
    if HAS_FACTOR:
        bound = 1.0 - _quotient(tl.load(factor + b), (rank + 2).to(tl.float32))
        failed = is_eligible & (rank > 0) & ~(sure >= bound)
        n = tl.maximum(n, tl.min(tl.where(failed, rank, BLOCK), 0))
    if HAS_ENTROPY_BUDGET:
        within = spent <= tl.load(entropy_budget + b)
        failed = is_eligible & (rank > 0) & (within == 0)
        n = tl.maximum(n, tl.min(tl.where(failed, rank, BLOCK), 0))
    taken = is_eligible & (rank < n)
    changed = taken
    if HAS_EDITABLE:
        changed |= is_editable & (raw > tl.load(edit_threshold + b))
    old = tl.load(tokens + row + at, mask=inside, other=0)
    new = tl.load(proposal + row + at, mask=inside, other=0)
    tl.store(out_tokens + row + at, tl.where(changed, new, old), mask=inside)
    tl.store(unmasked + row + at, taken, mask=inside)
    tl.store(count + b, tl.minimum(tl.maximum(n, 0), all_eligible))


def merges(length, spans):
    """True where one program may merge all of a row's statistics, which saves a launch; beyond, it would take longer than that."""
    return triton.next_power_of_2(length) * triton.next_power_of_2(spans) <= _MOST_MERGED


def unmask(tokens, eligible, editable, rules, *, scored=None, statistics=None, spans=0, vocabulary=0, confidence=None):
    """tokens int32, eligible, editable bool, each [B,L]; rules: [B] or None by the names of RULES. Either scored: proposal int32,
    confidence, entropy float32, each [B,L]; or statistics: [B*L,SPANS], or None, by their names, and what confidence they make.

    Returns tokens int32 [B,L], unmasked bool [B,L], count int32 [B].
    """
    batch, length = tokens.shape
    block, block_spans = max(16, triton.next_power_of_2(length)), triton.next_power_of_2(max(1, spans))
    read, written = {}, {}
    if statistics is None:
        statistics = dict.fromkeys([*scores.STATISTICS, *scores.SAMPLES])
        read = dict(zip(("proposal", "confidence", "entropy"), scored))
    else:
        written = {"proposal": Out((batch, length), "int32"), "confidence": Out((batch, length), "float32"), "entropy": None}
        if rules["entropy_budget"] is not None:
            written["entropy"] = written["confidence"]
    results = launch(
        _topk_kernel,
        (batch,),
        inputs={
            **statistics, "tokens": tokens, "eligible": eligible, "editable": editable,
            **{name: rules[name] for name in RULES}, **read,
        },
        outputs={
            **written,
            "out_tokens": Out((batch, length), "int32"),
            "unmasked": Out((batch, length), "bool"),
            "count": Out((batch,), "int32"),
        },
        scalars={"length": length, "spans": spans, "vocabulary": vocabulary},
        constants={
            "CONFIDENCE": confidence, "BLOCK": block, "OTHERS": max(1, min(block, _COMPARED // block)),
            "BLOCK_SPANS": block_spans, "MERGED": min(block, _MERGED // block_spans),
        },
        num_warps=4 if block <= 1024 and not spans else 8,
    )  # fmt: skip
    return results[-3:]
