"""What several kernels compute alike, on blocks in registers: the guidance mixture, the soft cap, JAX's Gumbel noise."""

import jax
import jax.numpy as jnp

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
# No draw of JAX's float32 Gumbel exceeds 15.943: a token that trails by more than this cannot be sampled. A TPU's logarithm next to
# 1 may be off by a few percent more than a CPU's: the greatest draw is that of its own.
GREATEST_GUMBEL = 17.0


def mixed(conditional, unconditional, scale):
    """unconditional + scale * (conditional - unconditional); a stream of weight zero is ignored. All float32, broadcasting."""
    value = unconditional + scale * (conditional - unconditional)
    # -inf - -inf is NaN: a token that either stream bans is banned.
    banned = (conditional == -jnp.inf) | (unconditional == -jnp.inf)
    value = jnp.where(banned, -jnp.inf, value)
    return jnp.where(scale == 1, conditional, jnp.where(scale == 0, unconditional, value))


def capped(logits, soft_cap):
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits * (1 / soft_cap))


def rounded(values, dtype):
    """float32 values rounded to the nearest of `dtype`, ties to even; as they are for None. A TPU has no float16 to cast to."""
    if dtype is None or dtype == jnp.float32:
        return values
    info = jnp.finfo(dtype)
    dropped = 23 - info.nmant
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    odd = jax.lax.shift_right_logical(bits, jnp.int32(dropped)) & 1
    bits = (bits + (2 ** (dropped - 1) - 1) + odd) & jnp.int32(-(2**dropped))
    result = jax.lax.bitcast_convert_type(bits, jnp.float32)
    size = jnp.abs(values)
    if info.nexp < 8:
        # Below the least normal the step no longer shrinks: a sum with this has just that step.
        coarse = jnp.float32(float(info.smallest_subnormal) * 2**23)
        small = (size + coarse) - coarse
        result = jnp.where(size < float(info.tiny), jnp.where(values < 0, -small, small), result)
        result = jnp.where(jnp.abs(result) > float(info.max), jnp.where(values < 0, -jnp.inf, jnp.inf), result)
    return jnp.where(size < jnp.inf, result, values)


def gumbel(words, index):
    """float32 [r, n]: JAX's own draw under a threefry key.

    words: int32 [r, 4], the bits of the key's two words and of the counter's low and high word at the row's token 0.
    index: int32 [1 or r, n], tokens. All in int32, whose sums wrap as uint32's do.
    """
    key0, key1, low, high = (words[:, i : i + 1] for i in range(4))
    y = low + index
    # Unsigned y < index, the carry, by signed comparison.
    sign = jnp.int32(-(2**31))
    x = high + jnp.where((y ^ sign) < (index ^ sign), 1, 0)
    keys = key0, key1, key0 ^ key1 ^ jnp.int32(0x1BD11BDA)
    x, y = x + key0, y + key1
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = (jax.lax.shift_left(y, jnp.int32(rotation)) | jax.lax.shift_right_logical(y, jnp.int32(32 - rotation))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.int32(group + 1)
    mantissa = jax.lax.shift_right_logical(x ^ y, jnp.int32(9)) | jnp.int32(0x3F800000)
    uniform = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1
    # The least normal float32, as JAX has it: log 0 would be a draw of -inf.
    uniform = jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)
    return -jnp.log(-jnp.log(uniform))
