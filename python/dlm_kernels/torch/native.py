"""The operations on CUDA tensors: the Triton kernels by Triton's own launcher, in torch's stream, with torch's gradients.

Arguments mean what they mean to the JAX operation of the same name, which checks them by shape alone. With TRITON_INTERPRET=1
these functions run on CPU tensors too, in Triton's interpreter; the tests do so.
"""

import functools
import numbers
from collections.abc import Hashable

import jax
import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

import dlm_kernels
from dlm_kernels import masks
from dlm_kernels.ops import soft_embedding as soft
from dlm_kernels.ops import truncation
from dlm_kernels.ops import unmask as ops
from dlm_kernels.torch import arguments, refuse_second_gradients
from dlm_kernels.torch.experts import Experts
from dlm_kernels.triton_kernels import attention as attention_kernels
from dlm_kernels.triton_kernels import cross_entropy as cross_entropy_kernels
from dlm_kernels.triton_kernels import divergence as divergence_kernels
from dlm_kernels.triton_kernels import experts as experts_kernels
from dlm_kernels.triton_kernels import guidance as guidance_kernels
from dlm_kernels.triton_kernels import lm_head as head_kernels
from dlm_kernels.triton_kernels import ranks
from dlm_kernels.triton_kernels import truncation as truncation_kernels
from dlm_kernels.triton_kernels import unmask as unmask_kernels


def _operation(function):
    """`function` of checked arguments, in which all arrays but a key are tensors on the first one's device."""
    operation = getattr(dlm_kernels, function.__name__)

    @functools.wraps(function)
    def call(*args, implementation=None, **kwargs):
        if implementation not in (None, "triton"):
            raise ValueError(f"implementation: expected 'triton' or None for tensors on a GPU, got {implementation!r}")
        leaves, tree = jax.tree.flatten((args, kwargs))
        abstract = tuple(map(arguments.abstract, leaves))
        # What no cache can hold, a set for one, no operation takes: the check says so.
        check = arguments.checked if all(isinstance(x, Hashable) for x in abstract) else arguments.checked.__wrapped__
        check(operation, tree, abstract, tuple(map(type, abstract)))
        device = next(leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
        key = {name: x for name, x in kwargs.items() if name == "key"}  # which stays JAX's
        args, kwargs = jax.tree.unflatten(tree, [arguments.tensor(leaf, device) for leaf in leaves])
        return function(*args, **kwargs | key)

    return call


def _refuse(operation, device, reason):
    if reason is not None:
        raise ValueError(f"dlm_kernels.torch: {operation} on {device} cannot run this call: {reason}")


@_operation
def attention(query, key, value, *, mask=None, scale=None, logits_soft_cap=None, return_lse=False):
    b, t, n, h = query.shape
    if 0 in (b, t, n, key.shape[1]):
        out = query.masked_fill(torch.ones_like(query, dtype=torch.bool), 0)  # in the graph, with a gradient of zero
        lse = query.new_full((b, n, t), -torch.inf, dtype=torch.float32)
        return (out, lse) if return_lse else out
    dense = None if mask is None or isinstance(mask, masks.KeyIntervals) else mask
    _refuse("attention", query.device, attention_kernels.supports_attention_forward(query, key, value, None, dense))
    bounds = None if mask is None else arguments.bounds(mask, key.shape[1])
    scale = h**-0.5 if scale is None else float(scale)
    out, lse = _Attention.apply(query, key, value, bounds, scale, arguments.number(logits_soft_cap))
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context, query, key, value, bounds, scale, soft_cap):
        context.options = dict(scale=scale, logits_soft_cap=soft_cap)
        out, lse = attention_kernels.attention_forward(query, key, value, bounds, None, **context.options)
        context.save_for_backward(query, key, value, bounds, out, lse)
        return out, lse

    @staticmethod
    def backward(context, dout, dlse):
        refuse_second_gradients()
        query, key, value, bounds, out, lse = context.saved_tensors
        if bounds is not None:  # as in ops/attention.py
            blind = lse == -torch.inf
            query, dout = (x.masked_fill(blind.transpose(1, 2)[..., None], 0) for x in (query, dout))
            dlse = dlse.masked_fill(blind, 0)
        arrays = query, key, value, bounds, None, out, lse, dout.resolve_neg(), dlse.resolve_neg().contiguous()
        reason = attention_kernels.supports_attention_backward(*arrays, **context.options)
        _refuse("the gradient of attention", query.device, reason)
        return *attention_kernels.attention_backward(*arrays, **context.options), None, None, None


