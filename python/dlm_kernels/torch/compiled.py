"""The operations with gradients as nodes of torch.compile's graph, into which the compiler does not look: `torch.ops.dlm_kernels`.

They stand in a model's layers and in a training step. The others end a model's pass or stand between passes, and break the graph.
Each function takes the eager operation on tensors, and gives what torch.compile traces in its place.
"""

import torch

from dlm_kernels import masks


def attention(eager):
    def flat(query, key, value, *ends, **options):
        return eager(query, key, value, mask=_mask(*ends), return_lse=True, **options)

    def results(query, *_, **options):
        b, t, n = (query.shape[i : i + 1] for i in range(3))  # of fewer axes the run says what is wrong
        return query.new_empty(query.shape), query.new_empty((*b, *n, *t), dtype=torch.float32)

    arrays = "Tensor query, Tensor key, Tensor value, Tensor? start, Tensor? stop, Tensor? start2, Tensor? stop2"
    options = "float? scale=None, float? logits_soft_cap=None, str? implementation=None"
    node = _node(eager.__name__, arrays, options, flat, results, "(Tensor, Tensor)")

    def call(query, key, value, *, mask=None, scale=None, return_lse=False, **options):
        out, lse = node(query, key, value, *_ends(mask), scale=None if scale is None else float(scale), **options)
        return (out, lse) if return_lse else out

    return call


def _ends(mask):
    """What an operation of torch's library can take of a mask: four tensors or None, of which a dense mask is the first."""
    return (mask.start, mask.stop, mask.start2, mask.stop2) if isinstance(mask, masks.KeyIntervals) else (mask, None, None, None)


def _mask(start, stop, *second):
    return start if stop is None else masks.KeyIntervals(start, stop, *second)


def matmul(eager):
    def results(x, weight, **options):
        return x.new_empty((*x.shape[:-1], weight.shape[-1]))

    return _node(eager.__name__, "Tensor x, Tensor weight", "str? implementation=None", eager, results)


def mix_experts(eager):
    arrays = "Tensor x, Tensor gate, Tensor up, Tensor down, Tensor expert, Tensor weight"
    options = 'str activation="silu", str? implementation=None'
    return _node(eager.__name__, arrays, options, eager, lambda x, *_, **options: x.new_empty(x.shape))


def masked_cross_entropy(eager):
    arrays = "Tensor hidden, Tensor weight, Tensor targets, Tensor weights"
    options = 'str reduction="sum", float? logits_soft_cap=None, str? implementation=None'
    return _node(eager.__name__, arrays, options, eager, _loss)


def masked_divergence(eager):
    arrays = "Tensor hidden, Tensor weight, Tensor target_hidden, Tensor target_weight, Tensor weights"
    options = 'str reduction="sum", str? implementation=None'
    return _node(eager.__name__, arrays, options, eager, _loss)


def _loss(*arrays, reduction="sum", **options):
    weights = arrays[-1]
    return weights.new_empty(() if reduction == "sum" else weights.shape, dtype=torch.float32)


def soft_embedding(eager):
    def flat(hidden, weight, embedding, temperature, *, number=1.0, **options):
        temperature = number if temperature is None else temperature
        return eager(hidden, weight, embedding=embedding, temperature=temperature, **options)

    def results(hidden, weight, embedding, *_, **options):
        return hidden.new_empty((*hidden.shape[:-1], (weight if embedding is None else embedding).shape[-1]))

    arrays = "Tensor hidden, Tensor weight, Tensor? embedding, Tensor? temperature"
    options = "float number=1.0, float? logits_soft_cap=None, str? implementation=None"
    node = _node(eager.__name__, arrays, options, flat, results)

    def call(hidden, weight, *, embedding=None, temperature=1.0, **options):
        if isinstance(temperature, torch.Tensor):
            return node(hidden, weight, embedding, temperature, **options)
        return node(hidden, weight, embedding, None, number=float(temperature), **options)

    return call


def _node(name, arrays, options, eager, results, returns="Tensor"):
    """`eager(*arrays, **options)` as an operation of torch's library, whose gradient computes the forward anew.

    arrays, options, returns: of its schema. What may have a gradient is among the arrays. The options have eager's defaults, for
    torch leaves out of the call what equals them. results: what looks as the results do, of the same arguments.
    """
    arguments = f"{arrays}, *, {options}"

    @torch.library.custom_op(f"dlm_kernels::{name}", mutates_args=(), schema=f"({arguments}) -> {returns}")
    def forward(*arrays, **options):
        with torch.no_grad():
            made = eager(*arrays, **options)
        return made.contiguous() if isinstance(made, torch.Tensor) else tuple(x.contiguous() for x in made)

    schema = f"(Tensor[] cotangents, bool[] learnt, {arguments}) -> Tensor[]"

    @torch.library.custom_op(f"dlm_kernels::{name}_backward", mutates_args=(), schema=schema)
    def backward(cotangents, learnt, *arrays, **options):
        arrays = [x.detach().requires_grad_() if own else x for x, own in zip(arrays, learnt)]
        # Torch runs an operation without autograd, which the eager one and its gradient need; this alone brings it back.
        with torch.inference_mode(False):
            made = eager(*arrays, **options)
            gradients = torch.autograd.grad(made, _of(arrays, learnt), cotangents, materialize_grads=True)
        return [x.contiguous() for x in gradients]

    forward.register_fake(results)
    backward.register_fake(lambda _, learnt, *arrays, **options: [x.new_empty(x.shape) for x in _of(arrays, learnt)])

    def keep(ctx, inputs, keyword_only_inputs, output):  # by these names they are given
        ctx.save_for_backward(*inputs)
        ctx.options = keyword_only_inputs

    def differentiate(context, *cotangents):
        learnt = context.needs_input_grad
        gradients = iter(backward([*cotangents], [*learnt], *context.saved_tensors, **context.options))
        return tuple(next(gradients) if own else None for own in learnt)

    forward.register_autograd(differentiate, setup_context=keep)

    def node(*arrays, **options):
        for x in (*arrays, *options.values()):
            if not isinstance(x, (torch.Tensor, str, float, int, type(None))):
                raise ValueError(f"{name}: expected arrays as tensors under torch.compile, got one of {type(x).__name__}")
        return forward(*arrays, **options)

    return node


def _of(arrays, learnt):
    return [x for x, own in zip(arrays, learnt) if own]
