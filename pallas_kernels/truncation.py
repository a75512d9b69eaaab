"""The most likely tokens alone: rows wait in VMEM while the least that is kept is found, a bit at a time."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_kernels.pallas_kernels import chips
from dlm_kernels.pallas_kernels.chips import LANES

SLAB = 8192  # logits that are in registers at once
UNROLLED = 8  # slabs that are laid out one after the other, so that the latency of one hides behind the others
LEAST = -(2**31)  # of int32


def _ordered(value):
    """int32 that are ordered as the float32s are."""
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _value(order):
    """What `_ordered` makes it of. Beyond the infinities that is NaN, which no logit is above or below: above inf rightly, and
    the search comes below -inf where all are kept alone.
    """
    return jax.lax.bitcast_convert_type(jnp.where(order < 0, order ^ 0x7FFFFFFF, order), jnp.float32)


def _truncate_kernel(
    logits,  # [ROWS, COLUMNS], whole rows; COLUMNS a multiple of a slab's, past V anything
    inverse_temperature,  # float32 [ROWS, 1]
    top_p,  # float32 [ROWS, 1]
    top_k,  # float32 [ROWS, 1]
    out,  # [ROWS, COLUMNS] in the logits' dtype
    mass,  # float32 [ROWS, COLUMNS], scratch; with top_p only
    *,
    by_mass,  # whether top_p counts
    by_count,  # whether top_k does
    bits,  # of the logits' dtype; as float32 the others end in zeros
    vocabulary,  # V
):
    rows = logits.shape[0]
    width = SLAB // rows

    def over_slabs(body, carry):
        """body(columns, float32 [ROWS, width], carry) for all of the vocabulary, and -inf past it."""

        def part(slab):
            return pl.ds(pl.multiple_of(slab * width, width), width)

        def whole(slab, carry):
            return body(part(slab), logits[:, part(slab)].astype(jnp.float32), carry)

        def several(i, carry):
            for j in range(UNROLLED):
                carry = whole(i * UNROLLED + j, carry)
            return carry

        full, rest = divmod(vocabulary, width)
        carry = jax.lax.fori_loop(0, full // UNROLLED, several, carry)
        for slab in range(full // UNROLLED * UNROLLED, full):
            carry = whole(slab, carry)
        if rest:
            inside = jax.lax.broadcasted_iota(jnp.int32, (rows, width), 1) < rest
            carry = body(part(full), jnp.where(inside, logits[:, part(full)].astype(jnp.float32), -jnp.inf), carry)
        return carry

    def wide(x):
        """[ROWS, 1] along a slab. Left to a loop it would be done in each step, and takes a hundred cycles."""
        return jnp.broadcast_to(x, (rows, width))

    zeros = jnp.zeros((rows, width), jnp.float32)
    tops = over_slabs(lambda _, x, tops: jnp.maximum(tops, x), jnp.full_like(zeros, -jnp.inf))
    top = jnp.max(tops, axis=1, keepdims=True)
    base, inverse = wide(top), wide(inverse_temperature[...])

    def weigh(columns, x, total):
        weight = jnp.exp((x - base) * inverse)
        if by_mass:
            mass[:, columns] = weight
        return total + weight

    # NaN for a row that has NaN or inf, or is all -inf.
    total = jnp.sum(over_slabs(weigh, zeros), axis=1, keepdims=True)
    wanted = jnp.where(top_p[...] >= 1, jnp.inf, top_p[...] * total)

    def kept(least):
        """Whether a token of this order is kept: bool [ROWS, 1]. Of a greater one all are."""
        value = wide(_value(least))

        def add(columns, x, sums):
            above = x > value
            more = ([mass[:, columns]] if by_mass else []) + [1.0] * by_count
            return tuple(total + jnp.where(above, each, 0.0) for total, each in zip(sums, more, strict=True))

        limits = [wanted] * by_mass + [top_k[...]] * by_count
        sums = over_slabs(add, (zeros,) * len(limits))
        return functools.reduce(
            jnp.logical_and, (jnp.sum(each, axis=1, keepdims=True) < limit for each, limit in zip(sums, limits, strict=True))
        )

    def step(i, least):
        """`least` is 0 in the bits that are not known yet, the first of which is 1 for a negative number's order."""
        bit = jax.lax.shift_left(jnp.int32(1), jnp.int32(31) - i)
        return jnp.where(kept((least | (bit - 1)) ^ LEAST), least, least | bit)

    least = jax.lax.fori_loop(0, bits, step, jnp.zeros((rows, 1), jnp.int32)) ^ LEAST
    # The most likely is kept whatever top_p and top_k are.
    least = _value(jnp.minimum(least, _ordered(top)))
    least = wide(jnp.where(total > 0, least, -jnp.inf))

    def write(columns, x, carry):
        # Not >=: NaN is no less than anything, and stays.
        out[:, columns] = jnp.where(x < least, -jnp.inf, x).astype(out.dtype)
        return carry

    over_slabs(write, 0)


def _tile(vocabulary, dtype):
    """Rows and columns of a block: a group of rows as VMEM lays them out."""
    rows = 32 // dtype.itemsize
    return rows, chips.round_up(vocabulary, SLAB // rows)


def supports_truncate_logits(logits, top_p, **_):
    if reason := chips.refuse(logits):
        return reason
    rows, columns = _tile(logits.shape[1], logits.dtype)
    # Of logits and of results two blocks each, one of them on its way.
    held = rows * columns * (4 * logits.dtype.itemsize + 4 * (top_p is not None))
    if held > chips.chip().row_budget:
        return f"VMEM holds no {rows} rows of a vocabulary of {logits.shape[1]}"
    return None


def truncate_logits(logits, inverse_temperature, top_p, top_k):
    """logits [R,V]; inverse_temperature, top_p float32 [R]; top_k int32 [R]. Returns [R,V] in the logits' dtype."""
    r, v = logits.shape
    rows, columns = _tile(v, logits.dtype)
    absent = jnp.zeros(r, jnp.float32)
    per_row = (inverse_temperature, absent if top_p is None else top_p, absent if top_k is None else top_k.astype(jnp.float32))
    by_row = pl.BlockSpec((rows, 1), lambda i: (i, 0))
    block = pl.BlockSpec((rows, columns), lambda i: (i, 0))
    return pl.pallas_call(
        functools.partial(
            _truncate_kernel, by_mass=top_p is not None, by_count=top_k is not None, bits=8 * logits.dtype.itemsize, vocabulary=v
        ),
        grid=(pl.cdiv(r, rows),),
        in_specs=[block, by_row, by_row, by_row],
        out_specs=block,
        scratch_shapes=[pltpu.VMEM((rows, columns if top_p is not None else LANES), jnp.float32)],
        out_shape=jax.ShapeDtypeStruct((r, v), logits.dtype),
        compiler_params=chips.parameters("parallel"),
        name="truncate_logits",
    )(logits, *(x[:, None] for x in per_row))
