"""Whole decoders: text from a prompt, by the denoiser here, by a published PyTorch loop, and one token at a time."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from bench import harness, llama_cpp, machine, peers
from bench.harness import OURS, Case, Contender
from dlm_kernels import TokenScores, lm_head_scores, masks, unmask_topk
from dlm_kernels.denoiser import checkpoint, model, sampler
from dlm_kernels.denoiser.config import DenoiserConfig

# Models of published shapes, with random weights: whole layers and the whole vocabulary, but on a CPU few of the layers, since
# the rest is more of the same.
WHOLE = {
    "shipped": checkpoint.described(checkpoint.SHIPPED)[0],
    "SDAR-4B": DenoiserConfig(
        36, 2560, 32, 8, 128, 9728, 151936, 1e6, 1e-6, qk_norm=True, tie_embeddings=True, mask_id=151669
    ),
    "Dream-7B": DenoiserConfig(
        28, 3584, 28, 4, 128, 18944, 152064, 1e6, 1e-6, qk_norm=False, qkv_bias=True, tie_embeddings=False, mask_id=151666
    ),
    "LLaDA-8B": DenoiserConfig(
        32, 4096, 32, 32, 128, 12288, 126464, 5e5, 1e-5, qk_norm=False, tie_embeddings=False, mask_id=126336
    ),
}
CPU_LAYERS = {"SDAR-4B": 2, "Dream-7B": 1, "LLaDA-8B": 1}
ON_CPU = machine.implementation() == "cpu"
# In float32 the contenders' greedy texts agree.
DTYPE = jnp.float32 if ON_CPU else jnp.bfloat16
BODIES = {
    name: dataclasses.replace(config, layers=CPU_LAYERS.get(name, config.layers)) if ON_CPU else config
    for name, config in WHOLE.items()
}


# Standard deviations of a position's logits: bfloat16 moves them by less, and a token that has nothing to do with them lacks four.
NEAR_TIE = 0.25
PARTS = ("layers", "head", "unmask")


def title(body):
    layers, whole = BODIES[body].layers, WHOLE[body].layers
    return body + f", {layers} of {whole} layers" * (layers < whole)


@functools.lru_cache(maxsize=1)
def parameters(body, seed):
    """Kept from case to case: `model.init`'s for the model that ships, a large one's of random numbers that recur."""
    config = BODIES[body]
    if body == "shipped":
        return model.init(config, jax.random.key(seed), DTYPE)
    rng, params = np.random.default_rng(seed), {}
    for name, shape in model.parameter_shapes(config).items():
        if len(shape) == 1:
            params[name] = jnp.full(shape, name.endswith("norm"), DTYPE)
        else:
            fan_in = shape[1] if name in ("embed", "head") else shape[0]
            params[name] = harness.normal(rng, shape, DTYPE, fan_in**-0.5)
    return params


def weights(body, rng):
    # Several sets only where one fits the cache; otherwise all cases of a body share one.
    small = body == "shipped"
    return parameters(body, int(rng.integers(1 << 30)) if small else 0)


def case(body, prompt, length, block, steps, *, batch=1, cached=False, **options):
    """[B, P] -> [B, P + length] with random weights, `steps` passes in each block; greedy, so that in float32 all must agree.

    Without a cache every contender runs the same passes. With one, the peers are decoders of one token a pass with a cache of
    their own: other passes, other tokens, the same number of them. In bfloat16 the first tie parts the texts: all that can be
    said of one is that it is whole, and of ours that its first pass writes what jnp's logits say. All read the weights as they
    are stored: what a decoder lays out anew is in its time.
    """
    config = BODIES[body]

    def inputs(rng):
        return weights(body, rng), jnp.asarray(rng.integers(3, 4000, (batch, prompt)), jnp.int32)

    def decoder(implementation, steps=steps, **how):
        function = _decode(body, prompt, length, implementation, **dict(block=block, cache=cached) | how)
        return Contender(function, lambda *inputs: (*inputs, jnp.int32(steps)))

    def whole(output, params, given):
        """0 where the prompt is as it was and a token stands in every place after it."""
        tokens, given = harness.as_numpy(output), np.asarray(given)
        if tokens.shape != (batch, prompt + length) or (tokens[:, :prompt] != given).any():
            return 1.0
        return float(not ((tokens >= 0) & (tokens < config.vocab) & (tokens != config.mask_id)).all())

    def first_pass(output, params, given):
        """Of ours the share of a block's tokens, all written by one pass, that jnp has for clearly less likely than its own."""
        one = contenders[OURS].function(params, given, jnp.int32(1))[:, prompt : prompt + block]
        logits = _first_logits(body, prompt, length, block)(params, given)
        lacking = logits.max(-1) - jnp.take_along_axis(logits, one[..., None], -1)[..., 0]
        return max(whole(output, params, given), float((lacking > NEAR_TIE * logits.std(-1)).mean()))

    contenders = {OURS: decoder(machine.implementation()), "jnp": decoder("xla")}
    if cached:
        # Seeing only what is before it, with blocks of one token, the same decoder is an autoregressive one; it reads a mask in
        # the place of the token to come, where torch's reads the token before.
        one = dict(block=1, steps=1, attend="blocks", cache=True)
        contenders["ours, autoregressive"] = decoder(machine.implementation(), **one)
        contenders["torch, autoregressive"] = _torch("generate_autoregressive", config, length=length)
    else:
        contenders["LLaDA float64"] = _torch("generate", config, length=length, block=block, steps=steps)
        if body == "LLaDA-8B" and batch == 1:
            contenders["llama.cpp"] = llama_cpp.peer(config, length=length, block=block, steps=steps)
    others = ("ours, autoregressive", "torch, autoregressive") if ON_CPU else contenders
    checks = {name: whole for name in others} | ({} if ON_CPU else {OURS: first_pass})
    contenders |= {name: dataclasses.replace(contenders[name], check=checks[name]) for name in checks if name in contenders}
    passes = length // block * steps
    return Case(
        "end_to_end",
        f"{title(body)}, {batch} x {prompt} + {length} tokens, blocks of {block}, {passes} passes, "
        f"{'block cache' if cached else 'no cache'}",
        inputs,
        contenders,
        read=passes * jnp.dtype(DTYPE).itemsize * _multiplied(config, 1, 1),
        # The head is for the block alone; without a cache the layers are for the whole canvas.
        flops=2 * passes * batch * _multiplied(config, block, block if cached else prompt + length),
        dtype=jnp.dtype(DTYPE).name,
        tolerance=0.05,
        tokens=batch * length,
        **options,
    )


