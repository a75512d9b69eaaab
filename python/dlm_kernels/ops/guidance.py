"""Guidance mixing: the weighted sums of logits (or hidden states) that classifier-free guidance is made of."""

import functools

import jax
import jax.numpy as jnp

from dlm_kernels.ops import checks, dispatch, sharding

_STREAMS = (("conditional", "rv"), ("unconditional", "rv"), ("scale", "r"))
MIX = dispatch.Leaf("guidance", "mix_guidance", _STREAMS, ("rv",), fold="r", sharded="r")
COMBINE = dispatch.Leaf("guidance", "combine_guidance", (("logits", "crv"), ("weights", "cr")), ("rv",), fold="r", sharded="r")


def mix_guidance(conditional, unconditional, scale, *, implementation=None):
    """Classifier-free guidance of two streams.

        unconditional + scale * (conditional - unconditional)                   # float32

    Arguments:
      conditional, unconditional: [B, L, V] (or [B, V], or hidden states: any last axis), one shape, one dtype.
      scale: a scalar, [B] or [B, L]; traced or not. 1 is the conditional model, 0 the unconditional one, exactly.
        scale = LLaDA's cfg_scale + 1 = diffusers' guidance_scale.
      implementation: "cpu", "triton", "pallas", "xla" or None.

    Returns the mixture in conditional's dtype. -inf (a banned token) in either stream stays -inf, never NaN; a stream whose
    weight is exactly zero is ignored. Differentiable in all three, but not on torch tensors.
    Raises ValueError for shapes or dtypes that do not fit. Source: Ho and Salimans 2022, as LLaDA applies it to logits.
    """
    dispatch.check(implementation)
    conditional = checks.array("conditional", conditional)
    if conditional.ndim not in (2, 3):
        raise ValueError(f"conditional: expected shape [B, L, V] or [B, V], got {list(conditional.shape)}")
    axes = "BLV" if conditional.ndim == 3 else "BV"
    conditional = checks.floats("conditional", conditional, axes)
    unconditional = checks.floats("unconditional", unconditional, axes)
    checks.shaped("unconditional", unconditional, conditional.shape, "conditional's shape")
    if conditional.dtype != unconditional.dtype:
        raise ValueError(f"unconditional: expected conditional's dtype {conditional.dtype}, got {unconditional.dtype}")
    batch, length = conditional.shape[0], conditional.shape[1] if conditional.ndim == 3 else 1
    scale = checks.per_row("scale", scale, batch, length).reshape(conditional.shape[:-1])
    if conditional.size == 0:
        return conditional
    return dispatch.differentiable(_mix, implementation, conditional, unconditional, scale)


def combine_guidance(logits, weights, *, implementation=None):
    """The weighted sum of any number of streams: negative prompts, several attributes at once.

        jnp.einsum("c...v,c...->...v", logits, weights)                         # float32

    Arguments:
      logits: [C, B, L, V] or [C, B, V], C streams. weights: [C], [C, B] or [C, B, L]; traced or not.
      implementation: "cpu", "triton", "pallas", "xla" or None.

    Returns [B, L, V] or [B, V] in the dtype of logits. A stream of weight zero is ignored; -inf in any other stays -inf.
    `mix_guidance(c, u, s)` is weights [s, 1 - s]. Differentiable in both, but not on torch tensors.
    Raises ValueError for shapes that do not fit. Source: Liu et al. 2022, composable diffusion.
    """
    dispatch.check(implementation)
    logits = checks.array("logits", logits)
    if logits.ndim not in (3, 4):
        raise ValueError(f"logits: expected shape [C, B, L, V] or [C, B, V], got {list(logits.shape)}")
    logits = checks.floats("logits", logits, logits.shape)
    lead = logits.shape[:-1]
    weights = checks.numbers("weights", weights)
    if weights.ndim < 1 or weights.shape != lead[: weights.ndim]:
        raise ValueError(f"weights: expected shape [C], [C, B] or [C, B, L] of {list(lead)}, got {list(weights.shape)}")
    weights = checks.broadcast(weights.reshape(weights.shape + (1,) * (len(lead) - weights.ndim)), lead)
    if logits.size == 0:
        return jnp.zeros(logits.shape[1:], logits.dtype)
    return dispatch.differentiable(_combine, implementation, logits, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(implementation, conditional, unconditional, scale):
    operands = dict(conditional=conditional, unconditional=unconditional, scale=scale)
    return dispatch.call(MIX, implementation, operands)[0]


def _mix_fwd(implementation, conditional, unconditional, scale):
    return _mix(implementation, conditional, unconditional, scale), (conditional, unconditional, scale)


def _mix_bwd(implementation, residuals, cotangent):
    conditional, unconditional, scale = residuals
    weights = jnp.stack([scale, 1 - scale])
    # Stacked they are split alike, as explicit axes may not have them.
    streams = jnp.stack([sharding.split_as(cotangent, x) for x in (conditional, unconditional)])
    cotangent, (c, u) = _changing(streams, weights, cotangent)
    streams = (cotangent * weights[..., None]).astype(conditional.dtype)
    # Of the difference: of the streams' own sums, where they are much alike, little would be left.
    return sharding.typed_as(residuals, (*streams, (cotangent * (c - u)).sum(-1)))


_mix.defvjp(_mix_fwd, _mix_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(implementation, logits, weights):
    return dispatch.call(COMBINE, implementation, dict(logits=logits, weights=weights))[0]


def _combine_fwd(implementation, logits, weights):
    return _combine(implementation, logits, weights), (logits, weights)


def _combine_bwd(implementation, residuals, cotangent):
    logits, weights = residuals
    cotangent, finite = _changing(logits, weights, cotangent)
    gradients = (cotangent * weights[..., None]).astype(logits.dtype), (cotangent * finite).sum(-1)
    return sharding.typed_as(residuals, gradients)


def _changing(logits, weights, cotangent):
    """The cotangent of the weighted sum, 0 where some stream is banned (-inf), for there it is constant; and the streams, 0 for
    -inf; float32.
    """
    cotangent = jnp.where((jnp.isneginf(logits) & (weights[..., None] != 0)).any(0), 0, cotangent.astype(jnp.float32))
    return cotangent, jnp.where(jnp.isneginf(logits), 0, logits.astype(jnp.float32))


_combine.defvjp(_combine_fwd, _combine_bwd)
