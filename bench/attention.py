"""Attention of the models in use: full squares, blocks against a cache, masks, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import dlm_kernels
from bench import harness, oracles, peers
from bench.harness import Case, Contender
from dlm_kernels import masks

# Query heads, kv heads, head size.
HEADS = {
    "LLaDA-8B": (32, 32, 128),
    "Dream-7B": (28, 4, 128),
    "SDAR-4B": (32, 8, 128),
    "LLaDA2-mini": (16, 4, 128),
    "DiffusionGemma local": (16, 8, 256),
    "DiffusionGemma global": (16, 2, 512),
    "MDLM": (12, 12, 64),
}
MASKS = {
    # Half of the row is padding.
    "padded": lambda t, s: masks.padding(jnp.array([s // 2]), t, s),
    "block-causal 32": lambda t, s: masks.block_causal(t, 32, key_length=s),
    "BD3 16": lambda t, s: masks.block_diffusion(t // 2, 16),
    "window 256": lambda t, s: masks.sliding_window(t, 128, 128, key_length=s),
}


def case(model, t, s, dtype, mask=None, backward=False, **options):
    """[1, T, N, H] against [1, S, K, H]."""
    n, k, h = HEADS[model]
    built = None if mask is None else MASKS[mask](t, s)
    boolean = None if mask is None else built.as_boolean(s)
    visible = None if mask is None else np.asarray(boolean[0, 0])
    seen = t * s if mask is None else int(boolean.sum())

    def inputs(rng):
        shapes = [(1, t, n, h), (1, s, k, h), (1, s, k, h)] + [(1, t, n, h)] * backward
        return tuple(jnp.asarray(rng.standard_normal(shape, "float32"), dtype) for shape in shapes)

    def forward(query, key, value, implementation):
        return dlm_kernels.attention(query, key, value, mask=built, implementation=implementation)

    def jax_nn(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, mask=boolean)

    torch_mask = None if mask is None or not peers.installed("torch") else _torch(boolean)
    torch_forward = functools.partial(peers.sdpa, mask=torch_mask)
    if backward:
        contenders = {
            name: Contender(jax.jit(_gradient(contender.function)))
            for name, contender in (harness.ours(forward) | {"jax.nn": Contender(jax_nn)}).items()
        }
        contenders["torch"] = peers.torch_peer(_torch_gradient(torch_forward))
    else:
        contenders = harness.ours(forward) | {
            "jax.nn": Contender(jax.jit(jax_nn)),
            "torch": peers.torch_peer(peers.no_grad(torch_forward)),
        }
        if mask is not None and peers.installed("torch"):
            contenders["FlexAttention"] = peers.torch_peer(peers.flex_attention(boolean), compiled=True)
    direction = ", backward" if backward else ""
    # Backward: five products where forward has two, and one of the forward's again.
    flops = 4 * seen * n * h * (3.5 if backward else 1)
    size = jnp.dtype(dtype).itemsize
    return Case(
        "attention",
        f"{model}, {t} x {s}, {dtype}{', ' + mask if mask else ''}{direction}",
        inputs,
        contenders,
        read=size * h * (t * n * (1 + backward) + 2 * s * k),
        written=size * h * (t * n + 2 * s * k * backward),
        flops=int(flops),
        dtype=dtype,
        oracle=None if backward else functools.partial(oracles.attention, visible=visible),
        tolerance=2e-5 if dtype == "float32" else 2e-2,
        **options,
    )


def _gradient(forward):
    def run(query, key, value, dout):
        return jax.vjp(forward, query, key, value)[1](dout)

    return run


def _torch_gradient(forward):
    def run(query, key, value, dout):
        arrays = [x.detach().requires_grad_() for x in (query, key, value)]
        forward(*arrays).backward(dout)
        return tuple(x.grad for x in arrays)

    return run


def _torch(boolean):
    import torch

    return torch.from_dlpack(boolean)


def cases(quick=False):
    every = [
        case("LLaDA-8B", 1024, 1024, "bfloat16"),
        case("LLaDA-8B", 1024, 1024, "float32", quick=True),
        case("LLaDA-8B", 128, 1024, "bfloat16"),
        case("LLaDA-8B", 32, 2048, "bfloat16", quick=True),
        case("Dream-7B", 512, 512, "bfloat16"),
        case("SDAR-4B", 4, 4096, "bfloat16"),
        case("LLaDA2-mini", 32, 2048, "bfloat16"),
        case("DiffusionGemma local", 256, 1280, "bfloat16"),
        case("DiffusionGemma global", 256, 2048, "bfloat16"),
        case("MDLM", 1024, 1024, "float32"),
        *(case("LLaDA-8B", 1024, 1024, "float32", mask) for mask in MASKS),
        *(case("SDAR-4B", 32, s, "float32", sweep=("keys, 32 queries", s)) for s in (512, 2048, 8192, 32768)),
        case("MDLM", 1024, 1024, "float32", backward=True, quick=True),
        case("LLaDA-8B", 512, 512, "bfloat16", backward=True),
    ]
    return [each for each in every if each.quick or not quick]


test_attention = harness.microbenchmark(cases())
