"""The divergence of an LM head's distribution from another's, with no logits in memory: the loss of distillation."""

import functools

import jax
import jax.numpy as jnp

from dlm_kernels.ops import checks, dispatch, sharding

_INPUTS = (("hidden", "rd"), ("weight", "vd"), ("target_hidden", "re"), ("target_weight", "ve"), ("active", "r"))
FORWARD = dispatch.Leaf("divergence", "masked_divergence_forward", _INPUTS, ("r", "r", "r"), fold="r", sharded="r")
BACKWARD = dispatch.Leaf(
    "divergence",
    "masked_divergence_backward",
    (*_INPUTS, ("lse", "r"), ("target_lse", "r"), ("dloss", "r")),
    ("rd", "vd"),
    fold="r",
    sharded="",
)


def masked_divergence(hidden, weight, target_hidden, target_weight, weights, *, reduction="sum", implementation=None):
    """KL divergence of the LM head's distribution from a target's, such as a teacher's, where weights are not zero.

        p = log_softmax(jnp.einsum("ble,ve->blv", target_hidden, target_weight))        # never in memory
        q = log_softmax(jnp.einsum("bld,vd->blv", hidden, weight))                      # nor this
        return jnp.sum(weights * jnp.sum(exp(p) * (p - q), -1))

    Arguments:
      hidden: [B, L, D]; weight: [V, D], not packed. target_hidden: [B, L, E]; target_weight: [V, E]. One dtype, float32, bfloat16
        or float16. Distributions at a temperature are those of hidden states divided by it.
      weights: float [B, L], zero where a position has no loss; rows of weight zero are not computed.
      reduction: "sum", or "none" for weights * divergence of every position.
      implementation: "cpu", "triton", "pallas", "xla" or None.

    Returns float32, a scalar or [B, L], in nats. Differentiable in hidden, weight and weights (zero where weights is zero): a
    first gradient, in reverse mode alone; the target is a constant, its gradients zero.
    Raises ValueError for shapes or dtypes that do not fit.
    Source: knowledge distillation (Hinton et al. 2015); fused as Cut Cross-Entropy (Wijmans et al. 2024) fuses the loss.
    """
    dispatch.check(implementation)
    hidden, weight = checks.floats("hidden", hidden, "BLD"), checks.floats("weight", weight, "VD")
    target_hidden = checks.floats("target_hidden", target_hidden, "BLE")
    target_weight = checks.floats("target_weight", target_weight, "VE")
    (b, length, _), (v, _), e = hidden.shape, weight.shape, target_hidden.shape[2]
    checks.head("hidden", hidden, "weight", weight.shape, weight.dtype)
    checks.shaped("target_hidden", target_hidden, (b, length, e), "batch, length of hidden")
    checks.head("target_hidden", target_hidden, "target_weight", target_weight.shape, target_weight.dtype)
    checks.shaped("target_weight", target_weight, (v, e), "as many entries as weight")
    if target_hidden.dtype != hidden.dtype:
        raise ValueError(f"target_hidden: expected hidden's dtype {hidden.dtype}, got {target_hidden.dtype}")
    weights = checks.shaped("weights", checks.numbers("weights", weights), (b, length), "batch, length of hidden")
    checks.one_of("reduction", reduction, ("sum", "none"))
    if hidden.size == 0:
        loss = jnp.zeros((b, length), jnp.float32)
    else:
        arrays = hidden, weight, target_hidden, target_weight, weights != 0
        loss = dispatch.differentiable(_loss, implementation, *arrays)
    return jnp.sum(weights * loss) if reduction == "sum" else weights * loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(implementation, *arrays):
    return _loss_fwd(implementation, *arrays)[0]


def _loss_fwd(implementation, *arrays):
    operands = dict(zip(dict(_INPUTS), arrays, strict=True))
    loss, lse, target_lse = dispatch.call(FORWARD, implementation, operands)
    return loss, operands | dict(lse=lse, target_lse=target_lse)


def _loss_bwd(implementation, operands, dloss):
    gradients = dispatch.call(BACKWARD, implementation, operands | dict(dloss=dloss))
    return *sharding.typed_as((operands["hidden"], operands["weight"]), gradients), None, None, None


_loss.defvjp(_loss_fwd, _loss_bwd)
