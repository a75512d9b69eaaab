"""The LM head fused with scoring: csrc/head.h and csrc/lm_head.cc."""

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels import cpu_kernels
from dlm_kernels.cpu_kernels.unmask import scores

PANEL = 32  # kPackedPanel in csrc/head.h


def packed_shape(v, d, dtype):
    """[ceil(V/32), ceil(D/G), 32, G]; G is 2 for bfloat16, of which one instruction multiplies two neighbours, else 1."""
    together = 2 if dtype == jnp.bfloat16 else 1
    return -(-v // PANEL), -(-d // together), PANEL, together


@jax.jit  # step by step it would copy the weight three times
def pack(weight):
    """weight [V,D] in `packed_shape`: panels of 32 rows in the order in which the product reads them, zeros behind V and D."""
    v, d = weight.shape
    panels, groups, _, together = packed_shape(v, d, weight.dtype)
    weight = jnp.pad(weight, ((0, panels * PANEL - v), (0, groups * together - d)))
    return weight.reshape(panels, PANEL, groups, together).transpose(0, 2, 1, 3)


def lm_head_scores(
    hidden,
    weight,
    temperature,
    key_data,
    counter_row,
    noise,
    active,
    banned,
    *,
    confidence,
    tempered_confidence,
    logits_soft_cap,
    logits_dtype,
    vocabulary=None,
):
    """hidden [R,D], weight [V,D] or as `pack` has it, then with V = vocabulary, one dtype; the rest and the result as in
    `unmask.score_tokens`.
    """
    return cpu_kernels.run(
        "lm_head_scores",
        scores(hidden.shape[0]),
        *(hidden, weight, temperature, key_data, counter_row, noise, active, banned),
        confidence=confidence,
        tempered_confidence=tempered_confidence,
        soft_cap=cpu_kernels.number(logits_soft_cap),
        logits_dtype="" if logits_dtype is None else jnp.dtype(logits_dtype).name,
        vocabulary=np.int64(weight.shape[0] if vocabulary is None else vocabulary),
    )
