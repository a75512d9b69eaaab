"""The TPUs whose static cycles are counted. Without JAX, for the command line names them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A TensorCore. Bandwidth, and the products behind the clock: jax/_src/pallas/mosaic/tpu_info.py of JAX 0.10.2."""

    kind: str  # JAX's name
    bandwidth: float  # bytes a second from HBM
    products: float  # bfloat16 multiply-adds a second
    rate: int  # bfloat16 multiply-adds a cycle: of 128 x 128 x 4 units, or 256 x 256 x 2 that take two rows a cycle
    delay_slots: int  # as the compiler's listings have them

    @property
    def clock(self):
        return self.products / self.rate


HARDWARE = {
    "v5e": Hardware("TPU v5 lite", 8.2e11, 1.97e14 / 2, 4 * 128**2, 4),
    "v5p": Hardware("TPU v5", 2.46e12 / 2, 4.59e14 / 4, 4 * 128**2, 4),
    "v6e": Hardware("TPU v6 lite", 1.64e12, 9.2e14 / 2, 4 * 256**2, 4),
    "7x": Hardware("TPU7x", 7.4e12 / 2, 2.31e15 / 4, 4 * 256**2, 6),
}
