"""A mixture of experts on CUDA tensors: the Triton kernels forward, and torch's own gradients, one expert after the other."""

import functools

import torch
from torch.nn import functional

from dlm_kernels.torch import refuse_second_gradients
from dlm_kernels.triton_kernels import experts


class Experts(torch.autograd.Function):
    @staticmethod
    def forward(context, *arguments):
        *arrays, context.activation = arguments
        context.save_for_backward(*arrays)
        return experts.mix_experts(*arrays, activation=context.activation)

    @staticmethod
    def backward(context, dout):
        """One expert after the other, which waits for the host to know how many rows it has."""
        refuse_second_gradients()
        x, gate, up, down, expert, weight = context.saved_tensors
        # A row with an unknown expert has no part at all: zeros times a NaN in it would be NaN.
        known = ((expert >= 0) & (expert < len(gate))).all(-1, keepdim=True).expand_as(expert)
        expert = torch.where(known, expert, -1)
        # Of each pair, to be added up in one order.
        dx = x.new_zeros((*expert.shape, x.shape[-1]), dtype=torch.float32)
        dgate, dup, ddown, dweight = map(torch.zeros_like, (gate, up, down, weight))
        for e in expert[known].unique().tolist():
            row, j = pair = (expert == e).nonzero(as_tuple=True)
            own = [array.detach().requires_grad_() for array in (x[row], gate[e], up[e], down[e], weight[pair])]
            with torch.enable_grad():
                out = _one_expert(*own, context.activation)
            of_own = torch.autograd.grad(out, own, dout[row].float())
            for gradient, at, value in zip((dx, dgate, dup, ddown, dweight), (pair, e, e, e, pair), of_own):
                gradient[at] = value.to(gradient.dtype)
        return dx.sum(1).to(x.dtype), dgate, dup, ddown, None, dweight, None


def _one_expert(x, gate, up, down, weight, activation):
    """float32 [R, D] of x [R, D] and weight [R]: what this expert gives."""
    act = {"silu": functional.silu, "gelu": functools.partial(functional.gelu, approximate="tanh")}[activation]
    hidden = (act((x @ gate).float()) * (x @ up).float()).to(x.dtype)
    return (hidden @ down).float() * weight[:, None]
