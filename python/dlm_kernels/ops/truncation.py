"""Truncation of a distribution to its most likely tokens, before one is drawn: top_p and top_k."""

import numbers

import jax.numpy as jnp
import numpy as np

from dlm_kernels.ops import checks, dispatch

TRUNCATE = dispatch.Leaf(
    "truncation",
    "truncate_logits",
    (("logits", "rv"), ("inverse_temperature", "r"), ("top_p", "r"), ("top_k", "r")),
    ("rv",),
    fold="r",
    sharded="r",
)


def truncate_logits(logits, *, top_p=None, top_k=None, temperature=1.0, implementation=None):
    """The logits of the most likely tokens, and -inf for all others: nucleus and top-k sampling's filter.

        p = softmax(logits / temperature)                                       # float32
        keep = [p[p > p[i]].sum() < top_p and (p > p[i]).sum() < top_k for i in range(V)]
        where(keep, logits, -inf)

    so the most likely first, until their sum reaches top_p (the one that reaches it is kept), and of these no more than top_k.
    Both are thresholds: tokens tied with the least that is kept are kept too.

    Arguments:
      logits: [B, L, V]; float32, bfloat16 or float16.
      top_p: in (0, 1], scalar, [B] or [B, L], traced or not; 1 keeps all, None too. top_k: an integer of at least 1, likewise; V
        or more keeps all, None too. Of arrays, whose numbers are not looked at, what is below these bounds keeps the most
        likely alone, and what is above keeps all.
      temperature: scalar, [B] or [B, L], traced or not; 0 counts as 1, as in Dream's code. It matters to top_p alone: the logits
        that come back are not divided by it.
      implementation: "cpu", "triton", "pallas", "xla" or None.

    Returns logits in their own dtype. A row that has NaN or +inf, or is all -inf, comes back as it is. Not differentiable.
    Raises ValueError for arguments that do not fit. A step of Dream at a temperature t is

        unmask_step(truncate_logits(shifted, top_p=0.95, temperature=t), tokens, temperature=t, tempered_confidence=True, ...)

    Source: Dream generation_utils.py, which has top_p before top_k. SDAR has top_k first, and then top_p of what is left:
    `truncate_logits(truncate_logits(logits, top_k=k), top_p=p, temperature=t)`. Fast-dLLM v2 has top_p alone.
    """
    dispatch.check(implementation)
    logits = checks.floats("logits", logits, "BLV")
    b, length, _ = logits.shape
    if isinstance(top_p, numbers.Real) and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected None or a number above 0 and at most 1, got {top_p}")
    if isinstance(top_k, numbers.Real) and top_k < 1:
        raise ValueError(f"top_k: expected None or an integer of at least 1, got {top_k}")
    checks.not_negative("temperature", temperature)
    temperature = checks.per_row("temperature", temperature, b, length)
    operands = dict(
        logits=logits,
        inverse_temperature=inverse(checks.library(temperature), temperature),
        top_p=None if top_p is None else checks.per_row("top_p", top_p, b, length),
        top_k=None if top_k is None else checks.per_row("top_k", top_k, b, length, jnp.int32),
    )
    if logits.size == 0 or (top_p is None and top_k is None):
        return logits
    return dispatch.call(TRUNCATE, implementation, operands)[0]


def inverse(xp, temperature):
    """What the logits are multiplied by: 1 where the temperature is not above 0, and a normal number even for the least and for
    infinity, for 0 times infinity would be NaN. xp: jax.numpy, numpy or torch.
    """
    bounds = xp.finfo(xp.float32)
    with np.errstate(over="ignore"):
        return xp.clip(1 / xp.where(temperature > 0, temperature, 1), bounds.tiny, bounds.max)
