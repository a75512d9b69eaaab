"""Truncation of logits to their nucleus, as Dream samples: top_p 0.95 at temperature 0.2."""

import jax.numpy as jnp
import numpy as np

import dlm_kernels
from bench import harness, peers
from bench.harness import Case
from dlm_kernels.reference import truncation as reference

TOP_P, TEMPERATURE = 0.95, 0.2


def by_sorting(logits):
    """torch, on [B, L, V]: the logits before which the others of the row have less than TOP_P of its mass."""
    import torch

    ranked = logits.sort(dim=-1, descending=True).values
    p = torch.softmax(ranked.float() / TEMPERATURE, dim=-1)
    last = (p.cumsum(-1) - p < TOP_P).sum(-1, keepdim=True) - 1
    return logits.masked_fill(logits < ranked.gather(-1, last), -torch.inf)


def case(name, rows, width, dtype, **options):
    def inputs(rng):
        return (jnp.asarray(3 * rng.standard_normal((1, rows, width), "float32"), dtype),)

    def truncate(logits, implementation):
        return dlm_kernels.truncate_logits(logits, top_p=TOP_P, temperature=TEMPERATURE, implementation=implementation)

    def oracle(logits):
        every = np.ones(rows)
        return reference.truncate_logits(logits[0], every / TEMPERATURE, every * TOP_P, None)[None]

    size = rows * width * jnp.dtype(dtype).itemsize
    return Case(
        "truncation",
        f"{name}, {rows} x {width}, {dtype}",
        inputs,
        harness.ours(truncate) | peers.of_torch(by_sorting),
        read=size,
        written=size,
        dtype=dtype,
        oracle=oracle,
        tolerance=0.0,
        **options,
    )


def cases():
    return [
        case("LLaDA-8B", 128, 126464, "float32", quick=True, headline=True),
        case("LLaDA-8B", 128, 126464, "bfloat16"),
    ]


test_truncation, pytest_generate_tests = harness.microbenchmark(cases)
