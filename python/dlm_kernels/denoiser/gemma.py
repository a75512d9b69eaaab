"""DiffusionGemma's Transformer: a causal encoder writes a KV cache, and a bidirectional decoder of the same weights reads it.

The decoder refines a canvas of random tokens, see `renoise.decode`; what it has finished the encoder reads once more, for the next.
Source: google/diffusiongemma-26B-A4B-it, as transformers' modeling_diffusion_gemma.py computes it. Images are not read.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from dlm_kernels import attention, masks, mix_experts
from dlm_kernels.denoiser import experts as mixtures
from dlm_kernels.denoiser import half, limits
from dlm_kernels.denoiser.model import geglu, geglu_shapes, rms_norm, rope, rotate, self_conditioned, write_window


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """The shape of a DiffusionGemma. Frozen: it can be a static argument of a jitted function."""

    layers: int
    d_model: int
    heads: int
    kv_heads: int  # of a local layer
    head_size: int
    window: int  # a token sees in a local layer itself and the window - 1 before it
    rope_theta: float
    global_layers: tuple[int, ...]  # which see all; their keys are their values too
    global_kv_heads: int
    global_head_size: int
    global_rope_theta: float
    global_pairs: int  # of a head's pairs the first so many turn
    ffn: int  # width of the GeGLU beside the experts
    experts: mixtures.Experts
    vocab: int
    canvas: int  # tokens that are refined together
    soft_cap: float  # of the logits
    rms_norm_eps: float
    pad_id: int
    eos_id: int
    mask_id: int  # of a hole; the model has learnt nothing about it
    ends: tuple[int, ...] = ()  # ids that end a text beside eos_id

    # What is asked of a DenoiserConfig too.
    tie_embeddings: ClassVar[bool] = True
    self_conditioning: ClassVar[bool] = True
    shifted: ClassVar[bool] = False
    block_size: ClassVar[None] = None
    delete_id: ClassVar[None] = None
    learnt_masks: ClassVar[bool] = False

    def __post_init__(self):
        counted = (
            "layers", "d_model", "heads", "kv_heads", "head_size", "window", "global_kv_heads", "global_head_size", "ffn", "vocab",
            "canvas",
        )  # fmt: skip
        limits.counts(**{name: getattr(self, name) for name in counted})
        limits.counts(0, global_pairs=self.global_pairs)
        limits.numbers(1, rope_theta=self.rope_theta, global_rope_theta=self.global_rope_theta)
        limits.numbers(0, rms_norm_eps=self.rms_norm_eps)
        limits.numbers(0, above=True, soft_cap=self.soft_cap)
        if self.heads % self.kv_heads or self.heads % self.global_kv_heads:
            given = self.kv_heads, self.global_kv_heads
            raise ValueError(f"kv_heads, global_kv_heads: expected divisors of heads {self.heads}, got {given}")
        limits.ids(self.vocab, **{name: [getattr(self, name)] for name in ("pad_id", "eos_id", "mask_id")}, ends=self.ends)


def parameter_shapes(config):
    """Name -> shape of every parameter. Matrices are [in, out], except the embedding, which is the head too, [vocab, d_model]."""
    c = config
    shapes = {"embed": (c.vocab, c.d_model), "final_norm": (c.d_model,)}
    shapes |= {f"soft.{name}": shape for name, shape in geglu_shapes(c).items()}
    for i in range(c.layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in _layer_shapes(c, i).items()}
    return shapes


def _layer_shapes(config, i):
    c = config
    size, kv_heads = _heads(c, i)
    norms = "attention_norm", "attention_out_norm", "ffn_out_norm", "experts_norm", "experts_out_norm", "out_norm"
    layer = dict.fromkeys(norms, (c.d_model,)) | geglu_shapes(c) | mixtures.parameter_shapes(c.experts, c.d_model)
    layer |= {
        "query": (c.d_model, c.heads * size),
        "key": (c.d_model, kv_heads * size),
        "out": (c.heads * size, c.d_model),
        "query_norm": (size,),
        "key_norm": (size,),
        "router_scale": (c.d_model,),
        "expert_scale": (c.experts.count,),
        "scalar": (1,),
    }
    return layer if i in c.global_layers else layer | {"value": layer["key"]}


def _heads(config, i):
    """Layer i's head size and number of key heads."""
    if i in config.global_layers:
        return config.global_head_size, config.global_kv_heads
    return config.head_size, config.kv_heads


def empty_cache(config, batch, length, dtype):
    """A KV cache: for every layer (key, value), each zeros [batch, length, its key heads, its head size]."""
    shapes = [(batch, length, *_heads(config, i)[::-1]) for i in range(config.layers)]
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes]


