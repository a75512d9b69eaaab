"""Unmasking by rank: rank_i = #{c_j > c_i, or c_j = c_i and j < i}, counted by comparing all pairs; no sort, no scatter."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_kernels.pallas_kernels import chips
from dlm_kernels.pallas_kernels.chips import LANES

MOST_ROWS = 50_000  # whose five rules a core's 1 MiB of scalar memory holds
MOST_POSITIONS = 8192  # whose three columns, padded to 128 lanes each, VMEM holds twice


def _topk_kernel(
    num_unmask,  # int32 [B] in SMEM
    threshold, factor, entropy_budget, edit_threshold,  # float32 [B] in SMEM
    tokens, proposal, eligible, editable,  # int32 [1, 1, P], P a multiple of 128
    order, sure, confidence,  # float32 [1, 1, P]: what ranks descend by; confidence without NaN, and with it
    columns,  # float32 [1, P, 3]: order, eligible and entropy, along sublanes
    new_tokens,  # int32 [1, 1, P]
    unmasked,  # int32 [1, 1, P]
    rank,  # float32 [1, P], scratch; exact, for P is below 2**24; only where a position of the same 128 is eligible, as spent
    spent,  # float32 [1, P], scratch: the sum of the entropies ranked before
    *,
    rules,
):  # fmt: skip
    b = pl.program_id(0)
    positions = tokens.shape[2]
    theirs, others_eligible, cost = (columns[0, :, i : i + 1] for i in range(3))
    j = jax.lax.broadcasted_iota(jnp.int32, (positions, LANES), 0)

    def count(part, carry):
        lanes = pl.ds(pl.multiple_of(part * LANES, LANES), LANES)

        # The others have no rank, and a block is a small part of a long canvas.
        @pl.when(jnp.max(eligible[0, :, lanes]) != 0)
        def _():
            mine = order[0, :, lanes]
            i = part * LANES + jax.lax.broadcasted_iota(jnp.int32, (positions, LANES), 1)
            before = ((theirs > mine) | ((theirs == mine) & (j < i))) & (others_eligible != 0)
            rank[:, lanes] = jnp.sum(jnp.where(before, jnp.float32(1), 0.0), axis=0, keepdims=True)
            if "entropy_budget" in rules:
                spent[:, lanes] = jnp.sum(jnp.where(before, cost, 0.0), axis=0, keepdims=True)

        return carry

    jax.lax.fori_loop(0, positions // LANES, count, 0)
    ranks, c, is_eligible = rank[...], sure[0], eligible[0] != 0
    n = jnp.float32(0)
    if "num_unmask" in rules:
        n = jnp.maximum(n, num_unmask[b].astype(jnp.float32))
    if "threshold" in rules:
        above = jnp.sum(jnp.where(is_eligible & (c > threshold[b]), jnp.float32(1), 0.0))
        n = jnp.maximum(n, jnp.maximum(above, 1.0))

    def leading(passes):
        """The ranks before the first that does not pass; the first always does."""
        return jnp.min(jnp.where(is_eligible & (ranks > 0) & ~passes, ranks, jnp.float32(positions)))

    if "factor" in rules:
        n = jnp.maximum(n, leading(c >= 1 - factor[b] / (ranks + 2)))
    if "entropy_budget" in rules:
        n = jnp.maximum(n, leading(spent[...] <= entropy_budget[b]))
    chosen = is_eligible & (ranks < n)
    changed = chosen
    if "edit_threshold" in rules:
        changed = changed | ((editable[0] != 0) & (confidence[0] > edit_threshold[b]))
    new_tokens[0] = jnp.where(changed, proposal[0], tokens[0])
    unmasked[0] = jnp.where(chosen, jnp.int32(1), 0)


def supports_unmask_topk(tokens, **_):
    if tokens.shape[1] > MOST_POSITIONS:
        return f"it ranks a row of positions in VMEM, at most {MOST_POSITIONS}, not {tokens.shape[1]}"
    if tokens.shape[0] > MOST_ROWS:
        return f"it has the rules of all rows in scalar memory, at most {MOST_ROWS} rows, not {tokens.shape[0]}"
    return chips.refuse_chip()


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
    the others float32. Returns tokens int32 [B,L], unmasked bool [B,L], count int32 [B].
    """
    b, length = tokens.shape
    positions = chips.round_up(length, LANES)
    rules = dict(
        num_unmask=num_unmask, threshold=threshold, factor=factor, entropy_budget=entropy_budget, edit_threshold=edit_threshold
    )
    sure = jnp.where(jnp.isnan(confidence), -jnp.inf, confidence)
    cost = jnp.zeros_like(sure) if entropy_budget is None else entropy
    order = sure if entropy_budget is None else -jnp.where(jnp.isnan(entropy), jnp.inf, entropy)
    editable = jnp.zeros_like(eligible) if editable is None else editable

    def row(array):
        return jnp.pad(array, ((0, 0), (0, positions - length)))[:, None, :]

    integers = [row(x.astype(jnp.int32)) for x in (tokens, proposal, eligible, editable)]
    floats = [row(x) for x in (order, sure, confidence)]
    columns = jnp.stack([row(x)[:, 0] for x in (order, eligible.astype(jnp.float32), cost)], axis=-1)
    absent = [jnp.zeros(b, jnp.int32), *[jnp.zeros(b, jnp.float32)] * 4]
    scalars = [x if rule is None else rule for rule, x in zip(rules.values(), absent, strict=True)]
    block = pl.BlockSpec((1, 1, positions), lambda i, *_: (i, 0, 0))
    new_tokens, unmasked = pl.pallas_call(
        functools.partial(_topk_kernel, rules=tuple(name for name, rule in rules.items() if rule is not None)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(b,),
            in_specs=[block] * 7 + [pl.BlockSpec((1, positions, 3), lambda i, *_: (i, 0, 0))],
            out_specs=[block, block],
            scratch_shapes=[pltpu.VMEM((1, positions), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct((b, 1, positions), jnp.int32)] * 2,
        compiler_params=chips.parameters("parallel"),
        name="unmask_topk",
    )(*scalars, *integers, *floats, columns)
    unmasked = unmasked[:, 0, :length] != 0
    return new_tokens[:, 0, :length], unmasked, unmasked.sum(-1).astype(jnp.int32)
