"""Guidance on logits: a pass over tiles of rows and vocabulary."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dlm_kernels.pallas_kernels import chips, numerics
from dlm_kernels.pallas_kernels.chips import LANES

ROWS, COLUMNS = 64, 2048  # of a tile: a step must outlast what starting it costs
MOST_STREAMS = 64  # a tile of every stream is in VMEM at once, and the next one on its way


def _mix_kernel(
    conditional,  # [ROWS, COLUMNS]
    unconditional,  # [ROWS, COLUMNS]
    scale,  # float32 [ROWS, 1]
    out,  # [ROWS, COLUMNS]
):
    streams = conditional[...].astype(jnp.float32), unconditional[...].astype(jnp.float32)
    out[...] = numerics.mixed(*streams, scale[...]).astype(out.dtype)


def _combine_kernel(
    logits,  # [C, rows, COLUMNS]
    weights,  # float32 [C, rows, 1]
    out,  # [rows, COLUMNS]
):
    total = jnp.zeros(out.shape, jnp.float32)
    banned = jnp.zeros(out.shape, jnp.float32)
    for stream in range(logits.shape[0]):
        value, weight = logits[stream].astype(jnp.float32), weights[stream]
        # A stream of weight zero may hold anything.
        total += jnp.where(weight == 0, 0.0, weight * value)
        banned = jnp.where((weight != 0) & (value == -jnp.inf), 1.0, banned)
    out[...] = jnp.where(banned > 0, -jnp.inf, total).astype(out.dtype)


def supports_mix_guidance(conditional, unconditional, scale):
    return chips.refuse(conditional)


def mix_guidance(conditional, unconditional, scale):
    """conditional, unconditional [R,V], one dtype; scale float32 [R]. Returns [R,V]."""
    r, v = conditional.shape
    rows, columns = chips.tile(r, ROWS, 16), chips.tile(v, COLUMNS, LANES)
    block = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    return pl.pallas_call(
        _mix_kernel,
        grid=(pl.cdiv(r, rows), pl.cdiv(v, columns)),
        in_specs=[block, block, pl.BlockSpec((rows, 1), lambda i, j: (i, 0))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((r, v), conditional.dtype),
        compiler_params=chips.parameters("parallel", "parallel"),
        name="mix_guidance",
    )(conditional, unconditional, scale[:, None])


def supports_combine_guidance(logits, weights):
    if logits.shape[0] > MOST_STREAMS:
        return f"it holds a tile of every stream in VMEM, at most {MOST_STREAMS}, not {logits.shape[0]}"
    return chips.refuse(logits)


def combine_guidance(logits, weights):
    """logits [C,R,V]; weights float32 [C,R]. Returns [R,V]."""
    c, r, v = logits.shape
    # The tiles of all streams are 2 MiB of float32 at most.
    rows, columns = chips.tile(r, 16 if c > 4 else ROWS, 16), chips.tile(v, COLUMNS if c <= 16 else 512, LANES)
    return pl.pallas_call(
        _combine_kernel,
        grid=(pl.cdiv(r, rows), pl.cdiv(v, columns)),
        in_specs=[
            pl.BlockSpec((c, rows, columns), lambda i, j: (0, i, j)),
            pl.BlockSpec((c, rows, 1), lambda i, j: (0, i, 0)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((r, v), logits.dtype),
        compiler_params=chips.parameters("parallel", "parallel"),
        name="combine_guidance",
    )(logits, weights[:, :, None])