@_operation
def masked_cross_entropy(hidden, weight, targets, weights, *, reduction="sum", logits_soft_cap=None):
    weights = weights.float()
    if hidden.numel() == 0:
        loss = hidden.float().sum(-1)  # as empty, and in the graph
    else:
        active = (weights != 0).reshape(-1)
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), arguments.ints(targets).reshape(-1)
        loss = _Loss.apply(rows, weight, targets, active, arguments.number(logits_soft_cap)).reshape(weights.shape)
    return torch.sum(weights * loss) if reduction == "sum" else weights * loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden, weight, targets, active, soft_cap):
        context.options = dict(logits_soft_cap=soft_cap)
        loss, lse = cross_entropy_kernels.masked_cross_entropy_forward(hidden, weight, targets, active, **context.options)
        context.save_for_backward(hidden, weight, targets, active, lse)
        return loss

    @staticmethod
    def backward(context, dloss):
        refuse_second_gradients()
        dhidden, dweight = cross_entropy_kernels.masked_cross_entropy_backward(
            *context.saved_tensors, dloss.resolve_neg().contiguous(), **context.options
        )
        return dhidden, dweight, None, None, None


@_operation
def masked_divergence(hidden, weight, target_hidden, target_weight, weights, *, reduction="sum"):
    weights = weights.float()
    if hidden.numel() == 0:
        loss = hidden.float().sum(-1)  # as empty, and in the graph
    else:
        rows, target_rows = (x.reshape(-1, x.shape[-1]) for x in (hidden, target_hidden.detach()))
        active = (weights != 0).reshape(-1)
        loss = _Divergence.apply(rows, weight, target_rows, target_weight.detach(), active).reshape(weights.shape)
    return torch.sum(weights * loss) if reduction == "sum" else weights * loss


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(context, *arrays):
        loss, lse, target_lse = divergence_kernels.masked_divergence_forward(*arrays)
        context.save_for_backward(*arrays, lse, target_lse)
        return loss

    @staticmethod
    def backward(context, dloss):
        refuse_second_gradients()
        dhidden, dweight = divergence_kernels.masked_divergence_backward(*context.saved_tensors, dloss.resolve_neg().contiguous())
        return dhidden, dweight, None, None, None


@_operation
def soft_embedding(hidden, weight, *, embedding=None, temperature=1.0, logits_soft_cap=None):
    embedding = weight if embedding is None else embedding
    (b, length, d), e = hidden.shape, embedding.shape[1]
    # The attention kernel takes a number, which has no gradient.
    cap, learnt = arguments.number(logits_soft_cap), getattr(temperature, "requires_grad", False)
    temperature = temperature.float().to(hidden.device) if learnt else float(temperature)
    if not learnt and not temperature > 0:  # of a tensor, whose number the check by shapes has not seen
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    rows = hidden.reshape(-1, d)
    if not learnt and rows.shape[0] and soft.attention_cannot(hidden, e, temperature, cap) is None:
        query, key, value = (x[None, :, None].contiguous() for x in (rows, weight, embedding))
        out = _Attention.apply(query, key, value, None, 1 / temperature, None if cap is None else cap / temperature)[0]
    else:
        out = _soft_by_chunks(rows, weight, embedding, temperature, cap)
    return out.reshape(b, length, e).to(hidden.dtype)


def _soft_by_chunks(hidden, weight, embedding, temperature, cap):
    """[R, E] float32 of hidden [R, D], with a running maximum over chunks of the vocabulary."""
    factor = soft.last_factor(torch, torch.as_tensor(temperature, dtype=torch.float32, device=hidden.device), cap)

    def add(most, total, mean, keys, values):
        logits = hidden.float() @ keys.float().T
        logits = logits if cap is None else torch.tanh(logits / cap)
        new = torch.maximum(most, logits.detach().amax(-1, keepdim=True))
        p, keep = torch.exp((logits - new) * factor), torch.exp((most - new) * factor)
        return new, total * keep + p.sum(-1, keepdim=True), mean * keep + p @ values.float()

    nothing = hidden.new_zeros((hidden.shape[0], 1), dtype=torch.float32)
    state = nothing + soft.LEAST, nothing, nothing.expand(-1, embedding.shape[1])
    for chunk in zip(weight.split(soft.CHUNK), embedding.split(soft.CHUNK)):
        # The gradient makes a chunk's logits anew; keeping them all would be the matrix that this avoids.
        state = checkpoint(add, *state, *chunk, use_reentrant=False)
    _, total, mean = state
    return mean / total


