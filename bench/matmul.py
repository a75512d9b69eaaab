"""A layer's product with a weight of 16 bits, which a CPU without products of bfloat16 has to widen."""

import jax.numpy as jnp

import dlm_kernels
from bench import harness, machine, peers
from bench.harness import Case
from dlm_kernels.reference.matmul import matmul as reference


def case(name, rows, d, f, dtype, **options):
    """x [R, D], weight [D, F]."""

    def inputs(rng):
        return harness.normal(rng, (rows, d), dtype), harness.normal(rng, (d, f), dtype, d**-0.5)

    size = jnp.dtype(dtype).itemsize
    return Case(
        "matmul",
        f"{name}, {rows} x {d} x {f}, {dtype}",
        inputs,
        harness.ours(dlm_kernels.matmul) | peers.of_torch(_torch_product, compiled=False),
        read=size * d * (f + rows),
        written=size * rows * f,
        flops=2 * rows * d * f,
        dtype=dtype,
        oracle=reference,
        tolerance=1e-4 if dtype == "float32" else 2e-2,
        **options,
    )


def _torch_product(x, weight):
    return x @ weight


def cases():
    """Of a token, a block and a prompt: LLaDA-8B's projections, and what SDAR-4B's dense layer has twice. On a CPU alone: elsewhere
    it is XLA's product.
    """
    if machine.implementation() != "cpu":
        return []
    return [
        case("LLaDA-8B projection", 1, 4096, 4096, "bfloat16"),
        case("LLaDA-8B projection", 32, 4096, 4096, "bfloat16", quick=True, headline=True),
        case("LLaDA-8B projection", 256, 4096, 4096, "bfloat16"),
        case("LLaDA-8B projection", 32, 4096, 4096, "float32"),
        case("SDAR-4B gate", 1, 2560, 9728, "bfloat16"),
        case("SDAR-4B gate", 32, 2560, 9728, "bfloat16", headline=True),
    ]


test_matmul, pytest_generate_tests = harness.microbenchmark(cases)
