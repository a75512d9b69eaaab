"""The same operations on torch tensors: same names, same arguments, torch results.

    from dlm_kernels.torch import attention
    out = attention(query, key, value, mask=mask)

Tensors on a GPU go to the Triton kernels without JAX in between (`native.py`); attention and the losses have gradients
there. Tensors on the CPU are handed to JAX and back through DLPack, without a copy where they are contiguous, and
without gradients: a tensor that requires one is refused rather than silently detached. Keys are JAX's (`jax.random.key(0)`).
The first call with a new kind of arguments compiles its kernels, in seconds; Triton keeps them in TRITON_CACHE_DIR.
torch.compile leaves the operations as they are and breaks its graph around them; torch.func's transforms do not take them.
"""

import functools
import importlib

import jax
import torch

import dlm_kernels
from dlm_kernels import triton_kernels

__all__ = [
    "attention",
    "combine_guidance",
    "lm_head_scores",
    "masked_cross_entropy",
    "masked_divergence",
    "mix_guidance",
    "score_tokens",
    "unmask_step",
    "unmask_topk",
]


def _to_jax(leaf):
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.device.type != "cpu":
        raise ValueError(f"dlm_kernels.torch: expected all tensors on one device, the CPU or a GPU, got one on {leaf.device}")
    if leaf.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "dlm_kernels.torch: expected tensors without requires_grad, or torch.no_grad(): gradients are JAX's only"
        )
    if leaf.dtype == torch.int64:
        leaf = leaf.to(torch.int32)
    return jax.dlpack.from_dlpack(leaf.detach().contiguous())


def _to_torch(leaf):
    return torch.from_dlpack(leaf) if isinstance(leaf, jax.Array) else leaf


def _on_tensors(operation):
    @torch.compiler.disable
    @functools.wraps(operation)
    def call(*args, **kwargs):
        tensors = [leaf for leaf in jax.tree.leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and tensors[0].is_cuda:
            return getattr(_native(), operation.__name__)(*args, **kwargs)
        # Without 64 bits JAX would take float64 for float32, which the operation refuses where it matters.
        with jax.enable_x64(any(tensor.dtype == torch.float64 for tensor in tensors)):
            args, kwargs = jax.tree.map(_to_jax, (args, kwargs), is_leaf=lambda leaf: leaf is None)
            return jax.tree.map(_to_torch, jax.block_until_ready(operation(*args, **kwargs)))

    return call


def _native():
    if reason := triton_kernels.without_triton():
        raise RuntimeError(f"dlm_kernels.torch: a tensor is on a GPU, and {reason}")
    return importlib.import_module("dlm_kernels.torch.native")


attention = _on_tensors(dlm_kernels.attention)
combine_guidance = _on_tensors(dlm_kernels.combine_guidance)
lm_head_scores = _on_tensors(dlm_kernels.lm_head_scores)
masked_cross_entropy = _on_tensors(dlm_kernels.masked_cross_entropy)
masked_divergence = _on_tensors(dlm_kernels.masked_divergence)
mix_guidance = _on_tensors(dlm_kernels.mix_guidance)
score_tokens = _on_tensors(dlm_kernels.score_tokens)
unmask_step = _on_tensors(dlm_kernels.unmask_step)
unmask_topk = _on_tensors(dlm_kernels.unmask_topk)
