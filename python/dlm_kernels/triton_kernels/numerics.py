"""What several kernels compute alike: guidance, a gradient's product, the exponential, the soft cap, JAX's Gumbel noise."""

import triton
import triton.language as tl

# No draw of JAX's float32 Gumbel exceeds 15.943: a token that trails by more than this cannot be sampled.
GREATEST_GUMBEL = tl.constexpr(16.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def mixed(conditional, unconditional, scale):
    """unconditional + scale * (conditional - unconditional) in float32; a stream of weight zero is ignored.

    conditional, unconditional: float32 [...], scale: float32, a scalar or broadcastable.
    """
    value = unconditional + scale * (conditional - unconditional)
    # -inf - -inf is NaN: a token that either stream bans is banned.
    banned = (conditional == float("-inf")) | (unconditional == float("-inf"))
    value = tl.where(banned, float("-inf"), value)
    value = tl.where(scale == 1.0, conditional, value)
    return tl.where(scale == 0.0, unconditional, value)


@triton.jit
def exp(x):
    """float32 [...]; 0 where that is below the least normal number, for whose sake tl.exp takes three instructions more."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def tanh(x):
    """float32 [...]. Through exp it would lose the small values to 1 - 1, so those take the series."""
    e = exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    x2 = x * x
    near = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    # Not `< 0.3` turned around: a NaN must take a branch that keeps it.
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def gradient_dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, of which a, float32 [M, K], is rounded to the dtype of b, [K, N]; total: float32 [M, N].

    The gradients of a mean are below float16's least number, and those of a scaled loss above its greatest: of float16 each row of
    a is multiplied by the power of two that brings its greatest to 2**14, and its products by the inverse.
    """
    if b.dtype == tl.float16:
        a = a.to(tl.float32)
        # An exponent of 253 at most: the inverse of the next power of two is no normal number.
        exponent = tl.minimum(268 - (tl.max(tl.abs(a), 1).to(tl.int32, bitcast=True) >> 23), 253)[:, None]
        a *= (exponent << 23).to(tl.float32, bitcast=True)
        total += tl.dot(a.to(tl.float16), b) * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    else:
        total = tl.dot(a.to(b.dtype), b, total, input_precision=PRECISION)
    return total


@triton.jit
def _four_rounds(x, y, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):
    x += y
    y = ((y << a) | (y >> (32 - a))) ^ x
    x += y
    y = ((y << b) | (y >> (32 - b))) ^ x
    x += y
    y = ((y << c) | (y >> (32 - c))) ^ x
    x += y
    y = ((y << d) | (y >> (32 - d))) ^ x
    return x, y


@triton.jit
def gumbel(key0, key1, counter):
    """JAX's own draw: element `counter` (int64 [...]) of jax.random.gumbel under the threefry key (key0, key1), uint32.

    The key words are scalars or broadcast with the counter.
    """
    x = (counter >> 32).to(tl.uint32) + key0
    y = counter.to(tl.uint32) + key1
    key2 = key0 ^ key1 ^ 0x1BD11BDA
    x, y = _four_rounds(x, y, 13, 15, 26, 6)
    x += key1
    y += key2 + 1
    x, y = _four_rounds(x, y, 17, 29, 16, 24)
    x += key2
    y += key0 + 2
    x, y = _four_rounds(x, y, 13, 15, 26, 6)
    x += key0
    y += key1 + 3
    x, y = _four_rounds(x, y, 17, 29, 16, 24)
    x += key1
    y += key2 + 4
    x, y = _four_rounds(x, y, 13, 15, 26, 6)
    x += key2
    y += key0 + 5
    bits = ((x ^ y) >> 9) | 0x3F800000
    uniform = bits.to(tl.float32, bitcast=True) - 1.0
    # The least normal float32, as JAX has it: log 0 would be a draw of -inf.
    uniform = tl.maximum(uniform, 1.1754943508222875e-38)
    return -tl.log(-tl.log(uniform))