_multiply = _operation(torch.matmul)


def matmul(x, weight, *, implementation=None):
    if implementation is not None:
        raise ValueError(f"implementation: expected None for tensors on a GPU, which torch multiplies, got {implementation!r}")
    return _multiply(x, weight)


@_operation
def mix_experts(x, gate, up, down, expert, weight, *, activation="silu"):
    if x.numel() == 0 or expert.numel() == 0:
        return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0)  # in the graph, with a gradient of zero
    rows, expert, weight = (array.reshape(-1, array.shape[-1]) for array in (x, arguments.ints(expert), weight.float()))
    arrays = rows, gate, up, down, expert, weight.contiguous()
    _refuse("mix_experts", x.device, experts_kernels.supports_mix_experts(*arrays))
    return Experts.apply(*arrays, activation).reshape(x.shape)


@_operation
@torch.no_grad()
def mix_guidance(conditional, unconditional, scale):
    if conditional.numel() == 0:
        return conditional
    width = conditional.shape[-1]
    scale = arguments.rows(scale, conditional.shape[:-1], conditional.device)
    mixed = guidance_kernels.mix_guidance(conditional.reshape(-1, width), unconditional.reshape(-1, width), scale)
    return mixed.reshape(conditional.shape)


@_operation
@torch.no_grad()
def combine_guidance(logits, weights):
    weights = torch.as_tensor(weights, dtype=torch.float32, device=logits.device)
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[1:])
    streams, *lead, width = logits.shape
    weights = weights.reshape(weights.shape + (1,) * (1 + len(lead) - weights.ndim)).expand(streams, *lead)
    mixed = guidance_kernels.combine_guidance(logits.reshape(streams, -1, width), weights.reshape(streams, -1).contiguous())
    return mixed.reshape(logits.shape[1:])


@_operation
@torch.no_grad()
def truncate_logits(logits, *, top_p=None, top_k=None, temperature=1.0):
    if logits.numel() == 0 or (top_p is None and top_k is None):
        return logits
    rows, width = functools.partial(arguments.rows, shape=logits.shape[:-1], device=logits.device), logits.shape[-1]
    inverse = truncation.inverse(torch, rows(temperature))
    top_p = None if top_p is None else rows(top_p)
    top_k = None if top_k is None else rows(top_k, dtype=torch.int32)
    return truncation_kernels.truncate_logits(logits.reshape(-1, width), inverse, top_p, top_k).reshape(logits.shape)


@_operation
@torch.no_grad()
def score_tokens(logits, **options):
    b, length, v = logits.shape
    source = _source(logits, options)
    return _scores(functools.partial(unmask_kernels.score_tokens, *source), b, length, v, logits.device, **options)


def _source(logits, options):
    """The rows of logits and unconditional, and the scale of each, the last two out of the options."""
    (b, length, v), unconditional, scale = logits.shape, options.pop("unconditional", None), options.pop("guidance_scale", None)
    if unconditional is not None:
        unconditional, scale = unconditional.reshape(-1, v), arguments.rows(scale, (b, length), logits.device)
    return logits.reshape(-1, v), unconditional, scale


@_operation
def pack_lm_head(weight):
    return dlm_kernels.PackedHead(weight, "rows", *weight.shape)


@_operation
@torch.no_grad()
def lm_head_scores(hidden, weight, **options):
    if isinstance(weight, dlm_kernels.PackedHead):
        _refuse("lm_head_scores", hidden.device, None if weight.layout == "rows" else "it takes the weight as [V, D], not packed")
        weight = weight.array
    unconditional, scale = options.pop("unconditional_hidden", None), options.pop("guidance_scale", None)
    logits_dtype = options.pop("logits_dtype", None)
    if unconditional is not None:
        hidden = mix_guidance(hidden, unconditional, scale)
    b, length, d = hidden.shape

    def score(*sampling, **static):
        return head_kernels.lm_head_scores(
            hidden.reshape(-1, d), weight, *sampling, **static, logits_dtype=arguments.dtype_name(logits_dtype)
        )

    return _scores(score, b, length, weight.shape[0], hidden.device, **options)


