"""The most likely tokens alone: csrc/truncation.cc."""

from dlm_kernels import cpu_kernels


def truncate_logits(logits, inverse_temperature, top_p, top_k):
    """logits [R,V]; inverse_temperature, top_p float32 [R]; top_k int32 [R]. Returns [R,V]."""
    return cpu_kernels.run("truncate_logits", cpu_kernels.like(logits), logits, inverse_temperature, top_p, top_k)
