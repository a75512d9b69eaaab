"""From torch's arguments to the kernels': checked by the JAX operation, and as the tensors that kernels read."""

import functools
import math
import numbers

import jax
import numpy as np
import torch

from dlm_kernels import masks
from dlm_kernels.torch import narrow


@functools.lru_cache(maxsize=4096)
def checked(operation, tree, leaves, types):
    """Raises what the JAX operation raises for these shapes, dtypes and numbers. Remembers them, for it takes a trace.

    types: the leaves', for 1, 1.0 and True are equal, and not all of them may be what is asked for.
    """
    shapes = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]

    def run(*traced):
        traced = iter(traced)
        args, kwargs = jax.tree.unflatten(tree, [next(traced) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves])
        # It runs all calls; and to choose among the others would start JAX on the GPU, which takes most of the memory.
        return operation(*args, **kwargs, implementation="xla")

    # Without 64 bits JAX would take float64 for float32.
    with jax.enable_x64(True):
        jax.eval_shape(run, *shapes)


def abstract(leaf):
    if isinstance(leaf, torch.dtype):
        return dtype_name(leaf)
    if isinstance(leaf, torch.Tensor):
        dtype = "int32" if leaf.dtype == torch.int64 else str(leaf.dtype).removeprefix("torch.")
        return jax.ShapeDtypeStruct(tuple(leaf.shape), dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, (jax.Array, np.ndarray)) else leaf


def tensor(leaf, device):
    """A tensor, or an array of JAX or NumPy, as a tensor that kernels can read; keys, and what is no array, as it is."""
    if isinstance(leaf, torch.Tensor):
        return leaf.resolve_neg()
    if not isinstance(leaf, (jax.Array, np.ndarray)) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    array = np.array(leaf)
    if array.dtype.name == "bfloat16":  # of which torch knows none of NumPy's
        return torch.as_tensor(array.view(np.int16), device=device).view(torch.bfloat16)
    return torch.as_tensor(array, device=device)


def bounds(mask, length):
    """`masks.bounds` on tensors."""
    ends = (x.clamp(0, length).int() for x in (mask.start, mask.stop, mask.start2, mask.stop2) if x is not None)
    return torch.stack(masks.in_order(torch, *torch.broadcast_tensors(*ends)), -1)


def allowed(candidates, tokens):
    if candidates is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if isinstance(candidates, tuple):
        start, stop = (rows(end, tokens.shape[:1], tokens.device, torch.int32)[:, None] for end in candidates)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        return (start <= position) & (position < stop)
    return candidates


def rows(value, shape, device, dtype=torch.float32):
    """A scalar, [B] or [B, L] as one value per row, [B] or [B * L]."""
    # A number is not copied to a GPU: torch would wait there for all that came before, and capture no CUDA graph.
    is_number = isinstance(value, numbers.Number)
    where = "cpu" if is_number else device
    if dtype == torch.int32:
        value = ints(torch.as_tensor(value, device=where))
    else:  # at once, or torch would round a number of Python to its default dtype first
        value = torch.as_tensor(value, dtype=dtype, device=where)
    if is_number:
        return torch.full((math.prod(shape),), value.item(), dtype=dtype, device=device)
    value = value.reshape(value.shape + (1,) * (len(shape) - value.ndim if value.ndim else 0))
    return value.expand(tuple(shape)).reshape(-1).contiguous()


def ints(tensor):
    return (tensor if tensor.dtype == torch.int32 else narrow(tensor.long())).contiguous()


def masked(tokens, mask_id):
    where = "cpu" if isinstance(mask_id, numbers.Number) else tokens.device  # as in `rows`
    return tokens == ints(torch.as_tensor(mask_id, device=where))


def number(value):
    return None if value is None else float(value)


def dtype_name(dtype):
    return None if dtype is None else str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else np.dtype(dtype).name
