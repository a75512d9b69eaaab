"""A mixture of experts: tiles of the rows that chose the same expert, whose weights are read once for all of these.

XLA sorts the pairs of a row and an expert by expert, and copies their rows into tiles, each of one expert, those of an expert one
after another. A step of the kernel takes a tile through its expert, so that the hidden activations never leave VMEM; the weights of
the next step come meanwhile, unless it has the same. XLA then adds up the pairs of each row, in the order in which they are given,
so that a row is the same in any batch.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_kernels.pallas_kernels import chips
from dlm_kernels.pallas_kernels.chips import LANES

LEAST_ROWS = 16  # of a tile: what a register of bfloat16 has


class Schedule(typing.NamedTuple):
    """The tiles of P = N * K pairs, int32. What is "any" is within bounds."""

    expert: jax.Array  # [TILES], whose a tile is; past the last one any
    used: jax.Array  # [1], how many tiles there are
    row: jax.Array  # [TILES * ROWS], the row of x in each place; any where a tile has no more
    place: jax.Array  # [N, K], the place of each pair; any if its expert is none of E


def schedule(expert, experts, rows, tiles):
    """expert: int32 [N, K]; experts: E; rows: ROWS; tiles: TILES, no fewer than there can be."""
    (n, chosen), pairs = expert.shape, expert.size
    each, pair, tile, within = (jnp.arange(size, dtype=jnp.int32) for size in (experts + 1, pairs, tiles, rows))
    owner = jnp.where((expert >= 0) & (expert < experts), expert, experts).reshape(-1)
    # A number for both: a stable sort of two arrays takes four times as long to compile.
    order = jax.lax.sort(owner * pairs + pair, is_stable=False) % pairs
    rank = jax.lax.sort((order, pair), is_stable=False, num_keys=1)[1]
    first = (owner < each[:, None]).sum(1, dtype=jnp.int32)  # [E + 1], in `order`
    last_tile = jnp.cumsum(-(-jnp.diff(first) // rows), dtype=jnp.int32)  # [E], exclusive
    first_tile = jnp.pad(last_tile, (1, 0))
    tile_expert = jnp.minimum((last_tile <= tile[:, None]).sum(1, dtype=jnp.int32), experts - 1)
    at = (first[tile_expert] + (tile - first_tile[tile_expert]) * rows)[:, None] + within
    row = order[jnp.minimum(at, pairs - 1)] // chosen
    place = jnp.minimum(first_tile[owner] * rows + rank - first[owner], tiles * rows - 1)
    return Schedule(tile_expert, last_tile[-1:], row.reshape(-1), place.reshape(n, chosen))


def _at(core, step, used, cores):
    """A core's tile at a step, and whether it is one: each takes as many of those that there are, one after the other.

    Where it has no more it stays at its last, for which nothing is fetched or written again; where it has none, at one that is no
    other core's.
    """
    share = jnp.maximum(pl.cdiv(used[0], cores), 1)
    own = jnp.clip(used[0] - core * share, 0, share)
    return core * share + jnp.minimum(step, jnp.maximum(own - 1, 0)), step < own


def _mix_kernel(
    expert,  # int32 [TILES], in SMEM
    used,  # int32 [1], in SMEM
    x,  # [ROWS, D]
    gate,  # [1, D, COLUMNS]
    up,  # [1, D, COLUMNS]
    down,  # [1, COLUMNS, D]
    out,  # float32 [ROWS, D]
    *,
    activation,  # "silu" or "gelu"
    cores,
    inner,  # F
):
    part, columns = pl.program_id(2), gate.shape[2]

    @pl.when(_at(pl.program_id(0), pl.program_id(1), used, cores)[1])
    def _():
        a, b = (chips.dot(x[...], weight[0], (1, 0)) for weight in (gate, up))
        # silu is a * sigmoid(a), and 0.5 * (1 + tanh(z)), by which gelu has a, is sigmoid(2 * z); the number is 2 * sqrt(2 / pi).
        z = a if activation == "silu" else 1.5957691216057308 * (a + 0.044715 * a * a * a)
        hidden, last = (a / (1 + jnp.exp(-z)) * b).astype(x.dtype), down[0]
        if inner % columns:
            # Past the end is anything, and zero times that may be NaN.
            left = inner - part * columns
            hidden = jnp.where(jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 1) < left, hidden, 0)
            last = jnp.where(jax.lax.broadcasted_iota(jnp.int32, last.shape, 0) < left, last, 0)
        given = chips.dot(hidden, last, (1, 0))
        out[...] = given if inner <= columns else jnp.where(part == 0, given, out[...] + given)


def _most_rows(dtype):
    """Of a tile. All are multiplied at once, and the code grows with them; and each expert's last tile may be nearly empty."""
    return 256 // dtype.itemsize


