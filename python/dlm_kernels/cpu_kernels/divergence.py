"""The divergence between two LM heads: csrc/divergence.cc."""

from dlm_kernels import cpu_kernels


def masked_divergence_forward(hidden, weight, target_hidden, target_weight, active):
    """hidden [R,D]; weight [V,D]; target_hidden [R,E]; target_weight [V,E]; active bool [R].

    Returns loss, lse and target_lse, float32 [R]; 0 where inactive.
    """
    outputs = tuple(cpu_kernels.vector(hidden.shape[0]) for _ in range(3))
    return cpu_kernels.run("masked_divergence_forward", outputs, hidden, weight, target_hidden, target_weight, active)


def masked_divergence_backward(hidden, weight, target_hidden, target_weight, active, lse, target_lse, dloss):
    """lse, target_lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""
    outputs = cpu_kernels.like(hidden), cpu_kernels.like(weight)
    operands = hidden, weight, target_hidden, target_weight, active, lse, target_lse, dloss
    return cpu_kernels.run("masked_divergence_backward", outputs, *operands)
