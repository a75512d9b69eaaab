"""The training loss fused with the LM head, and its gradients."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dlm_kernels.pallas_kernels import chips, head, head_loss, numerics
from dlm_kernels.pallas_kernels.chips import LANES


def _forward_kernel(
    live,  # int32 [row tiles] in SMEM, 0 where no row is active
    hidden,  # [ROWS, D]
    weight,  # [COLUMNS, D]
    targets,  # int32 [ROWS, 1]
    top,  # float32 [ROWS, 128], out: the greatest logit of each lane
    total,  # float32 [ROWS, 128], out: the sum of exp(logit - top)
    chosen,  # float32 [ROWS, 128], out: the target's logit in its lane, 0 in the others
    values,  # float32 [ROWS, COLUMNS], scratch
    *,
    tiles,
    soft_cap,
    vocabulary,
):
    step = pl.program_id(2)
    tile = pl.program_id(1) * pl.num_programs(2) + step
    columns = values.shape[1]

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full(top.shape, -jnp.inf, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        chosen[...] = jnp.zeros(chosen.shape, jnp.float32)

    def accumulate(rows):
        greatest, pick, target = top[rows, :], chosen[rows, :], targets[rows, :]
        for chunk in range(columns // LANES):
            at = pl.ds(chunk * LANES, LANES)
            value = values[rows, at]
            index = tile * columns + chunk * LANES + jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
            pick = jnp.where(index == target, value, pick)
            greatest = jnp.maximum(greatest, value)
        # A lane of nothing but -inf would be NaN.
        base = jnp.where(greatest == -jnp.inf, 0.0, greatest)
        add = total[rows, :] * jnp.exp(top[rows, :] - base)
        for chunk in range(columns // LANES):
            add += jnp.exp(values[rows, pl.ds(chunk * LANES, LANES)] - base)
        top[rows, :], total[rows, :], chosen[rows, :] = greatest, add, pick

    def cap(rows):
        values[rows, :] = numerics.capped(values[rows, :], soft_cap)

    # The last part of the vocabulary may have fewer tiles than the others.
    @pl.when((live[pl.program_id(0)] != 0) & (tile < tiles))
    def _():
        head.products(hidden, weight, values)
        if soft_cap is not None:
            head_loss.over_groups(values.shape[0], cap)
        head_loss.past_the_vocabulary(values, tile * columns, vocabulary, -jnp.inf)
        head_loss.over_groups(values.shape[0], accumulate)


def supports_masked_cross_entropy_forward(hidden, weight, **_):
    return chips.refuse(hidden) or head.refuse(weight, *head.streamed(weight.dtype.itemsize))


def masked_cross_entropy_forward(hidden, weight, targets, active, *, logits_soft_cap):
    """hidden [R,D]; weight [V,D]; targets int32 [R]; active bool [R].

    Returns loss and lse, float32 [R]; 0 where inactive. A tile of rows costs nothing where none is active.
    """
    kernel = functools.partial(_forward_kernel, soft_cap=logits_soft_cap)
    top, total, chosen = head_loss.statistics("masked_cross_entropy_forward", kernel, 3, hidden, weight, active, of_rows=[targets])
    lse = jnp.where(active, head_loss.logsumexp(top, total), 0.0)
    known = (targets >= 0) & (targets < weight.shape[0])
    return jnp.where(active, jnp.where(known, lse - jnp.sum(chosen, axis=1), jnp.nan), 0.0), lse


def _dlogits(values, first, vocabulary, targets, lse, dloss, *, soft_cap):
    """Turns the logits in `values` into the loss's gradient by them. targets, lse, dloss: [ROWS, 1]."""

    def of_rows(rows):
        target, sums = targets[rows, :], lse[rows, :]

        def gradient(columns, token):
            value, slope = values[rows, columns], 1.0
            if soft_cap is not None:
                bent = jnp.tanh(value * (1 / soft_cap))
                value, slope = soft_cap * bent, 1 - bent * bent
            probability = jnp.exp(value - sums)
            return (probability - jnp.where(token == target, 1.0, 0.0)) * slope

        return gradient

    head_loss.to_gradient(values, first, vocabulary, dloss, of_rows)


def supports_masked_cross_entropy_backward(hidden, weight, **_):
    return chips.refuse(hidden) or head_loss.refuse(weight)


def masked_cross_entropy_backward(hidden, weight, targets, active, lse, dloss, *, logits_soft_cap):
    """lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""
    dlogits = functools.partial(_dlogits, soft_cap=logits_soft_cap)
    return head_loss.gradients("masked_cross_entropy_backward", dlogits, hidden, weight, active, (targets, lse, dloss))
