"""A Transformer, bidirectional or by blocks, in plain JAX. Its parameters are a flat dict from names to arrays.

There is no time input: a partly masked sequence tells by itself how noisy it is, so one model serves every masking ratio.
"""

import jax
import jax.numpy as jnp

from dlm_kernels import attention, masks, mix_experts
from dlm_kernels.denoiser import experts
from dlm_kernels.denoiser.half import gated, look_up, product


def check_masks(config):
    """Raises ValueError for a model that `renoise.decode` alone computes."""
    if not config.learnt_masks:
        raise ValueError("config: expected a model that has learnt masks, got a DiffusionGemma, which `generate` alone decodes")


def parameter_shapes(config):
    """Name -> shape of every parameter. Matrices are [in, out], except the embedding and the head, both [vocab, d_model]."""
    c = config
    shapes = {"embed": (c.vocab, c.d_model), "final_norm": (c.d_model,)}
    if not c.tie_embeddings:
        shapes["head"] = (c.vocab, c.d_model)
    if c.self_conditioning:
        shapes |= {f"soft.{name}": shape for name, shape in geglu_shapes(c).items()}
    for i in range(c.layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in _layer_shapes(c, i).items()}
    return shapes


def _layer_shapes(config, i):
    c = config
    queries, keys = c.heads * c.head_size, c.kv_heads * c.head_size
    layer = {
        "attention_norm": (c.d_model,),
        "query": (c.d_model, queries),
        "key": (c.d_model, keys),
        "value": (c.d_model, keys),
        "out": (queries, c.d_model),
        "ffn_norm": (c.d_model,),
    }
    mixed = c.experts is not None and i >= c.experts.dense_layers
    layer |= experts.parameter_shapes(c.experts, c.d_model) if mixed else _swiglu_shapes(c)
    if c.qk_norm:
        layer |= {"query_norm": (c.head_size,), "key_norm": (c.head_size,)}
    if c.qkv_bias:
        layer |= {"query_bias": (queries,), "key_bias": (keys,), "value_bias": (keys,)}
    return layer


def _swiglu_shapes(config):
    return {"gate": (config.d_model, config.ffn), "up": (config.d_model, config.ffn), "down": (config.ffn, config.d_model)}


def init(config, key, dtype=jnp.float32):
    """Random parameters: norms 1, biases 0, matrices normal with variance 1 / fan-in.

    A matrix whose result joins the residual has its variance divided by twice the number of layers as well; that of the soft
    embedding is 0, so that a model which is given one later goes on from where it was.
    """
    params = {}
    for i, (name, shape) in enumerate(parameter_shapes(config).items()):
        if name.endswith("norm"):
            params[name] = jnp.ones(shape, dtype)
        elif name.endswith("bias") or name == "soft.down":
            params[name] = jnp.zeros(shape, dtype)
        else:
            fan_in = shape[1] if name in ("embed", "head") else shape[-2]
            if name.endswith((".out", "down")):
                fan_in = fan_in * 2 * config.layers
            params[name] = (jax.random.normal(jax.random.fold_in(key, i), shape) * fan_in**-0.5).astype(dtype)
    return params


def hidden_states(config, params, tokens, *, embedded=None, positions=None, mask=None, implementation=None):
    """The states that the LM head reads: logits = hidden_states(...) @ head_weight(config, params).T.

    tokens int32 [B, L]; positions int32 [B or 1, L], default 0, 1, 2, ...; mask as `dlm_kernels.attention` takes it, for a config
    with a block_size None or one interval for each query, of which what lies behind the query's block is taken away;
    embedded [B, L, d_model]: what stands in the place of the tokens' embeddings.
    Returns [B, L, d_model] in the parameters' dtype. Raises ValueError for another mask with a block_size.
    """
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = column if positions is None else positions
    seen = _by_blocks(config, mask, column, positions)

    def attend(i, query, key, value):
        return attention(query, key, value, mask=seen, implementation=implementation)

    return _states(config, params, tokens, positions, attend, embedded, implementation=implementation)


def self_conditioned(config, params, embedded, soft, implementation=None):
    """What the layers read where a pass came before: embedded + ffn(soft), [B, L, d_model]; zeros add nothing.

    soft [B, L, d_model]: the `soft_embedding` of that pass. As DiffusionGemma's, but without the norm after the sum.
    """
    p = {name: params[f"soft.{name}"] for name in ("ffn_norm", "gate", "up", "down")}
    return embedded + geglu(p, soft, config.rms_norm_eps, implementation)


def geglu_shapes(config):
    """Name -> shape of `geglu`'s parameters."""
    return {"ffn_norm": (config.d_model,)} | _swiglu_shapes(config)


def geglu(p, x, eps, implementation=None):
    """A gated layer of p's ffn_norm, gate, up and down, with GELU by tanh."""
    matrices = (p[name] for name in ("gate", "up", "down"))
    return gated(rms_norm(x, p["ffn_norm"], eps), *matrices, activation="gelu", implementation=implementation)


def within(start, stop, length):
    """positions and mask for `hidden_states` of rows of `length` columns, of which [start, stop), int32 [B] each, are the row's:
    positions count from start, and nobody sees the others.
    """
    begin, end = (jnp.broadcast_to(x[:, None], (x.shape[0], length)) for x in (start, stop))
    return dict(positions=jnp.arange(length, dtype=jnp.int32) - begin, mask=masks.KeyIntervals(begin, end))


def empty_cache(config, batch, length, dtype):
    """A KV cache: for every layer (key, value), each zeros [batch, length, kv_heads, head_size]."""
    shape = (batch, length, config.kv_heads, config.head_size)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]


