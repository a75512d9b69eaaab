"""A mixture of experts: csrc/experts.cc."""

from dlm_kernels import cpu_kernels


def mix_experts(x, gate, up, down, expert, weight, *, activation):
    """x [R,D]; gate, up [E,D,F]; down [E,F,D], one dtype; expert int32, weight float32 [R,K]. Returns [R,D]."""
    operands = x, gate, up, down, expert, weight
    return cpu_kernels.run("mix_experts", cpu_kernels.like(x), *operands, activation=activation)
