"""Whole decoders: text from a prompt, by the denoiser here, by a published PyTorch loop, and one token at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from bench import harness, machine, peers
from bench.harness import OURS, Case, Contender
from dlm_kernels.denoiser import model, sampler
from dlm_kernels.denoiser.config import DenoiserConfig

BODIES = {
    "shipped": DenoiserConfig(),
    # Whole layers and the whole vocabulary, but few of the layers: the rest is more of the same.
    "SDAR-4B, 2 of 36 layers": DenoiserConfig(
        2, 2560, 32, 8, 128, 9728, 151936, 1e6, 1e-6, qk_norm=True, tie_embeddings=True, mask_id=151669
    ),
    "LLaDA-8B, 1 of 32 layers": DenoiserConfig(
        1, 4096, 32, 32, 128, 12288, 126464, 5e5, 1e-5, qk_norm=False, tie_embeddings=False, mask_id=126336
    ),
}


def case(body, prompt, length, block, steps, *, batch=1, cached=False, **options):
    """[B, P] -> [B, P + length] with random weights, `steps` passes in each block; greedy, so that all must agree.

    Without a cache every contender runs the same passes. With one, the peers are decoders of one token a pass with a cache of
    their own: other passes, other tokens, the same number of them.
    """
    config = BODIES[body]

    def inputs(rng):
        params = model.init(config, jax.random.key(int(rng.integers(1 << 30))))
        given = jnp.asarray(rng.integers(3, 4000, (batch, prompt)), jnp.int32)
        return params, given

    def decoder(implementation, **how):
        how = dict(block=block, steps=steps, cache=cached) | how

        def decode(params, given):
            canvas = jnp.pad(given, ((0, 0), (0, length)), constant_values=config.mask_id)
            return sampler.decode(config, params, canvas, first=prompt, implementation=implementation, **how).tokens

        return Contender(jax.jit(decode))

    contenders = {OURS: decoder(machine.implementation()), "jnp": decoder("xla")}
    if cached:
        # Seeing only what is before it, with blocks of one token, the same decoder is an autoregressive one; it reads a mask in
        # the place of the token to come, where torch's reads the token before.
        one = dict(block=1, steps=1, attend="blocks", cache=True)
        contenders["ours, autoregressive"] = decoder(machine.implementation(), **one)
        contenders["torch, autoregressive"] = _torch("generate_autoregressive", config, length=length)
    else:
        contenders["LLaDA float64"] = _torch("generate", config, length=length, block=block, steps=steps)
    passes = length // block * steps
    parameters = sum(jnp.prod(jnp.array(shape)).item() for shape in model.parameter_shapes(config).values())
    return Case(
        "end_to_end",
        f"{body}, {batch} x {prompt} + {length} tokens in {passes} passes, {'block cache' if cached else 'no cache'}",
        inputs,
        contenders,
        read=passes * 4 * parameters,
        # The head is for the block alone; without a cache the layers are for the whole canvas.
        flops=2 * passes * batch * _multiplied(config, block, block if cached else prompt + length),
        tolerance=1.0 if cached else 0.05,
        tokens=batch * length,
        **options,
    )


def _multiplied(config, block, positions):
    """Weights times positions of one pass."""
    layer = dataclasses.replace(config, layers=1)
    sizes = {name: jnp.prod(jnp.array(shape)).item() for name, shape in model.parameter_shapes(layer).items()}
    return block * config.vocab * config.d_model + positions * config.layers * sum(
        size for name, size in sizes.items() if name.startswith("layers.")
    )


def _torch(name, config, **options):
    if not peers.installed("torch"):
        return peers.torch_peer(None)
    from bench import torch_llada

    return peers.torch_peer(functools.partial(getattr(torch_llada, name), config, **options))


def cases(quick=False):
    every = [
        case("shipped", 64, 64, 32, 8, quick=True),
        case("shipped", 64, 64, 32, 8, cached=True, quick=True),
        case("shipped", 64, 64, 32, 8, batch=4, cached=True),
        *(case("shipped", 64, 64, 32, n, cached=True, sweep=("passes a block of 32", n)) for n in (1, 2, 4, 16)),
        case("SDAR-4B, 2 of 36 layers", 32, 32, 32, 4, cached=True),
        case("LLaDA-8B, 1 of 32 layers", 32, 32, 32, 4),
    ]
    return [each for each in every if each.quick or not quick]


test_end_to_end = harness.microbenchmark(cases())
