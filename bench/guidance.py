"""Guidance: two streams of logits, or of hidden states, mixed into one."""

import functools

import jax.numpy as jnp

import dlm_kernels
from bench import harness, oracles, peers
from bench.harness import Case

SCALE = 2.5


def case(name, rows, width, dtype, **options):
    def inputs(rng):
        return tuple(jnp.asarray(rng.standard_normal((1, rows, width), "float32"), dtype) for _ in range(2))

    def mix(conditional, unconditional, implementation):
        return dlm_kernels.mix_guidance(conditional, unconditional, SCALE, implementation=implementation)

    def eager(conditional, unconditional):
        return unconditional + SCALE * (conditional - unconditional)

    size = rows * width * jnp.dtype(dtype).itemsize
    return Case(
        "guidance",
        f"{name}, {rows} x {width}, {dtype}",
        inputs,
        harness.ours(mix) | peers.of_torch(eager),
        read=2 * size,
        written=size,
        dtype=dtype,
        oracle=functools.partial(oracles.mix, scale=SCALE),
        tolerance=1e-6 if dtype == "float32" else 1e-2,
        **options,
    )


def cases():
    return [
        case("LLaDA-8B logits", 128, 126464, "float32", quick=True, headline=True),
        case("LLaDA-8B logits", 128, 126464, "bfloat16"),
        case("LLaDA-8B hidden", 128, 4096, "bfloat16"),
        *(case("LLaDA-8B logits", rows, 126464, "bfloat16", full=True) for rows in (2048, 8192)),
    ]


test_guidance, pytest_generate_tests = harness.microbenchmark(cases)
