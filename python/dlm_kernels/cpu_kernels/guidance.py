"""Guidance on logits: csrc/guidance.cc."""

import jax

from dlm_kernels import cpu_kernels


def mix_guidance(conditional, unconditional, scale):
    """conditional, unconditional [R,V], one dtype; scale float32 [R]. Returns [R,V]."""
    return cpu_kernels.run("mix_guidance", cpu_kernels.like(conditional), conditional, unconditional, scale)


def combine_guidance(logits, weights):
    """logits [C,R,V]; weights float32 [C,R]. Returns [R,V]."""
    return cpu_kernels.run("combine_guidance", jax.ShapeDtypeStruct(logits.shape[1:], logits.dtype), logits, weights)
