"""The same operations on torch tensors: same names, same arguments, torch results.

    from dlm_kernels.torch import attention
    out = attention(query, key, value, mask=mask)

Tensors on a GPU go to the Triton kernels without JAX in between (`native.py`). Tensors on the CPU are handed to JAX and back
through DLPack, without a copy where they are contiguous. On both attention, the losses, the soft embedding, the mixture of experts
and matmul have gradients; the others refuse a tensor that requires one rather than detach it silently, and all refuse forward mode.
Keys are JAX's (`jax.random.key(0)`). Where JAX has the GPU too, a key starts it there, and it takes three quarters of the memory
unless XLA_PYTHON_CLIENT_PREALLOCATE=false is set. So do the masks of `dlm_kernels.masks`, which are JAX's too; those of
`dlm_kernels.torch.masks` are tensors. Beside CUDA tensors nothing else starts it.
Tokens that `unmask_step` and `unmask_topk` return are of the dtype of those given, those of scores int64.
Integers of tensors are 32 bits to the kernels. What these do not hold is refused on the CPU; on a GPU, where to look would be to
wait for it, it counts as the nearest that they do.
The first call with new shapes compiles: on a GPU kernels, in seconds, which Triton keeps in TRITON_CACHE_DIR; on the CPU programs
of XLA, in tenths of a second, which stay in memory, megabytes each. Lengths that grow are better padded to multiples of 64 or more.
Masks may be those of scaled_dot_product_attention, boolean or of 0 and -inf: most are `masks.KeyIntervals`, which the kernels take,
and become so at each call; the others go to XLA on the CPU and are refused on a GPU.
torch.compile and torch.export take those that have gradients into their graphs as they are, where masks and all arrays are tensors;
gradients there compute the forward anew. What was exported loads where this module was imported. torch.compile breaks its graph
around the others; torch.func's transforms take none.
After a call on the CPU JAX hangs in processes that are forked: workers of a DataLoader which call an operation need
multiprocessing_context="spawn".
"""

import contextlib
import functools
import importlib
import inspect

import jax
import torch
from torch.autograd import forward_ad

import dlm_kernels
from dlm_kernels import triton_kernels
from dlm_kernels.torch import compiled, masks
from dlm_kernels.torch.intervals import intervals

__all__ = [
    "attention",
    "combine_guidance",
    "lm_head_scores",
    "masked_cross_entropy",
    "masked_divergence",
    "masks",
    "matmul",
    "mix_experts",
    "mix_guidance",
    "pack_lm_head",
    "score_tokens",
    "soft_embedding",
    "truncate_logits",
    "unmask_step",
    "unmask_topk",
]


def _to_jax(leaf):
    if isinstance(leaf, torch.dtype):
        return str(leaf).removeprefix("torch.")
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.device.type != "cpu":
        raise ValueError(f"dlm_kernels.torch: expected all tensors on one device, the CPU or a GPU, got one on {leaf.device}")
    if type(leaf) not in (torch.Tensor, torch.nn.Parameter):
        raise ValueError(f"dlm_kernels.torch: expected tensors with memory of their own, got a {type(leaf).__name__}")
    if leaf.dtype == torch.int64:
        whole, leaf = leaf, narrow(leaf)
        if not torch.equal(leaf, whole):
            raise ValueError(f"dlm_kernels.torch: expected integers of 32 bits, got one of {whole.abs().max().item()}")
    return _shared(leaf)


def _shared(tensor):
    """A tensor as an array of JAX, of the same memory where it is contiguous and no negative of it."""
    return jax.dlpack.from_dlpack(tensor.detach().resolve_neg().contiguous())


@contextlib.contextmanager
def _on_the_cpu(wide):
    """What JAX makes beside the tensors is to be where they are, though JAX's own default be a GPU; wide: with 64 bits."""
    with jax.enable_x64(wide), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def narrow(tensor):
    """int64 as int32: what 32 bits do not hold as the nearest that they do, as the operations take JAX's and NumPy's arrays."""
    return tensor.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def _to_torch(leaf):
    return torch.from_dlpack(leaf) if isinstance(leaf, jax.Array) else leaf


def refuse_second_gradients():
    # once_differentiable would let them pass as zeros where the gradient that comes in is a constant.
    if torch.is_grad_enabled():
        raise ValueError("dlm_kernels.torch: expected create_graph=False: a gradient has no gradient itself")


class _Gradients(torch.autograd.Function):
    """function(*arrays) of `tensors`, an array or a tuple of arrays, with the gradients that JAX has for it.

    frozen: a list of the other tensors whose memory `function` may read.
    """

    @staticmethod
    def forward(context, function, wide, frozen, *tensors):
        with _on_the_cpu(wide):
            out, back = jax.vjp(function, *map(_to_jax, tensors))
        context.one, context.wide = isinstance(out, jax.Array), wide
        out = jax.tree.map(_to_torch, jax.block_until_ready(out))
        # What JAX keeps for the gradients is torch's to keep, which frees it with the graph. It may be the memory of what was given
        # or is returned: these are read in `backward` for torch to raise where one of them was written since.
        kept, context.tree = jax.tree.flatten(back)
        kept = [_to_torch(x) for x in kept]
        memory = {x.data_ptr() for x in kept}
        others = [x for x in (*frozen, *jax.tree.leaves(out)) if x.data_ptr() in memory and not x.is_inference()]
        context.save_for_backward(*kept, *tensors, *others)
        context.kept = len(kept)
        return out

    @staticmethod
    def backward(context, *cotangents):
        refuse_second_gradients()
        saved = context.saved_tensors
        with _on_the_cpu(context.wide):
            back = jax.tree.unflatten(context.tree, map(_shared, saved[: context.kept]))
            cotangents = tuple(map(_to_jax, cotangents))
            gradients = back(cotangents[0] if context.one else cotangents)
            return None, None, None, *map(_to_torch, jax.block_until_ready(gradients))


