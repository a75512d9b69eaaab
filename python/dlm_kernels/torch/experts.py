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
        """One expert's rows after the other's. The host waits once, to know how many each has; frozen arrays cost nothing."""
        refuse_second_gradients()
        x, gate, up, down, expert, weight = context.saved_tensors
        weights = weight.flatten()
        *needed, _, of_weight, _ = context.needs_input_grad
        # A row with an unknown expert has no part at all: zeros times a NaN in it would be NaN. Such rows are sorted last.
        known = ((expert >= 0) & (expert < len(gate))).all(-1, keepdim=True)
        sorted_by = torch.where(known, expert, len(gate)).flatten()
        counts = sorted_by.bincount(minlength=len(gate) + 1).tolist()
        # Of x for each pair of a row and an expert, to be added up in one order.
        dx = torch.zeros((len(sorted_by), x.shape[1]), device=x.device) if needed[0] else None
        dgate, dup, ddown, dweight = (
            torch.zeros_like(array) if wanted else None
            for array, wanted in zip((gate, up, down, weights), (*needed[1:], of_weight))
        )
        gradients = dx, dgate, dup, ddown, dweight
        for e, pair in enumerate(sorted_by.argsort(stable=True).split(counts)[:-1]):
            if len(pair) == 0:
                continue
            row = pair // expert.shape[1]
            own = [x[row], gate[e], up[e], down[e], weights[pair]]
            own = [array.detach().requires_grad_(gradient is not None) for array, gradient in zip(own, gradients)]
            with torch.enable_grad():
                out = _one_expert(*own, context.activation)
            found = iter(torch.autograd.grad(out, [array for array in own if array.requires_grad], dout[row].float()))
            for gradient, at in zip(gradients, (pair, e, e, e, pair)):
                if gradient is not None:
                    gradient[at] = next(found).to(gradient.dtype)
        if needed[0]:
            dx = dx.view(*expert.shape, -1).sum(1).to(x.dtype)
        if of_weight:
            dweight = dweight.view_as(weight)
        return dx, dgate, dup, ddown, None, dweight, None


def _one_expert(x, gate, up, down, weight, activation):
    """float32 [R, D] of x [R, D] and weight [R]: what this expert gives."""
    act = {"silu": functional.silu, "gelu": functools.partial(functional.gelu, approximate="tanh")}[activation]
    hidden = (act((x @ gate).float()) * (x @ up).float()).to(x.dtype)
    return (hidden @ down).float() * weight[:, None]
