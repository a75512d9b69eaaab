"""The helpers of `dlm_kernels.masks` on torch tensors: same names, same arguments, and one more, `device`.

    from dlm_kernels.torch import attention, masks
    mask = masks.block_causal(32, 32, key_length=544, offset=512, device=query.device)
    out = attention(query, key, value, mask=mask)

device is where the mask's tensors are to be, by default where the first tensor among the arguments is, else torch's default.
Nothing here starts JAX's devices. Arguments on a GPU are waited for: a mask of them is better built once a pass than at each layer.
torch.compile breaks its graph around the helpers, where it fails on those of JAX; with fullgraph=True a mask comes from outside of
what is compiled.
"""

import functools
import importlib.util
import inspect

import jax
import numpy as np
import torch

from dlm_kernels import masks
from dlm_kernels.masks import KeyIntervals
from dlm_kernels.ops import checks

__all__ = ["KeyIntervals", "block_causal", "block_diffusion", "cache", "packed", "padding", "sliding_window"]


def _by_numpy(module, **names):
    """A second copy of `module`, with NumPy for jax.numpy: JAX would start a GPU and its memory for a few integers."""
    copy = importlib.util.module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(copy)
    vars(copy).update(jnp=np, **names)
    return copy


_masks = _by_numpy(masks, checks=_by_numpy(checks), cummax=np.maximum.accumulate, KeyIntervals=KeyIntervals)


def _on_tensors(helper):
    @torch.compiler.disable
    @functools.wraps(helper)
    def call(*args, device=None, **kwargs):
        if device is None:
            device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        # A copy, for torch's tensors may be written, and ends of one row for all are the same memory to NumPy.
        return jax.tree.map(lambda end: torch.as_tensor(np.array(end), device=device), helper(*args, **kwargs))

    signature = inspect.signature(helper)
    where = inspect.Parameter("device", inspect.Parameter.KEYWORD_ONLY, default=None)
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), where])
    call.__module__ = __name__  # where pickle looks for it
    return call


block_causal = _on_tensors(_masks.block_causal)
block_diffusion = _on_tensors(_masks.block_diffusion)
cache = _on_tensors(_masks.cache)
packed = _on_tensors(_masks.packed)
padding = _on_tensors(_masks.padding)
sliding_window = _on_tensors(_masks.sliding_window)
