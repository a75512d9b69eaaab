"""The most likely tokens alone. A program has a row, which L2 holds, and reads it again for every two bits of the least kept."""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels.launch import Out, dtype_name, launch, strides
from dlm_kernels.triton_kernels.numerics import exp

_BLOCK = 2048
_PASSES = {"float32": 16, "bfloat16": 8, "float16": 10}  # of two bits; as float32 the others end in zeros, 16 and 13


@triton.jit
def _key(x):
    """uint32 that are ordered as the float32s are, of -0 as of 0. No number is NaN."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _read(
    logits,  # of this row: [V]
    token,  # int32 [BLOCK]
    vocabulary,  # V
    logits_v,
):  # fmt: skip
    """float32 [BLOCK]; -inf past the vocabulary."""
    return tl.load(logits + token.to(tl.int64) * logits_v, mask=token < vocabulary, other=float("-inf")).to(tl.float32)


@triton.jit
def _truncate_kernel(
    logits,  # [R, V]
    inverse_temperature,  # float32 [R]
    top_p,  # float32 [R] | None
    top_k,  # int32 [R] | None
    out,  # [R, V] in the logits' dtype
    logits_r, logits_v,
    vocabulary,  # V
    HAS_TOP_P: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * logits_r
    lane = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        x = _read(at, start + lane, vocabulary, logits_v)
        tops = tl.maximum(tops, x)
        wrong |= ((x != x) | (x == float("inf"))).to(tl.int32)
    top = tl.max(tops, 0)
    undefined = (tl.max(wrong, 0) != 0) | (top == float("-inf"))

    wanted = float("inf")
    inverse = tl.load(inverse_temperature + row)
    if HAS_TOP_P:
        share = tl.load(top_p + row)
        masses = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            x = _read(at, start + lane, vocabulary, logits_v)
            masses += exp((x - top) * inverse)
        wanted = tl.where(share >= 1, float("inf"), share * tl.sum(masses, 0))
    most = 0
    if HAS_TOP_K:
        most = tl.load(top_k + row)

    # The least key that is kept, in its bits that are known; the others are 0. Its next two are the first of 0, 1, 2 with which,
    # all further bits 1, a token is kept, or 3.
    least = tl.full([], 0, tl.uint32)
    unit = tl.full([], 1 << 30, tl.uint32)
    for _ in range(tl.where(undefined, 0, PASSES)):
        key0 = least | (unit - 1)
        key1 = key0 + unit
        key2 = key1 + unit
        mass0 = tl.zeros([BLOCK], tl.float32)
        mass1 = tl.zeros([BLOCK], tl.float32)
        mass2 = tl.zeros([BLOCK], tl.float32)
        count0 = tl.zeros([BLOCK], tl.int32)
        count1 = tl.zeros([BLOCK], tl.int32)
        count2 = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocabulary, BLOCK):
            x = _read(at, start + lane, vocabulary, logits_v)
            key = _key(x)
            if HAS_TOP_P:
                mass = exp((x - top) * inverse)
                mass0 += tl.where(key > key0, mass, 0.0)
                mass1 += tl.where(key > key1, mass, 0.0)
                mass2 += tl.where(key > key2, mass, 0.0)
            if HAS_TOP_K:
                count0 += (key > key0).to(tl.int32)
                count1 += (key > key1).to(tl.int32)
                count2 += (key > key2).to(tl.int32)
        kept0 = True
        kept1 = True
        kept2 = True
        if HAS_TOP_P:
            kept0 &= tl.sum(mass0, 0) < wanted
            kept1 &= tl.sum(mass1, 0) < wanted
            kept2 &= tl.sum(mass2, 0) < wanted
        if HAS_TOP_K:
            kept0 &= tl.sum(count0, 0) < most
            kept1 &= tl.sum(count1, 0) < most
            kept2 &= tl.sum(count2, 0) < most
        least += unit * tl.where(kept0, 0, tl.where(kept1, 1, tl.where(kept2, 2, 3))).to(tl.uint32)
        unit = unit >> 2
    # The most likely is kept whatever top_p and top_k are.
    least = tl.where(undefined, 0, tl.minimum(least, _key(top)))
    for start in range(0, vocabulary, BLOCK):
        token = start + lane
        x = _read(at, token, vocabulary, logits_v)
        kept = tl.where((_key(x) >= least) | undefined, x, float("-inf"))
        tl.store(out + row * vocabulary + token, kept.to(out.dtype.element_ty), mask=token < vocabulary)


def truncate_logits(logits, inverse_temperature, top_p, top_k):
    """logits [R,V]; inverse_temperature, top_p float32 [R]; top_k int32 [R]. Returns [R,V] in the logits' dtype."""
    rows, vocabulary = logits.shape
    (out,) = launch(
        _truncate_kernel,
        (rows,),
        inputs={"logits": logits, "inverse_temperature": inverse_temperature, "top_p": top_p, "top_k": top_k},
        outputs={"out": Out((rows, vocabulary), dtype_name(logits))},
        scalars={**strides(logits, "logits_r logits_v"), "vocabulary": vocabulary},
        constants={"PASSES": _PASSES[dtype_name(logits)], "BLOCK": _BLOCK},
        num_warps=8,
    )
    return out