def _columns(gate):
    """How much of F a step takes: all where VMEM holds it, so that the weights stay for the next tile of the same expert.

    It never depends on the rows, for the parts' sums are rounded.
    """
    (_, width, inner), size = gate.shape, gate.dtype.itemsize
    width = chips.round_up(width, LANES)
    # Of every block there are two, one of them on its way.
    left = chips.chip().expert_budget - 2 * _most_rows(gate.dtype) * width * (size + 4)
    most = max(left, 0) // (2 * 3 * width * size) // LANES * LANES
    return inner if chips.round_up(inner, LANES) <= most else most and chips.even_tile(inner, most, LANES)


def supports_mix_experts(x, gate, expert, **_):
    if reason := chips.refuse(x):
        return reason
    if (gate.shape[0] + 1) * expert.size >= 2**31:
        return "it sorts pairs by their expert and place in 32 bits"
    if _columns(gate) < 1:
        return f"VMEM holds no {LANES} columns of experts of width {gate.shape[1]}"
    return None


def mix_experts(x, gate, up, down, expert, weight, *, activation):
    """x [N,D]; gate, up [E,D,F]; down [E,F,D]; expert int32, weight float32 [N,K]. Returns [N,D] in x's dtype."""
    (n, width), (experts, _, inner), pairs, cores = x.shape, gate.shape, expert.size, chips.chip().cores
    # More than a mean expert has, so that most are one tile.
    rows = min(max(LEAST_ROWS, 1 << (pairs // experts).bit_length()), _most_rows(x.dtype))
    columns = _columns(gate)
    # As many tiles as there can be: each expert's last one may be short.
    steps, parts = pl.cdiv(min(pairs, pairs // rows + min(pairs, experts)), cores), pl.cdiv(inner, columns)
    plan = schedule(expert, experts, rows, cores * steps)

    def by_row(core, step, part, expert, used):
        return _at(core, step, used, cores)[0], 0

    def piece(core, step, part, expert, used):
        tile, there = _at(core, step, used, cores)
        return expert[tile], jnp.where(there, part, parts - 1)

    def into(*at):
        owner, part = piece(*at)
        return owner, 0, part

    given = pl.pallas_call(
        functools.partial(_mix_kernel, activation=activation, cores=cores, inner=inner),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, steps, parts),
            in_specs=[
                pl.BlockSpec((rows, width), by_row),
                pl.BlockSpec((1, width, columns), into),
                pl.BlockSpec((1, width, columns), into),
                pl.BlockSpec((1, columns, width), lambda *at: (*piece(*at), 0)),
            ],
            out_specs=pl.BlockSpec((rows, width), by_row),
        ),
        out_shape=jax.ShapeDtypeStruct((cores * steps * rows, width), jnp.float32),
        compiler_params=chips.parameters("parallel", "arbitrary", "arbitrary"),
        name="mix_experts",
    )(plan.expert, plan.used, x[plan.row], gate, up, down)

    known = (expert >= 0) & (expert < experts)
    total = jnp.zeros((n, width), jnp.float32)
    for j in range(expert.shape[1]):
        total += jnp.where(known[:, j, None], weight[:, j, None] * given[plan.place[:, j]], jnp.nan)
    return total.astype(x.dtype)
