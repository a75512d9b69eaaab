"""The divergence of an LM head's distribution from a target's, and its gradients, without the logits of either in memory.

As in cross_entropy.py, but that a program makes the same tile of both heads' logits.
"""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels import head, scores
from dlm_kernels.triton_kernels.head import head_tile, tile_of_head
from dlm_kernels.triton_kernels.head_loss import head_gradients
from dlm_kernels.triton_kernels.launch import Out, launch, strides
from dlm_kernels.triton_kernels.numerics import exp


@triton.jit
def _divergence_kernel(
    hidden,  # [R, D]
    weight,  # [V, D]
    target_hidden,  # [R, E]
    target_weight,  # [V, E]
    active,  # bool [R]
    top, total,  # float32 [R, SPANS]
    target_top, target_total,  # float32 [R, SPANS]
    gap,  # float32 [R, SPANS]; the sum of exp(target - target_top) * (target - logit)
    rows, vocabulary, width, target_width,  # R, V, D, E
    hidden_r, hidden_d, weight_v, weight_d,
    target_hidden_r, target_hidden_e, target_weight_v, target_weight_e,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, wanted, tokens = tile_of_head(active, rows, True, BLOCK_R, BLOCK_V)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        value = head_tile(
            hidden, weight, row, wanted, tokens, vocabulary, width, hidden_r, hidden_d, weight_v, weight_d,
            BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        target = head_tile(
            target_hidden, target_weight, row, wanted, tokens, vocabulary, target_width,
            target_hidden_r, target_hidden_e, target_weight_v, target_weight_e, BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        value = tl.where((tokens < vocabulary)[None, :], value, float("-inf"))
        target = tl.where((tokens < vocabulary)[None, :], target, float("-inf"))
        tops, target_tops = tl.max(value, 1), tl.max(target, 1)
        target_totals, _ = scores.summarize(target, target_tops, 1)
        p = exp(target - tl.where(target_tops == float("-inf"), 0.0, target_tops)[:, None])
        # What the target excludes counts for nothing, where the difference is infinite too.
        gaps = tl.sum(tl.where(p == 0.0, 0.0, p * (target - value)), 1)
        totals, _ = scores.summarize(value, tops, 1)
        at = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(top + at, tops, mask=wanted)
        tl.store(total + at, totals, mask=wanted)
        tl.store(target_top + at, target_tops, mask=wanted)
        tl.store(target_total + at, target_totals, mask=wanted)
        tl.store(gap + at, gaps, mask=wanted)


@triton.jit
def _divergence_merge_kernel(
    top, total,  # float32 [R, SPANS]
    target_top, target_total,  # float32 [R, SPANS]
    gap,  # float32 [R, SPANS]
    active,  # bool [R]
    loss, lse, target_lse,  # float32 [R]; all 0 where not active
    spans,  # SPANS
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active + row) != 0:
        _, _, _, base, whole = scores.merged(top, total, row, spans, BLOCK)
        value = base + tl.log(whole)
        _, _, share, base, whole = scores.merged(target_top, target_total, row, spans, BLOCK)
        target = base + tl.log(whole)
        lane = tl.arange(0, BLOCK)
        gaps = tl.load(gap + row * spans + lane, mask=lane < spans, other=0.0)
        # A span that the target excludes counts for nothing either: its own greatest has an infinite gap where the logit is -inf.
        gaps = tl.where(share == 0.0, 0.0, gaps * share)
        tl.store(lse + row, value)
        tl.store(target_lse + row, target)
        tl.store(loss + row, tl.sum(gaps, 0) / whole + value - target)
    else:
        tl.store(lse + row, 0.0)
        tl.store(target_lse + row, 0.0)
        tl.store(loss + row, 0.0)


def _target_sizes(target_hidden, target_weight, depth):
    return {
        "target_width": target_hidden.shape[1],
        **strides(target_hidden, "target_hidden_r target_hidden_e", target_hidden_e=depth),
        **strides(target_weight, "target_weight_v target_weight_e", target_weight_e=depth),
    }  # fmt: skip


def masked_divergence_forward(hidden, weight, target_hidden, target_weight, active):
    """hidden [R,D]; weight [V,D]; target_hidden [R,E]; target_weight [V,E]; active bool [R].

    Returns loss, lse and target_lse, float32 [R]; 0 where inactive.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    spans = triton.cdiv(vocabulary, head.SPAN)
    tiles, num_warps, num_stages = head.tiles(hidden)
    sums = ("top", "total", "target_top", "target_total", "gap")
    found = launch(
        _divergence_kernel,
        head.grid(hidden, tiles["BLOCK_R"], spans, target_hidden.shape[1]),
        inputs={
            "hidden": hidden, "weight": weight, "target_hidden": target_hidden, "target_weight": target_weight,
            "active": active,
        },
        outputs=dict.fromkeys(sums, Out((rows, spans), "float32")),
        scalars={
            **head.sizes(hidden, weight, tiles["BLOCK_D"]), **_target_sizes(target_hidden, target_weight, tiles["BLOCK_D"]),
        },
        constants=tiles,
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return launch(
        _divergence_merge_kernel,
        (rows,),
        inputs={**dict(zip(sums, found)), "active": active},
        outputs=dict.fromkeys(("loss", "lse", "target_lse"), Out((rows,), "float32")),
        scalars={"spans": spans},
        constants={"BLOCK": max(16, triton.next_power_of_2(spans))},
    )


@triton.jit
def _divergence_dlogits_kernel(
    hidden,  # [R, D]
    weight,  # [V, D]
    active,  # bool [R]
    target_hidden,  # [R, E]
    target_weight,  # [V, E]
    lse, target_lse, dloss,  # float32 [R]
    dlogits,  # [R, V]; inactive rows get zeros
    rows, vocabulary, width, target_width,  # R, V, D, E
    hidden_r, hidden_d, weight_v, weight_d,
    target_hidden_r, target_hidden_e, target_weight_v, target_weight_e,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, wanted, tokens = tile_of_head(active, rows, True, BLOCK_R, BLOCK_V)
    gradient = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        value = head_tile(
            hidden, weight, row, wanted, tokens, vocabulary, width, hidden_r, hidden_d, weight_v, weight_d,
            BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        target = head_tile(
            target_hidden, target_weight, row, wanted, tokens, vocabulary, target_width,
            target_hidden_r, target_hidden_e, target_weight_v, target_weight_e, BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        q = exp(value - tl.load(lse + row, mask=wanted, other=0.0)[:, None])
        p = exp(target - tl.load(target_lse + row, mask=wanted, other=0.0)[:, None])
        gradient = tl.load(dloss + row, mask=wanted, other=0.0)[:, None] * (q - p)
        # Zeros in the place of a row's hidden state are NaN times a weight that is infinite.
        gradient = tl.where(wanted[:, None], gradient, 0.0)
    at = dlogits + row.to(tl.int64)[:, None] * vocabulary + tokens[None, :]
    tl.store(at, gradient.to(dlogits.dtype.element_ty), mask=(row < rows)[:, None] & (tokens < vocabulary)[None, :])


def masked_divergence_backward(hidden, weight, target_hidden, target_weight, active, lse, target_lse, dloss):
    """lse, target_lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""

    def of_part(first, part, depth):
        target_part = target_weight[first : first + part.shape[0]]
        inputs = {"target_hidden": target_hidden, "target_weight": target_part}
        inputs |= {"lse": lse, "target_lse": target_lse, "dloss": dloss}
        return inputs, _target_sizes(target_hidden, target_part, depth)

    return head_gradients(_divergence_dlogits_kernel, hidden, weight, active, of_part, target_hidden.shape[1])