def cached_states(config, params, tokens, cache, at, *, positions, mask, implementation=None):
    """`hidden_states` of a window of a longer sequence, whose other keys and values are in the cache.

    Where the config is `shifted` the window's first state is wrong, unless its position is 0: it lies in the column before.

    tokens int32 [B, T], the window; at int32 [B], its first column in row b of the cache (at + T within the cache); mask gives
    the columns that each query sees, over all of the cache. The window's keys (after RoPE) and values replace what the
    cache held there. Returns ([B, T, d_model], the new cache).
    """
    written = list(cache)
    column = at[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    seen = _by_blocks(config, mask, column, positions)

    def attend(i, query, key, value):
        written[i] = tuple(write_window(old, new, at) for old, new in zip(cache[i], (key, value)))
        return attention(query, *written[i], mask=seen, implementation=implementation)

    return _states(config, params, tokens, positions, attend, implementation=implementation), written


def write_window(array, window, at):
    """array [B, S, ...] with array[b, at[b] : at[b] + T] = window[b]; window [B, T, ...], at int32 [B]."""
    put = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, 0))
    return put(array, window.astype(array.dtype), at)


def read_window(array, at, length):
    """array[b, at[b] : at[b] + length] of every row: [B, length, ...]."""
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, length, 0))(array, at)


def head_weight(config, params):
    """The LM head, [vocab, d_model]."""
    return params["embed"] if config.tie_embeddings else params["head"]


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32, rounded once to x's dtype; weight None is 1."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed if weight is None else normed * weight.astype(jnp.float32)).astype(x.dtype)


def rope(positions, size, theta, pairs=None):
    """cos and sin of every position's angles, float32 [B or 1, L, 1, size / 2] each; size: how much of a head turns.

    pairs: of the size / 2 the first so many turn, by the frequencies that they have where all do.
    """
    frequency = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if pairs is not None:
        frequency = jnp.where(jnp.arange(size // 2) < pairs, frequency, 0)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    # The barrier keeps XLA from computing them anew for every head of every row of every layer.
    return jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))


def rotate(x, rotation):
    """Rotates x [B, L, heads, head_size] by its positions; of the part that turns the first half pairs with the second."""
    cos, sin = rotation
    half = cos.shape[-1]
    a, b, still = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, still], axis=-1).astype(x.dtype)


def _by_blocks(config, mask, column, positions):
    """`mask` without the keys behind the block of each query, which is in `column` at `positions`, both int32 [B or 1, T]."""
    if config.block_size is None:
        return mask
    stop = column - positions % config.block_size + config.block_size
    blocks = masks.KeyIntervals(jnp.zeros_like(stop), stop)
    if mask is None:
        return blocks
    if not isinstance(mask, masks.KeyIntervals) or mask.start2 is not None:
        raise ValueError(f"mask: expected None or one interval a query, with the block_size {config.block_size}, got another")
    return mask & blocks


def _states(config, params, tokens, positions, attend, embedded=None, *, implementation=None):
    """The layers; attend(i, query, key, value) is layer i's attention, [B, L, heads, head_size]."""
    check_masks(config)
    b, length = tokens.shape
    rotation = rope(positions, config.rotary_size or config.head_size, config.rope_theta)
    block = None
    if experts.together(config.experts):
        # Each row's blocks are numbered on from those before; a row of `length` tokens has no more than so many.
        number = positions // config.block_size - positions[:, :1] // config.block_size
        block = (number + jnp.arange(b)[:, None] * length).reshape(-1)
    x = look_up(params["embed"], tokens) if embedded is None else embedded
    # Two axes, not three: XLA's CPU compiler takes half as long again over the gradients of products of [B, L, D].
    x = x.reshape(b * length, -1)
    for i in range(config.layers):
        p = {name: params[f"layers.{i}.{name}"] for name in _layer_shapes(config, i)}
        h = rms_norm(x, p["attention_norm"], config.rms_norm_eps)
        mixed = attend(i, *_query_key_value(config, p, h, (b, length), rotation, implementation))
        x = x + product(mixed.reshape(b * length, -1), p["out"], implementation)
        h = rms_norm(x, p["ffn_norm"], config.rms_norm_eps)
        ffn = _mixture(config.experts, p, h, block, implementation) if "router" in p else _swiglu(p, h, implementation)
        x = x + ffn
    x = x.reshape(b, length, -1)
    if config.shifted:
        x = jnp.where(positions[..., None] == 0, x, jnp.concatenate([x[:, :1], x[:, :-1]], axis=1))
    return rms_norm(x, params["final_norm"], config.rms_norm_eps)


def _swiglu(p, h, implementation, prefix=""):
    return gated(h, *(p[prefix + name] for name in ("gate", "up", "down")), implementation=implementation)


def _mixture(shape, p, h, block, implementation):
    logits = h.astype(jnp.float32) @ p["router"].astype(jnp.float32)
    expert, weight = experts.choose(shape, logits, p.get("router_bias"), block)
    matrices = (p[f"expert_{name}"] for name in ("gate", "up", "down"))
    mixed = mix_experts(h, *matrices, expert, weight, implementation=implementation)
    return mixed + _swiglu(p, h, implementation, "shared_") if shape.shared_ffn else mixed


def _query_key_value(config, p, h, shape, rotation, implementation):
    heads = {}
    for name in ("query", "key", "value"):
        x = product(h, p[name], implementation)
        if config.qkv_bias:
            x = x + p[f"{name}_bias"]
        heads[name] = x.reshape(*shape, -1, config.head_size)
    if config.qk_norm:
        for name in ("query", "key"):
            heads[name] = rms_norm(heads[name], p[f"{name}_norm"], config.rms_norm_eps)
    return rotate(heads["query"], rotation), rotate(heads["key"], rotation), heads["value"]
