"""Tells which implementation a call would take, and why not the others."""

import jax

from dlm_kernels.ops import dispatch


def explain(function, *args, **kwargs):
    """Which kernels `function(*args, **kwargs)` would run on each platform; nothing is computed.

        print(explain(dlm_kernels.attention, query, key, value, mask=mask))

    function: an operation of this package, or any function that calls some; on JAX's arrays (tensors of torch take the same kernels
    on a CPU, and Triton's on a GPU). Arrays may be jax.ShapeDtypeStruct, as under jit.
    Returns a list of `Choice` (kernel, implementations by platform, refused with the reason), one per kernel call, in the order of
    the calls; `within` names, by platform, a kernel that does the work of several calls. Raises what the call itself would raise.
    """
    if not callable(function):
        raise ValueError(f"explain: expected an operation itself, such as dlm_kernels.attention, got {function!r}")
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: leaf is None)
    if any(type(leaf).__module__.partition(".")[0] == "torch" for leaf in leaves):
        raise ValueError("explain: expected the operation of dlm_kernels on JAX's arrays or shapes, got tensors of torch")
    # Only these are traced: a number that happens to be an array is one that kernels can be compiled for.
    shapes = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]

    def abstract(*traced):
        traced = iter(traced)
        merged = [next(traced) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves]
        positional, named = jax.tree.unflatten(tree, merged)
        return function(*positional, **named)

    with dispatch.recording() as choices:
        jax.eval_shape(abstract, *shapes)
    return choices
