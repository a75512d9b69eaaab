"""Truncation of logits to their nucleus, as Dream samples: top_p 0.95 at temperature 0.2, which leaves three tokens or so; and at
temperature 1, which leaves ten thousand.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

import dlm_kernels
from bench import harness, peers
from bench.harness import Case
from dlm_kernels.reference import truncation as reference

TOP_P, TEMPERATURE = 0.95, 0.2
# Of a row's probability: what rounding may move between the nucleus of ten thousand tokens and the rest. torch's running sum of
# 126464 float32 numbers is off by 3e-5.
EDGE = 1e-4
CHECKED = 8  # every so many rows of that: their exponentials in float64 take longer than all rounds


def by_sorting(logits, temperature):
    """torch, on [B, L, V]: the logits before which the others of the row have less than TOP_P of its mass."""
    import torch

    ranked = logits.sort(dim=-1, descending=True).values
    p = torch.softmax(ranked.float() / temperature, dim=-1)
    last = (p.cumsum(-1) - p < TOP_P).sum(-1, keepdim=True) - 1
    return logits.masked_fill(logits < ranked.gather(-1, last), -torch.inf)


def beyond(output, logits, temperature):
    """Of [B, L, V] the most probability that a row's nucleus lacks of TOP_P, or that it had of TOP_P and more before its last."""
    if output.shape != logits.shape:
        return np.inf
    kept = np.isfinite(got := harness.as_numpy(output[:, ::CHECKED]))
    logits = np.asarray(logits[:, ::CHECKED], np.float64)
    if (got[kept] != logits[kept]).any() or not np.isneginf(got[~kept]).all():
        return np.inf
    least = np.where(kept, logits, np.inf).min(-1, keepdims=True)
    if (kept != (logits >= least)).any():
        return np.inf
    p = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    p /= p.sum(-1, keepdims=True)
    held, before = (np.where(chosen, p, 0).sum(-1) for chosen in (kept, logits > least))
    return float(max(0, (TOP_P - held).max(), (before - TOP_P).max()))


def case(name, rows, width, dtype, temperature=TEMPERATURE, **options):
    """logits [1, R, V]. At another temperature than Dream's what lies at the edge is checked up to rounding."""

    def inputs(rng):
        return (jnp.asarray(3 * rng.standard_normal((1, rows, width), "float32"), dtype),)

    def truncate(logits, implementation):
        return dlm_kernels.truncate_logits(logits, top_p=TOP_P, temperature=temperature, implementation=implementation)

    def oracle(logits):
        every = np.ones(rows)
        return reference.truncate_logits(logits[0], every / temperature, every * TOP_P, None)[None]

    contenders = harness.ours(truncate) | peers.of_torch(functools.partial(by_sorting, temperature=temperature))
    wide = temperature != TEMPERATURE
    if wide:
        check = functools.partial(beyond, temperature=temperature)
        contenders = {each: dataclasses.replace(contender, check=check) for each, contender in contenders.items()}
    size = rows * width * jnp.dtype(dtype).itemsize
    return Case(
        "truncation",
        f"{name}, {rows} x {width}, {dtype}{f', temperature {temperature:g}' * wide}",
        inputs,
        contenders,
        read=size,
        written=size,
        dtype=dtype,
        oracle=None if wide else oracle,
        tolerance=EDGE if wide else 0.0,
        **options,
    )


def cases():
    return [
        case("LLaDA-8B", 128, 126464, "float32", quick=True, headline=True),
        case("LLaDA-8B", 128, 126464, "float32", temperature=1.0, headline=True),
        case("LLaDA-8B", 128, 126464, "bfloat16"),
    ]


test_truncation, pytest_generate_tests = harness.microbenchmark(cases)
