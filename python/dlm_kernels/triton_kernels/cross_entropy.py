"""The loss of the LM head's logits, and its gradients, without the logits in memory.

The loss's statistics are taken in the epilogue of the matrix product; so is the logits' gradient, of which head_loss.py makes the
others.
"""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels import head, scores
from dlm_kernels.triton_kernels.head import head_tile, tile_of_head
from dlm_kernels.triton_kernels.head_loss import head_gradients
from dlm_kernels.triton_kernels.launch import Out, launch
from dlm_kernels.triton_kernels.numerics import exp, tanh


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
    row, wanted, tokens = tile_of_head(active, rows, True, BLOCK_R, BLOCK_V)
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
    tiles, num_warps, num_stages = head.tiles(hidden)
    top, total, chosen = launch(
        _loss_kernel,
        head.grid(hidden, tiles["BLOCK_R"], spans),
        inputs={"hidden": hidden, "weight": weight, "targets": targets, "active": active},
        outputs={
            "top": Out((rows, spans), "float32"), "total": Out((rows, spans), "float32"),
            "chosen": Out((rows,), "float32"),
        },
        scalars=head.sizes(hidden, weight, tiles["BLOCK_D"]),
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
    row, wanted, tokens = tile_of_head(active, rows, True, BLOCK_R, BLOCK_V)
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


def masked_cross_entropy_backward(hidden, weight, targets, active, lse, dloss, *, logits_soft_cap):
    """lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""

    def of_part(first, part, depth):
        return {"targets": targets - first, "lse": lse, "dloss": dloss}, {}

    return head_gradients(_dlogits_kernel, hidden, weight, active, of_part, SOFT_CAP=logits_soft_cap)
