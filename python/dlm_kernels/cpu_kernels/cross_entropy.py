"""The training loss fused with the LM head: csrc/head_loss.h and csrc/cross_entropy.cc."""

from dlm_kernels import cpu_kernels


def masked_cross_entropy_forward(hidden, weight, targets, active, *, logits_soft_cap):
    """hidden [R,D]; weight [V,D]; targets int32 [R]; active bool [R]. Returns loss and lse, float32 [R]; 0 where inactive."""
    outputs = cpu_kernels.vector(hidden.shape[0]), cpu_kernels.vector(hidden.shape[0])
    soft_cap = cpu_kernels.number(logits_soft_cap)
    return cpu_kernels.run("masked_cross_entropy_forward", outputs, hidden, weight, targets, active, soft_cap=soft_cap)


def masked_cross_entropy_backward(hidden, weight, targets, active, lse, dloss, *, logits_soft_cap):
    """lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""
    outputs = cpu_kernels.like(hidden), cpu_kernels.like(weight)
    operands = hidden, weight, targets, active, lse, dloss
    soft_cap = cpu_kernels.number(logits_soft_cap)
    return cpu_kernels.run("masked_cross_entropy_backward", outputs, *operands, soft_cap=soft_cap)