def _on_tensors(operation, *, differentiable=False):
    @torch.compiler.disable
    @functools.wraps(operation)
    def call(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        learnt = {i: x for i, x in tensors.items() if x.requires_grad and torch.is_grad_enabled()}
        if learnt and not differentiable:
            name = operation.__name__
            raise ValueError(f"dlm_kernels.torch: {name} has no gradient: expected torch.no_grad(), or tensors that require none")
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors.values()):
            raise ValueError(f"dlm_kernels.torch: expected tensors without tangents: {operation.__name__} has no forward mode")
        if any(x.is_cuda for x in list(tensors.values())[:1]):
            return getattr(_native(), operation.__name__)(*args, **kwargs)
        # Without 64 bits JAX would take float64 for float32, which the operation refuses where it matters.
        wide = any(x.dtype == torch.float64 for x in tensors.values())
        with _on_the_cpu(wide):
            arrays = [None if i in learnt else _to_jax(leaf) for i, leaf in enumerate(leaves)]

        def function(*given):
            given = dict(zip(learnt, given))
            args, kwargs = jax.tree.unflatten(tree, [given.get(i, x) for i, x in enumerate(arrays)])
            return operation(*args, **kwargs)

        if learnt:
            frozen = [x for i, x in tensors.items() if i not in learnt]
            return _Gradients.apply(function, wide, frozen, *learnt.values())
        with _on_the_cpu(wide):
            return jax.tree.map(_to_torch, jax.block_until_ready(function()))

    call.__module__ = __name__  # where pickle looks for it
    return call


def _of_their_dtype(operation):
    """`operation`, whose tokens come back in the dtype of those given: torch's token ids are int64, the kernels' int32."""
    names = list(inspect.signature(operation).parameters)

    @torch.compiler.disable  # out of a graph of torch 2.11 a named tuple that was made there comes empty
    @functools.wraps(operation)
    def call(*args, **kwargs):
        result = operation(*args, **kwargs)
        given = {**dict(zip(names, args)), **kwargs}
        if not isinstance(given["tokens"], torch.Tensor):
            return result
        dtype = given["tokens"].dtype
        if torch.iinfo(dtype).bits < 32:
            most = given["logits"].shape[-1] - 1 if "logits" in given else max(result.tokens.flatten().tolist(), default=0)
            if most > torch.iinfo(dtype).max:
                raise ValueError(f"tokens: expected a dtype that holds {most}, got {dtype}")
        return result._replace(tokens=result.tokens.to(dtype))

    return call


def _of_its_own(operation):
    """`operation`, whose result is never the memory that was given, as that of an array which nobody writes may be."""

    @torch.compiler.disable
    @functools.wraps(operation)
    def call(logits, *, top_p=None, top_k=None, **options):
        out = operation(logits, top_p=top_p, top_k=top_k, **options)
        return out.clone() if top_p is None and top_k is None else out

    return call


def _of_int64(operation):
    """`operation`, whose scores have tokens of int64, as what indexes and fills torch's canvases is."""

    @torch.compiler.disable
    @functools.wraps(operation)
    def call(*args, **kwargs):
        scores = operation(*args, **kwargs)
        return scores._replace(token=scores.token.long())

    return call


def _native():
    if reason := triton_kernels.without_triton():
        raise RuntimeError(f"dlm_kernels.torch: a tensor is on a GPU, and {reason}")
    return importlib.import_module("dlm_kernels.torch.native")


_attention = _on_tensors(dlm_kernels.attention, differentiable=True)


@torch.compiler.disable
@functools.wraps(_attention)
def _eager_attention(query, key, value, *, mask=None, **options):
    # Of other than queries and keys of four axes `_attention` says what is wrong.
    if isinstance(mask, torch.Tensor) and all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in (query, key)):
        mask = intervals(mask, query.shape[2], query.shape[1], key.shape[1])
    return _attention(query, key, value, mask=mask, **options)


def _in_graphs(eager, as_node):
    """`eager`, which torch.compile takes into its graph as a node."""
    node = as_node(eager)

    @functools.wraps(eager, updated=())  # what says that torch.compile is to leave it alone is eager's own
    def call(*args, **kwargs):
        return (node if torch.compiler.is_compiling() else eager)(*args, **kwargs)

    return call


def _with_gradients(operation, as_node):
    return _in_graphs(_on_tensors(operation, differentiable=True), as_node)


attention = _in_graphs(_eager_attention, compiled.attention)
combine_guidance = _on_tensors(dlm_kernels.combine_guidance)
lm_head_scores = _of_int64(_on_tensors(dlm_kernels.lm_head_scores))
masked_cross_entropy = _with_gradients(dlm_kernels.masked_cross_entropy, compiled.masked_cross_entropy)
masked_divergence = _with_gradients(dlm_kernels.masked_divergence, compiled.masked_divergence)
matmul = _with_gradients(dlm_kernels.matmul, compiled.matmul)
mix_experts = _with_gradients(dlm_kernels.mix_experts, compiled.mix_experts)
mix_guidance = _on_tensors(dlm_kernels.mix_guidance)
pack_lm_head = _on_tensors(dlm_kernels.pack_lm_head)
score_tokens = _of_int64(_on_tensors(dlm_kernels.score_tokens))
soft_embedding = _with_gradients(dlm_kernels.soft_embedding, compiled.soft_embedding)
truncate_logits = _of_its_own(_on_tensors(dlm_kernels.truncate_logits))
unmask_step = _of_their_dtype(_on_tensors(dlm_kernels.unmask_step))
unmask_topk = _of_their_dtype(_on_tensors(dlm_kernels.unmask_topk))
