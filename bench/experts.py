"""A layer's mixture of experts for a block of tokens: what counts is how fast the weights of the chosen experts are read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import dlm_kernels
from bench import harness, peers
from bench.harness import Case, Contender
from dlm_kernels.reference import experts as reference
from dlm_kernels.xla import experts as xla


def case(name, rows, d, f, experts, chosen, dtype, **options):
    """x [R, D], gate and up [E, D, F], down [E, F, D]; every expert has equally many of the rows."""

    def inputs(rng):
        drawn = np.concatenate([rng.permutation(experts) for _ in range(rows * chosen // experts)])
        return (
            harness.normal(rng, (rows, d), dtype),
            *(harness.normal(rng, (experts, d, f), dtype, d**-0.5) for _ in range(2)),
            harness.normal(rng, (experts, f, d), dtype, f**-0.5),
            jnp.asarray(drawn.reshape(rows, chosen), jnp.int32),
            jnp.full((rows, chosen), 1 / chosen, jnp.float32),
        )

    contenders = harness.ours(dlm_kernels.mix_experts)
    contenders["jnp, all experts"] = Contender(jax.jit(functools.partial(xla.mix_by_all, activation="silu")))
    contenders["jax.lax.ragged_dot"] = Contender(jax.jit(_by_ragged_dot))
    contenders |= peers.of_torch(_torch_loop, compiled=False)
    size = jnp.dtype(dtype).itemsize
    return Case(
        "experts",
        f"{name}, {rows} x {d} x {f}, {chosen} of {experts} experts, {dtype}",
        inputs,
        contenders,
        read=size * (3 * experts * d * f + rows * d),
        written=size * rows * d,
        flops=6 * rows * chosen * d * f,
        dtype=dtype,
        oracle=_oracle,
        tolerance=1e-4 if dtype == "float32" else 2e-2,
        **options,
    )


def _by_ragged_dot(x, gate, up, down, expert, weight):
    """Rows sorted by expert, as in JAX's own mixtures."""
    order = jnp.argsort(expert.reshape(-1))
    row = order // expert.shape[1]
    product = functools.partial(jax.lax.ragged_dot, group_sizes=jnp.bincount(expert.reshape(-1), length=len(gate)))
    h = x[row]
    y = product(jax.nn.silu(product(h, gate)) * product(h, up), down)
    return jnp.zeros(x.shape, jnp.float32).at[row].add(y * weight.reshape(-1)[order, None]).astype(x.dtype)


def _torch_loop(x, gate, up, down, expert, weight):
    """One expert after the other, as LLaDA2's published code has it."""
    import torch

    out = torch.zeros_like(x)
    for e in range(len(gate)):
        row, j = torch.where(expert == e)
        if len(row):
            h = x[row]
            y = (torch.nn.functional.silu(h @ gate[e]) * (h @ up[e])) @ down[e]
            out.index_add_(0, row, (y * weight[row, j, None]).to(x.dtype))
    return out


def _oracle(x, gate, up, down, expert, weight):
    """One expert at a time: all of them in float64 would be eight bytes a weight."""
    x, expert, weight = map(np.asarray, (x, expert, weight))
    out = np.zeros(x.shape)
    for e in range(len(gate)):
        row, j = np.where(expert == e)
        own = (np.asarray(matrices[e : e + 1], np.float64) for matrices in (gate, up, down))
        out[row] += reference.mix_experts(x[row], *own, np.zeros((len(row), 1), int), weight[row, j][:, None], activation="silu")
    return out


def cases():
    """Of LLaDA2-mini's 256 experts a slice, of which a block of 32 tokens chooses all, as it does most of the 256."""
    return [
        case("LLaDA2-mini slice", 32, 2048, 512, 64, 8, "bfloat16", quick=True, headline=True),
        case("LLaDA2-mini slice", 32, 2048, 512, 64, 8, "float32", headline=True),
        case("LLaDA2-mini slice", 256, 2048, 512, 64, 8, "bfloat16"),
    ]


test_experts, pytest_generate_tests = harness.microbenchmark(cases)
