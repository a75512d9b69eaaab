"""The divergence of an LM head's distribution from another's, and its gradients: of neither head are logits in memory."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from dlm_kernels.pallas_kernels import chips, head, head_loss
from dlm_kernels.pallas_kernels.chips import LANES


def _forward_kernel(
    live,  # int32 [row tiles] in SMEM, 0 where no row is active
    hidden,  # [ROWS, D]
    weight,  # [COLUMNS, D]
    target_hidden,  # [ROWS, E]
    target_weight,  # [COLUMNS, E]
    top,  # float32 [ROWS, 128], out: the greatest logit of each lane
    total,  # float32 [ROWS, 128], out: the sum of exp(logit - top)
    target_top,  # float32 [ROWS, 128], out: of the target's logits
    target_total,  # float32 [ROWS, 128], out
    gap,  # float32 [ROWS, 128], out: the sum of exp(target - target_top) * (target - logit)
    values,  # float32 [ROWS, COLUMNS], scratch
    targets,  # float32 [ROWS, COLUMNS], scratch
    *,
    tiles,
    vocabulary,
):
    step = pl.program_id(2)
    tile = pl.program_id(1) * pl.num_programs(2) + step
    columns = values.shape[1]

    @pl.when(step == 0)
    def _():
        for greatest in (top, target_top):
            greatest[...] = jnp.full(greatest.shape, -jnp.inf, jnp.float32)
        for sums in (total, target_total, gap):
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def accumulate(rows):
        greatest, target_greatest = top[rows, :], target_top[rows, :]
        for chunk in range(columns // LANES):
            at = pl.ds(chunk * LANES, LANES)
            greatest = jnp.maximum(greatest, values[rows, at])
            target_greatest = jnp.maximum(target_greatest, targets[rows, at])
        # A lane of nothing but -inf would be NaN.
        base, target_base = (jnp.where(x == -jnp.inf, 0.0, x) for x in (greatest, target_greatest))
        add = total[rows, :] * jnp.exp(top[rows, :] - base)
        scale = jnp.exp(target_top[rows, :] - target_base)
        target_add, gap_add = target_total[rows, :] * scale, _counted(scale, gap[rows, :])
        for chunk in range(columns // LANES):
            at = pl.ds(chunk * LANES, LANES)
            value, target = values[rows, at], targets[rows, at]
            p = jnp.exp(target - target_base)
            add += jnp.exp(value - base)
            target_add += p
            gap_add += _counted(p, target - value)
        top[rows, :], total[rows, :] = greatest, add
        target_top[rows, :], target_total[rows, :], gap[rows, :] = target_greatest, target_add, gap_add

    # The last part of the vocabulary may have fewer tiles than the others.
    @pl.when((live[pl.program_id(0)] != 0) & (tile < tiles))
    def _():
        head.products(hidden, weight, values)
        head.products(target_hidden, target_weight, targets)
        for logits in (values, targets):
            head_loss.past_the_vocabulary(logits, tile * columns, vocabulary, -jnp.inf)
        head_loss.over_groups(values.shape[0], accumulate)


def _counted(p, gap):
    """p * gap: what the target excludes counts for nothing, where the gap is infinite too."""
    return jnp.where(p == 0, 0.0, p * gap)


def supports_masked_divergence_forward(hidden, weight, target_weight, **_):
    return chips.refuse(hidden) or head.refuse(weight, *head.streamed(weight.dtype.itemsize, target_weight.shape[1]))


def masked_divergence_forward(hidden, weight, target_hidden, target_weight, active):
    """hidden [R,D]; weight [V,D]; target_hidden [R,E]; target_weight [V,E], all one dtype; active bool [R].

    Returns loss, lse and target_lse, float32 [R]; 0 where inactive. Rows cost nothing where a tile has none active.
    """
    name, target = "masked_divergence_forward", (target_hidden, target_weight)
    found = head_loss.statistics(name, _forward_kernel, 5, hidden, weight, active, beside=target)
    top, total, target_top, target_total, gap = found
    lse, target_lse = head_loss.logsumexp(top, total), head_loss.logsumexp(target_top, target_total)
    scale = jnp.exp(target_top - jnp.max(target_top, axis=1, keepdims=True))
    mean_gap = jnp.sum(_counted(scale, gap), axis=1) / jnp.sum(target_total * scale, axis=1)
    return tuple(jnp.where(active, x, 0.0) for x in (mean_gap + lse - target_lse, lse, target_lse))


def _dlogits(values, first, vocabulary, lse, target_lse, dloss, target_hidden, target_weight, targets):
    """Turns the logits in `values` into the loss's gradient by them. lse, target_lse, dloss: [ROWS, 1]; targets: scratch."""
    head.products(target_hidden, target_weight, targets)

    def of_rows(rows):
        sums, target_sums = lse[rows, :], target_lse[rows, :]

        def gradient(columns, token):
            return jnp.exp(values[rows, columns] - sums) - jnp.exp(targets[rows, columns] - target_sums)

        return gradient

    head_loss.to_gradient(values, first, vocabulary, dloss, of_rows)


def supports_masked_divergence_backward(hidden, weight, target_weight, **_):
    return chips.refuse(hidden) or head_loss.refuse(weight, beside=[target_weight.shape[1]])


def masked_divergence_backward(hidden, weight, target_hidden, target_weight, active, lse, target_lse, dloss):
    """lse, target_lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""
    target, of_rows = (target_hidden, target_weight), (lse, target_lse, dloss)
    return head_loss.gradients("masked_divergence_backward", _dlogits, hidden, weight, active, of_rows, target)