@functools.cache  # one token at a time, and any number of steps, is the same program in every case of a model
def _decode(body, prompt, length, implementation, **how):
    config = BODIES[body]

    @jax.jit
    def decode(params, given, steps):
        canvas = jnp.pad(given, ((0, 0), (0, length)), constant_values=config.mask_id)
        return sampler.decode(config, params, canvas, first=prompt, steps=steps, implementation=implementation, **how).tokens

    return decode


@functools.cache
def _first_logits(body, prompt, length, block):
    """jnp's logits of the first block, float32 [B, block, V], before anything is written."""
    config = BODIES[body]

    @jax.jit
    def logits(params, given):
        canvas = jnp.pad(given, ((0, 0), (0, length)), constant_values=config.mask_id)
        hidden = model.hidden_states(config, params, canvas, implementation="xla")[:, prompt : prompt + block]
        head = model.head_weight(config, params)
        scores = jnp.einsum("bld,vd->blv", hidden, head, preferred_element_type=jnp.float32)
        return scores.at[..., jnp.array([config.mask_id, config.pad_id])].set(scores.min())  # which nobody writes

    return logits


def component(body, part, prompt, block, **options):
    """One part of a pass over one block against a cache of prompt and block: where the time of a pass goes."""
    config = BODIES[body]

    def inputs(rng):
        tokens = jnp.full((1, block), config.mask_id, jnp.int32)
        if part == "unmask":
            return tokens, jnp.asarray(rng.standard_normal((1, block), "float32"))
        params = weights(body, rng)
        if part == "head":
            return params, jnp.asarray(rng.standard_normal((1, block, config.d_model), "float32"), DTYPE)
        cache = model.empty_cache(config, 1, prompt + block, DTYPE)
        cache = [tuple(jnp.asarray(rng.standard_normal(x.shape, "float32"), DTYPE) for x in layer) for layer in cache]
        return params, tokens, cache

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
        f"{title(body)}, one pass over {block} tokens against {prompt}: {part}",
        inputs,
        harness.ours({"layers": layers, "head": head, "unmask": unmask}[part]),
        read=jnp.dtype(DTYPE).itemsize * sizes[part] + 8 * block,
        flops=2 * block * sizes[part],
        dtype=jnp.dtype(DTYPE).name,
        tolerance=1e-3 if ON_CPU else 0.1,
        component=dict(body=body, part=part, block=block, layers=config.layers, whole=WHOLE[body].layers),
        **options,
    )


def _size(shapes, prefix):
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def _multiplied(config, block, positions):
    """Weights times positions of one pass."""
    layers = _size(model.parameter_shapes(config), "layers.")
    return block * config.vocab * config.d_model + positions * layers


def _torch(name, config, **options):
    if not machine.installed("torch"):
        return peers.torch_peer(None)
    from bench import torch_llada

    return peers.torch_peer(functools.partial(getattr(torch_llada, name), config, **options))


def cases():
    shipped = functools.partial(case, "shipped", 64, 64)
    return [
        shipped(32, 8, quick=True, headline=True),
        shipped(32, 8, cached=True, quick=True, headline=True),
        shipped(16, 4, cached=True),
        shipped(64, 2, cached=True, headline=True),
        *(shipped(32, n, cached=True, sweep=("passes a block of 32", n)) for n in (1, 2, 4, 16)),
        *(shipped(32, 8, batch=b, cached=True, sweep=("batch", b)) for b in (2, 4, 16)),
        *(component("shipped", part, 96, 32) for part in PARTS),
        # Cases of one model together: they share its weights.
        case("SDAR-4B", 32, 16, 16, 4, cached=True, headline=True),
        case("SDAR-4B", 32, 16, 16, 2, batch=4, cached=True),
        case("SDAR-4B", 16, 16, 16, 4),
        *(component("SDAR-4B", part, 96, 32) for part in PARTS),
        case("LLaDA-8B", 16, 16, 16, 4, headline=True),
        case("LLaDA-8B", 16, 16, 16, 4, cached=True),
        *(component("LLaDA-8B", part, 96, 32) for part in PARTS),
        case("Dream-7B", 16, 16, 16, 4),
        case("Dream-7B", 16, 16, 16, 4, cached=True),
        *(component("Dream-7B", part, 96, 32) for part in PARTS),
        *(
            case(body, 128, 256, block, steps, batch=b, cached=cached, full=True)
            for body in ("SDAR-4B", "Dream-7B", "LLaDA-8B")
            for block, steps in ((32, 8), (64, 8))
            for b in (1, 8)
            for cached in (False, True)
        ),
    ]


test_end_to_end, pytest_generate_tests = harness.microbenchmark(cases)
