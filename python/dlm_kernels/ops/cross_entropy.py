"""The training loss of an LM head's logits, with no logits in memory."""

import functools

import jax
import jax.numpy as jnp

from dlm_kernels.ops import checks, dispatch, sharding

_INPUTS = (("hidden", "rd"), ("weight", "vd"), ("targets", "r"), ("active", "r"))
FORWARD = dispatch.Leaf("cross_entropy", "masked_cross_entropy_forward", _INPUTS, ("r", "r"), fold="r", sharded="r")
BACKWARD = dispatch.Leaf(
    "cross_entropy",
    "masked_cross_entropy_backward",
    (*_INPUTS, ("lse", "r"), ("dloss", "r")),
    ("rd", "vd"),
    fold="r",
    sharded="",
)


def masked_cross_entropy(
    hidden, weight, targets, weights, *, reduction="sum", logits_soft_cap=None, implementation=None
):
    """The training loss of a masked diffusion model: cross-entropy of the LM head where weights are not zero.

        logits = jnp.einsum("bld,vd->blv", hidden, weight)                      # never in memory
        loss = logsumexp(logits, -1) - take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.sum(weights * loss)

    Arguments:
      hidden: [B, L, D]; weight: [V, D], not packed; one dtype, float32, bfloat16 or float16. A head's bias is one more column of
        the weight, of which every hidden state has 1.
      targets: int [B, L] in [0, V). weights: float [B, L], zero where a position has no loss (LLaDA: 1 / t where masked);
        rows of weight zero are not computed, and their targets may be anything.
      reduction: "sum", or "none" for weights * loss of every position.
      logits_soft_cap, implementation: as in `score_tokens`.

    Returns float32, a scalar or [B, L], in nats. Differentiable in hidden, weight and weights (zero where weights is zero): a
    first gradient, in reverse mode alone. A target outside [0, V) gives NaN.
    Raises ValueError for shapes or dtypes that do not fit.
    Source: LLaDA's loss, and MDLM's but for the mask, whose logit MDLM takes for -inf: here it is a token as others; fused as Cut
    Cross-Entropy (Wijmans et al. 2024) does.
    """
    dispatch.check(implementation)
    hidden, weight = checks.floats("hidden", hidden, "BLD"), checks.floats("weight", weight, "VD")
    checks.head("hidden", hidden, "weight", weight.shape, weight.dtype)
    b, length, _ = hidden.shape
    targets = checks.shaped("targets", checks.ints("targets", targets, "BL"), (b, length), "batch, length of hidden")
    weights = checks.shaped("weights", checks.numbers("weights", weights), (b, length), "batch, length of hidden")
    checks.one_of("reduction", reduction, ("sum", "none"))
    static = (checks.soft_cap(logits_soft_cap), implementation)
    if hidden.size == 0:
        loss = jnp.zeros((b, length), jnp.float32)
    else:
        loss = dispatch.differentiable(_loss, static, hidden, weight, targets, weights != 0)
    return jnp.sum(weights * loss) if reduction == "sum" else weights * loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static, hidden, weight, targets, active):
    return _loss_fwd(static, hidden, weight, targets, active)[0]


def _loss_fwd(static, hidden, weight, targets, active):
    soft_cap, implementation = static
    operands = dict(hidden=hidden, weight=weight, targets=targets, active=active)
    loss, lse = dispatch.call(FORWARD, implementation, operands, logits_soft_cap=soft_cap)
    return loss, (operands, lse)


def _loss_bwd(static, residuals, dloss):
    soft_cap, implementation = static
    operands, lse = residuals
    operands = operands | dict(lse=lse, dloss=dloss)
    dhidden, dweight = dispatch.call(BACKWARD, implementation, operands, logits_soft_cap=soft_cap)
    return *sharding.typed_as((operands["hidden"], operands["weight"]), (dhidden, dweight)), None, None


_loss.defvjp(_loss_fwd, _loss_bwd)
