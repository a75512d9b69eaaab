"""Classifier-free guidance on logits: two streams, or any weighted sum of streams, mixed in one pass."""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels.launch import Out, dtype_name, launch, strides
from dlm_kernels.triton_kernels.numerics import mixed

_BLOCK = 2048


@triton.jit
def _mix_kernel(
    conditional,  # [R, V]
    unconditional,  # [R, V]
    scale,  # float32 [R]
    out,  # [R, V] in the conditional's dtype
    conditional_r, conditional_v, unconditional_r, unconditional_v,
    vocabulary,  # V
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    c = tl.load(conditional + row * conditional_r + token * conditional_v, mask=inside, other=0).to(tl.float32)
    u = tl.load(unconditional + row * unconditional_r + token * unconditional_v, mask=inside, other=0).to(tl.float32)
    value = mixed(c, u, tl.load(scale + row))
    tl.store(out + row * vocabulary + token, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_kernel(
    logits,  # [C, R, V]
    weights,  # float32 [C, R], contiguous
    out,  # [R, V] in the logits' dtype
    logits_c, logits_r, logits_v,
    streams,  # C
    rows,  # R
    vocabulary,  # V
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    total = tl.zeros([BLOCK], tl.float32)
    banned = tl.zeros([BLOCK], tl.int1)
    at = logits + row * logits_r + token * logits_v
    weight_at = weights + row
    for _ in range(streams):
        weight = tl.load(weight_at)
        if weight != 0.0:
            value = tl.load(at, mask=inside, other=0).to(tl.float32)
            closed = value == float("-inf")
            banned = banned | closed
            # A negative weight would turn -inf into +inf.
            total += tl.where(closed, 0.0, weight * value)
        # By pointer: a stream's index times its stride may pass 32 bits.
        at += logits_c
        weight_at += rows
    total = tl.where(banned, float("-inf"), total)
    tl.store(out + row * vocabulary + token, total.to(out.dtype.element_ty), mask=inside)


def mix_guidance(conditional, unconditional, scale):
    """unconditional + scale[:, None] * (conditional - unconditional).

    conditional, unconditional: [R, V]; scale: float32 [R]. Returns [R, V] in the conditional's dtype.
    """
    rows, vocabulary = conditional.shape
    (out,) = launch(
        _mix_kernel,
        (rows, triton.cdiv(vocabulary, _BLOCK)),
        inputs={"conditional": conditional, "unconditional": unconditional, "scale": scale},
        outputs={"out": Out((rows, vocabulary), dtype_name(conditional))},
        scalars={
            **strides(conditional, "conditional_r conditional_v"),
            **strides(unconditional, "unconditional_r unconditional_v"),
            "vocabulary": vocabulary,
        },
        constants={"BLOCK": _BLOCK},
    )
    return out


def combine_guidance(logits, weights):
    """sum(weights[c, :, None] * logits[c] for c in range(C)).

    logits: [C, R, V]; weights: float32 [C, R], contiguous. Returns [R, V] in the logits' dtype.
    """
    streams, rows, vocabulary = logits.shape
    (out,) = launch(
        _combine_kernel,
        (rows, triton.cdiv(vocabulary, _BLOCK)),
        inputs={"logits": logits, "weights": weights},
        outputs={"out": Out((rows, vocabulary), dtype_name(logits))},
        scalars={
            **strides(logits, "logits_c logits_r logits_v"),
            "streams": streams,
            "rows": rows,
            "vocabulary": vocabulary,
        },
        constants={"BLOCK": _BLOCK},
    )
    return out
