"""Whole decoders: text from a prompt, by the denoiser here, by a published PyTorch loop, and one token at a time."""

import functools

import jax
import jax.numpy as jnp

from bench import harness, machine, peers
from bench.harness import OURS, Case, Contender
from dlm_kernels import TokenScores, lm_head_scores, masks, unmask_topk
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
    parameters = _size(model.parameter_shapes(config), "")
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


def component(body, part, prompt, block, **options):
    """One part of a pass over one block against a cache of prompt and block: where the time of a pass goes."""
    config = BODIES[body]

    def inputs(rng):
        params = model.init(config, jax.random.key(int(rng.integers(1 << 30))))
        hidden = jnp.asarray(rng.standard_normal((1, block, config.d_model), "float32"))
        tokens = jnp.full((1, block), config.mask_id, jnp.int32)
        cache = model.empty_cache(config, 1, prompt + block, jnp.float32)
        cache = [tuple(jnp.asarray(rng.standard_normal(x.shape, "float32")) for x in layer) for layer in cache]
        return {"layers": (params, tokens, cache), "head": (params, hidden), "unmask": (tokens, hidden[..., 0])}[part]

    def layers(params, tokens, cache, implementation):
        at = jnp.array([prompt], jnp.int32)
        positions = prompt + jnp.arange(block, dtype=jnp.int32)[None]
        how = dict(positions=positions, mask=masks.cache(block, prompt + block), implementation=implementation)
        return model.cached_states(config, params, tokens, cache, at, **how)[0]

    def head(params, hidden, implementation):
        return tuple(lm_head_scores(hidden, model.head_weight(config, params), implementation=implementation))

    def unmask(tokens, confidence, implementation):
        scores = TokenScores(tokens + 1, confidence, confidence, confidence)
        return tuple(unmask_topk(tokens, scores, mask_id=config.mask_id, num_unmask=8, implementation=implementation))

    shapes = model.parameter_shapes(config)
    sizes = {"layers": _size(shapes, "layers."), "head": config.vocab * config.d_model, "unmask": 0}
    return Case(
        "end_to_end",
        f"{body}, one pass over {block} tokens against {prompt}: {part}",
        inputs,
        harness.ours({"layers": layers, "head": head, "unmask": unmask}[part]),
        read=4 * sizes[part] + 8 * block,
        flops=2 * block * sizes[part],
        tolerance=1e-3,
        **options,
    )


def _size(shapes, prefix):
    return sum(jnp.prod(jnp.array(shape)).item() for name, shape in shapes.items() if name.startswith(prefix))


def _multiplied(config, block, positions):
    """Weights times positions of one pass."""
    layers = _size(model.parameter_shapes(config), "layers.")
    return block * config.vocab * config.d_model + positions * layers


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
        *(component("shipped", part, 96, 32) for part in ("layers", "head", "unmask")),
        case("SDAR-4B, 2 of 36 layers", 32, 32, 32, 4, cached=True),
        case("LLaDA-8B, 1 of 32 layers", 32, 32, 32, 4),
    ]
    return [each for each in every if each.quick or not quick]


test_end_to_end = harness.microbenchmark(cases())