def encoded(config, params, tokens, cache, at, *, start, implementation=None):
    """The cache with the columns of `tokens`, int32 [B, T], from column `at` on, int32 [B], as the causal encoder writes them.

    start int32 [B]: a row's first column, before which there is padding. Every column from there to `at` has been written.
    """
    column = at[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    begin = jnp.broadcast_to(start[:, None], column.shape)
    seen = masks.KeyIntervals(begin, column + 1)
    near = masks.KeyIntervals(jnp.maximum(begin, column - (config.window - 1)), column + 1)
    embedded = _embedded(config, params, tokens)
    return _states(config, params, embedded, cache, at, column - begin, seen, near, implementation)[1]


def canvas_states(config, params, tokens, soft, cache, at, *, start, end, implementation=None):
    """The states that the head reads of the canvas `tokens`, int32 [B, T], which lies in the columns from `at` on, int32 [B].

        embedded = rms_norm(embed[tokens] * sqrt(d_model) + ffn(soft * sqrt(d_model)))
        every token of it sees the canvas and the encoder's columns before it: in a local layer the last window - 1 of these

    soft [B, T, d_model]: the `soft_embedding` of the pass before, in the first zeros; start, end int32 [B]: the columns from start
    to before end are the row's, `end` in the canvas. Returns ([B, T, d_model], the cache with the canvas's keys and values in it,
    which are for nobody else). The window is transformers' (its DynamicCache keeps so much); JAX's code moves it with the query.
    """
    column = at[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    begin, end, first = (jnp.broadcast_to(x[:, None], column.shape) for x in (start, end, at))
    seen = masks.KeyIntervals(begin, end)
    near = masks.KeyIntervals(jnp.maximum(begin, first - (config.window - 1)), end)
    embedded, soft = _embedded(config, params, tokens), soft * _root(config, soft.dtype)
    embedded = self_conditioned(config, params, embedded, soft, implementation)
    embedded = rms_norm(embedded, None, config.rms_norm_eps)
    return _states(config, params, embedded, cache, at, column - begin, seen, near, implementation)


def _root(config, dtype):
    # Rounded as the embeddings are: in bfloat16 of 2816 it is 53.0, not 53.07.
    return jnp.asarray(config.d_model**0.5, dtype)


def _embedded(config, params, tokens):
    x = half.look_up(params["embed"], tokens)
    return x * _root(config, x.dtype)


def _states(config, params, x, cache, at, positions, seen, near, implementation):
    """x [B, T, d_model] through the layers. The keys and values of its columns replace what the cache held there."""
    c, (b, length, _), written = config, x.shape, list(cache)
    near_rotation = rope(positions, c.head_size, c.rope_theta)
    rotation = rope(positions, c.global_head_size, c.global_rope_theta, c.global_pairs)
    x = x.reshape(b * length, -1)
    for i in range(c.layers):
        p = {name: params[f"layers.{i}.{name}"] for name in _layer_shapes(c, i)}
        mask, turns = (seen, rotation) if i in c.global_layers else (near, near_rotation)
        h = rms_norm(x, p["attention_norm"], c.rms_norm_eps)
        query, *own = _query_key_value(c, p, h, (b, length), turns, implementation)
        written[i] = tuple(write_window(old, new, at) for old, new in zip(cache[i], own))
        mixed = attention(query, *written[i], mask=mask, scale=1.0, implementation=implementation)
        out = half.product(mixed.reshape(b * length, -1), p["out"], implementation)
        x = x + rms_norm(out, p["attention_out_norm"], c.rms_norm_eps)
        dense = rms_norm(geglu(p, x, c.rms_norm_eps, implementation), p["ffn_out_norm"], c.rms_norm_eps)
        routed = rms_norm(_mixture(c, p, x, implementation), p["experts_out_norm"], c.rms_norm_eps)
        x = (x + rms_norm(dense + routed, p["out_norm"], c.rms_norm_eps)) * p["scalar"]
    return rms_norm(x.reshape(b, length, -1), params["final_norm"], c.rms_norm_eps), written


def _query_key_value(config, p, h, shape, rotation, implementation):
    eps, size = config.rms_norm_eps, p["query_norm"].shape[0]

    def heads(name):
        return half.product(h, p[name], implementation).reshape(*shape, -1, size)

    query, key = heads("query"), heads("key")
    value = heads("value") if "value" in p else key
    query, key = (rotate(rms_norm(x, p[name], eps), rotation) for x, name in ((query, "query_norm"), (key, "key_norm")))
    return query, key, rms_norm(value, None, eps)


def _mixture(config, p, x, implementation):
    h = rms_norm(x, None, config.rms_norm_eps) * p["router_scale"] * jnp.asarray(config.d_model**-0.5, x.dtype)
    expert, weight = mixtures.choose(config.experts, h.astype(jnp.float32) @ p["router"].astype(jnp.float32))
    weight = weight * p["expert_scale"].astype(jnp.float32)[expert]
    h = rms_norm(x, p["experts_norm"], config.rms_norm_eps)
    matrices = (p[name] for name in ("expert_gate", "expert_up", "expert_down"))
    return mix_experts(h, *matrices, expert, weight, activation="gelu", implementation=implementation)
