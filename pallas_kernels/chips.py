"""What differs between TPU generations, in one table: sizes and limits that tiles are chosen by."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

MIB = 2**20
LANES = 128  # of a vector register, and so of a block in VMEM


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore of a generation."""

    topology: str  # the smallest slice that the compiler knows it by
    vmem: int  # bytes
    mxu: int  # rows and columns of a matrix unit
    cores: int  # that share a device of JAX, and over which a parallel grid axis is split
    behind: tuple[int, int]  # attention_tiles.Tiles; by static cycles (`python -m bench tpu-schedule`)

    @property
    def budget(self):
        """Bytes of VMEM for a kernel's tiles and scratch; the rest is the compiler's, for what it spills and buffers."""
        return self.vmem // 2

    @property
    def expert_budget(self):
        """As `budget`, of a mixture of experts, whose blocks are mostly weights: the rest is for the products of a tile."""
        return self.vmem * 5 // 8

    @property
    def row_budget(self):
        """As `budget`, of a kernel that goes through whole rows a few registers at a time: the compiler adds little to those."""
        return self.vmem * 13 // 16

    @property
    def limit(self):
        """Bytes of VMEM that the compiler may give a kernel, with all that it adds itself; a little stays free."""
        return self.vmem * 7 // 8


# By the device_kind that JAX reports. Sizes: JAX's own jax/_src/pallas/mosaic/tpu_info.py.
CHIPS = {
    "TPU v5 lite": Chip("v5e:2x2", 128 * MIB, 128, 1, (4, 3)),
    "TPU v5": Chip("v5p:2x2x1", 64 * MIB, 128, 2, (4, 3)),
    "TPU v6 lite": Chip("v6e:2x2", 128 * MIB, 256, 1, (4, 2)),
    "TPU7x": Chip("tpu7x:2x2x1", 64 * MIB, 256, 1, (4, 2)),  # each of a chip's two cores is a device
}
# Other names that JAX knows the same chips by.
ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite", "TPU7": "TPU7x"}
# Their 16 MiB of VMEM hold less than the tiles here take at least.
TOO_SMALL = "TPU v2", "TPU v3", "TPU v4", "TPU v4 lite"
# What every generation above can hold: for a chip the table does not know, and where there is none (export on another host).
UNKNOWN = Chip("", 64 * MIB, 128, 1, (4, 2))


def kind():
    """What JAX calls the chip of this process, or None."""
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None


def chip():
    """The chip of this process, or `UNKNOWN`."""
    return CHIPS.get(ALIASES.get(kind(), kind()), UNKNOWN)


def refuse_chip():
    """Why no kernel runs on the chip of this process, or None."""
    return f"it takes more VMEM than a {kind()} has" if kind() in TOO_SMALL else None


def refuse(array):
    """Why no kernel takes arrays of this dtype on this chip, or None."""
    if reason := refuse_chip():
        return reason
    if array.dtype not in ("float32", "bfloat16"):
        return f"it takes float32 and bfloat16, the dtypes of the TPU's units, not {array.dtype}"
    return None


def round_up(n, multiple):
    return -(-n // multiple) * multiple


def tile(size, most, multiple):
    """The largest extent of a block, a multiple of `multiple` of at most `most`, that is not wider than `size` needs."""
    return min(most, round_up(size, multiple))


def even_tile(size, most, multiple):
    """As `tile`, but all blocks about as wide: the last is not nearly empty."""
    return round_up(-(-size // -(-size // most)), multiple)


def dot(left, right, contracted):
    """The float32 product of two matrices over an axis of each; float32 factors count with all their bits."""
    # Not None, which is what jax_default_matmul_precision says: of bfloat16 factors a TPU has this one alone.
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def parameters(*semantics):
    """Compiler parameters of a grid whose axes are "parallel" or "arbitrary" (in order)."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=chip().limit)
