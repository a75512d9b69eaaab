"""The LM head fused with the scores of its logits, which never exist in memory."""

import dataclasses
import functools

import jax

from dlm_kernels import cpu_kernels
from dlm_kernels.cpu_kernels import lm_head as cpu_lm_head
from dlm_kernels.ops import checks, dispatch, guidance, unmask

SCORES = dispatch.Leaf(
    "lm_head",
    "lm_head_scores",
    (("hidden", "rd"), ("weight", "vd"), *unmask.SAMPLING),
    ("r", "r", "r", "r"),
    fold="r",
    sharded="r",
)
_PACKED = tuple((name, "xyzt" if name == "weight" else axes) for name, axes in SCORES.operands)
PACKED_SCORES = dataclasses.replace(SCORES, operands=_PACKED)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["layout", "vocabulary", "width"])
@dataclasses.dataclass(frozen=True)
class PackedHead:
    """An LM head's weight [V, D] in the order in which a kernel reads it. `pack_lm_head` makes it.

    A pytree of one array: it passes through jit, as an argument too, device_put and checkpoints.
    """

    array: jax.Array  # layout "rows": the weight; "panels": as cpu_kernels.lm_head.pack has it, on every CPU alike
    layout: str
    vocabulary: int  # V
    width: int  # D


def pack_lm_head(weight, *, implementation=None):
    """Lays an LM head's weight out once for many calls of `lm_head_scores`, which give the same bits as without.

        return weight                                                           # in another order

    Arguments:
      weight: [V, D], float32, bfloat16 or float16; rounded up to a multiple of 32 rows it takes the same memory again.
      implementation: whose order. "cpu": panels of 32 rows; its kernel would else transpose the weight in every call. The others
        read rows, so "triton", "pallas" and "xla" keep them. None: "cpu" where JAX's default backend is the CPU, else rows.

    Returns a PackedHead. `lm_head_scores` takes one of rows with every implementation, and one of panels with "cpu" and "xla".
    Raises ValueError for a weight that no head has, or for an implementation that is unknown or not to be had.
    """
    weight = checks.floats("weight", weight, "VD")
    v, d = weight.shape
    if 0 in (v, d):
        raise ValueError(f"weight: expected shape [V, D] with V and D of at least 1, got {[v, d]}")
    if implementation is None:
        implementation = "cpu" if jax.default_backend() == "cpu" and not cpu_kernels.unavailable() else "xla"
    dispatch.check(implementation)
    if implementation != "cpu":
        return PackedHead(weight, "rows", v, d)
    if reason := cpu_kernels.unavailable():
        raise ValueError(f"implementation='cpu' cannot run pack_lm_head: {reason}")
    return PackedHead(cpu_lm_head.pack(weight), "panels", v, d)


def lm_head_scores(
    hidden,
    weight,
    *,
    unconditional_hidden=None,
    guidance_scale=None,
    confidence="probability",
    temperature=0.0,
    tempered_confidence=False,
    key=None,
    noise=None,
    active=None,
    banned_tokens=None,
    logits_soft_cap=None,
    logits_dtype=None,
    implementation=None,
):
    """`score_tokens` of the LM head's logits, which never exist in memory.

        hidden = mix_guidance(hidden, unconditional_hidden, guidance_scale)     # with guidance
        logits = jnp.einsum("bld,vd->blv", hidden, weight)                      # float32 accumulation
        logits = logits.astype(logits_dtype)                                    # if given
        return score_tokens(logits, ...)

    Arguments:
      hidden: [B, L, D]; weight: [V, D], or what `pack_lm_head` made of it; one dtype, float32, bfloat16 or float16. A head's bias
        is one more column of the weight, of which every hidden state has 1. On a mesh rows may be split; a weight that is split is
        gathered.
      unconditional_hidden, guidance_scale: guidance mixed before the head, once rounded to hidden's dtype. It is exact because the
        head is linear, and halves the work; a soft cap is not linear, so the two are refused together.
      logits_dtype: bfloat16 or float16 rounds the logits, as a model that materialises them would; for parity.
      The others: as in `score_tokens`.

    Returns `TokenScores`, as `score_tokens` does, of the head's logits. Raises ValueError for arguments that do not fit each other.
    Not differentiable; `masked_cross_entropy` is for training. Source: `score_tokens`' for the scores; guidance as LLaDA applies it
    to logits, mixed before the head as it is linear.
    """
    dispatch.check(implementation)
    hidden = checks.floats("hidden", hidden, "BLD")
    b, length, _ = hidden.shape
    head = weight if isinstance(weight, PackedHead) else PackedHead(checks.floats("weight", weight, "VD"), "rows", *weight.shape)
    v = head.vocabulary
    checks.head("hidden", hidden, "weight", (v, head.width), head.array.dtype)
    leaf, packed = SCORES, {}
    if head.layout == "panels":
        if head.array.shape != cpu_lm_head.packed_shape(v, head.width, head.array.dtype):
            raise ValueError(
                f"weight: expected panels that pack_lm_head made of {head.array.dtype}, got those of another dtype, converted since"
            )
        leaf, packed = PACKED_SCORES, dict(vocabulary=v)
    if (unconditional_hidden is None) != (guidance_scale is None):
        raise ValueError("unconditional_hidden, guidance_scale: expected both or neither")
    if unconditional_hidden is not None:
        if logits_soft_cap is not None:
            raise ValueError(
                "logits_soft_cap: guidance in hidden space is exact for a linear head only; mix logits instead"
            )
        unconditional_hidden = checks.floats("unconditional_hidden", unconditional_hidden, "BLD")
        checks.shaped("unconditional_hidden", unconditional_hidden, hidden.shape, "hidden's shape")
        if unconditional_hidden.dtype != hidden.dtype:
            raise ValueError(f"unconditional_hidden: expected hidden's dtype {hidden.dtype}, got {unconditional_hidden.dtype}")
        guidance_scale = checks.per_row("guidance_scale", guidance_scale, b, length)
        hidden = guidance.mix_guidance(hidden, unconditional_hidden, guidance_scale, implementation=implementation)
    soft_cap, logits_dtype = checks.soft_cap(logits_soft_cap), checks.float_dtype("logits_dtype", logits_dtype)
    sampling = dict(temperature=temperature, key=key, noise=noise, active=active, banned_tokens=banned_tokens)
    operands = unmask.sampling_operands(b, length, v, confidence, **sampling)
    operands |= dict(hidden=hidden, weight=head.array)
    if hidden.size == 0:
        return unmask.empty_scores(b, length)
    results = dispatch.call(
        leaf,
        implementation,
        operands,
        confidence="probability" if confidence == "random" else confidence,
        tempered_confidence=bool(tempered_confidence),
        logits_soft_cap=soft_cap,
        logits_dtype=logits_dtype,
        **packed,
    )
    return unmask.token_scores(results, confidence, key, active)