def _scores(score, b, length, v, device, *, confidence="probability", key=None, active=None, **options):
    """What the two scoring operations share: sampling's arguments by rows, and the results by [B, L]."""
    if b * length == 0:
        return dlm_kernels.TokenScores(*(torch.zeros((b, length), device=device, dtype=d) for d in _RESULTS))
    random = confidence == "random"
    confidence = "probability" if random else confidence
    sampling, static = _sampling(b, length, v, device, confidence=confidence, key=key, active=active, **options)
    scores = dlm_kernels.TokenScores(*(x.reshape(b, length) for x in score(*sampling, **static)))
    if random:
        drawn = torch.from_numpy(np.array(ops.random_confidence(key, b, length))).to(device)
        sure = ops.random_or_nan(torch, drawn, scores.confidence)
        scores = scores._replace(confidence=sure if active is None else torch.where(active, sure, -torch.inf))
    return scores


def _sampling(b, length, v, device, *, confidence="probability", temperature=0.0, tempered_confidence=False,
              key=None, noise=None, active=None, banned_tokens=None, logits_soft_cap=None):  # fmt: skip
    """The kernels' operands of sampling by rows, in the order of `ops.SAMPLING`, and their static arguments."""
    key_data = counter_row = None
    if isinstance(temperature, numbers.Real) and temperature == 0:
        temperature = noise = None
    else:
        temperature = ops.bounded(torch, arguments.rows(temperature, (b, length), device))
        if noise is None:
            counters = (torch.from_numpy(np.array(x)) for x in ops.counters(key, b, length))
            key_data, counter_row = (x.flatten(0, 1).to(device) for x in counters)
        else:
            noise = noise.float().reshape(-1, v)
    rows_active = None if active is None else active.reshape(-1).contiguous()
    banned = None if banned_tokens is None else arguments.ints(torch.as_tensor(banned_tokens, device=device))
    static = dict(
        confidence=confidence, tempered_confidence=bool(tempered_confidence), logits_soft_cap=arguments.number(logits_soft_cap)
    )
    return (temperature, key_data, counter_row, noise, rows_active, banned), static


_RESULTS = (torch.int32, torch.float32, torch.float32, torch.float32)


@_operation
@torch.no_grad()
def unmask_topk(tokens, scores, *, mask_id, candidates=None, **rules):
    _refuse("unmask_topk", tokens.device, unmask_kernels.supports_unmask_topk(tokens))
    tokens = arguments.ints(tokens)
    eligible, editable, rules = _rules(tokens, mask_id, candidates, rules)
    if tokens.numel() == 0:
        return _nothing_unmasked(tokens)
    entropy = None if rules["entropy_budget"] is None else scores.entropy.float().contiguous()
    results = unmask_kernels.unmask_topk(
        tokens, arguments.ints(scores.token), scores.confidence.float().contiguous(), entropy, eligible, editable, **rules
    )
    return dlm_kernels.UnmaskResult(*results)


def _rules(tokens, mask_id, candidates, rules):
    """The eligible and the editable positions, and every rule by row."""
    allowed, masked, device = arguments.allowed(candidates, tokens), arguments.masked(tokens, mask_id), tokens.device
    by_row = dict.fromkeys(ranks.RULES)
    for name, rule in rules.items():
        if rule is not None:
            by_row[name] = arguments.rows(rule, tokens.shape[:1], device, torch.int32 if name == "num_unmask" else torch.float32)
    return masked & allowed, None if by_row["edit_threshold"] is None else ~masked & allowed, by_row


def _nothing_unmasked(tokens):
    return dlm_kernels.UnmaskResult(tokens, torch.zeros_like(tokens, dtype=torch.bool), tokens.new_zeros(tokens.shape[:1]))


@_operation
@torch.no_grad()
def unmask_step(logits, tokens, *, mask_id, candidates=None, **options):
    rules = {name: options.pop(name) for name in ranks.RULES if name in options}
    tokens = arguments.ints(tokens)
    if tokens.numel() == 0:
        return _nothing_unmasked(tokens)
    eligible, editable, by_row = _rules(tokens, mask_id, candidates, rules)
    active = eligible if editable is None else eligible | editable
    if options.get("confidence") == "random" or unmask_kernels.supports_unmask_step(logits):
        scores = score_tokens(logits, active=active, **options)
        return unmask_topk(tokens, scores, mask_id=mask_id, candidates=candidates, **rules)
    source = _source(logits, options)
    sampling, static = _sampling(*logits.shape, logits.device, active=active, **options)
    results = unmask_kernels.unmask_step(*source, *sampling, tokens, eligible, editable, **static, **by_row)
    return dlm_kernels.UnmaskResult(*results)
