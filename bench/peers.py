"""What one would use instead of our kernels: PyTorch's attention, and published samplers' steps rewritten from their semantics."""

import functools
import importlib.util

import jax

from bench.harness import Contender

WHY_MISSING = {
    "torch": "the Python package torch is not installed",
    "tokamax": "the Python package tokamax is not installed",
}


def installed(package):
    return importlib.util.find_spec(package) is not None


def torch_peer(function, prepare=None, compiled=False):
    """`function` on torch tensors that share the inputs' memory, through torch.compile if so; or the reason there is none."""
    if not installed("torch"):
        return Contender(function, missing=WHY_MISSING["torch"])
    import torch

    def tensors(*inputs):
        shared = jax.tree.map(torch.from_dlpack, inputs)
        return shared if prepare is None else prepare(*shared)

    return Contender(
        torch.compile(function, dynamic=False) if compiled else function, tensors, None, not compiled, compiled
    )


def no_grad(function):
    """`function` as inference code runs it."""

    @functools.wraps(function)
    def call(*inputs):
        import torch

        with torch.no_grad():
            return function(*inputs)

    return call


def sdpa(query, key, value, mask=None, scale=None):
    """torch's scaled_dot_product_attention of [B, T, N, H] tensors; its heads come before positions, which a view can say."""
    from torch.nn.functional import scaled_dot_product_attention

    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    grouped = query.shape[2] != key.shape[2]
    out = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def flex_attention(boolean):
    """FlexAttention with the mask `boolean` [1, 1, T, S] as block mask, which is built beforehand; [B, T, N, H] tensors."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    visible = torch.from_dlpack(boolean)[0, 0]
    blocks = create_block_mask(lambda b, h, t, s: visible[t, s], None, None, *visible.shape, device=visible.device)

    def call(query, key, value):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return flex_attention(*heads_first, block_mask=blocks, enable_gqa=query.shape[2] != key.shape[2]).transpose(
            1, 2
        )

    return call


def llada_step(logits, tokens, *, mask_id, num_unmask, temperature=0.0, precision="float64"):
    """The inner step of LLaDA's sampler: logits [B, L, V], tokens [B, L] -> tokens.

    Its Gumbel form multiplies: exp(l) / (-log u) ** T, in float64; the confidence is a softmax of the whole vocabulary in
    `precision` (float64 in its first releases), gathered at one place; each row of the batch has its own top-k.
    """
    import torch

    if temperature == 0:
        noisy = logits
    else:
        uniform = torch.rand_like(logits, dtype=torch.float64)
        noisy = logits.double().exp() / (-uniform.log()) ** temperature
    proposal = noisy.argmax(-1)
    probability = logits.to(getattr(torch, precision)).softmax(-1)
    sure = probability.gather(-1, proposal[..., None])[..., 0]
    masked = tokens == mask_id
    sure = torch.where(masked, sure, -torch.inf)
    chosen = torch.zeros_like(masked)
    for row in range(tokens.shape[0]):
        chosen[row, sure[row].topk(num_unmask).indices] = True
    return torch.where(chosen & masked, proposal.to(tokens.dtype), tokens)


def llada_guided_step(conditional, unconditional, tokens, *, scale, **options):
    """The same after classifier-free guidance in the logits' dtype; `scale` is LLaDA's cfg_scale plus one."""
    return llada_step(unconditional + scale * (conditional - unconditional), tokens, **options)


def fast_dllm_step(logits, tokens, *, mask_id, threshold):
    """Fast-dLLM's rule for batch 1: the masked positions in order of confidence, kept while it is at least `threshold`.

    The first is always kept. Its confidence is in float64, and the walk reads one number from the device per candidate.
    """
    import torch

    proposal = logits.argmax(-1)
    sure = logits.double().softmax(-1).gather(-1, proposal[..., None])[..., 0]
    masked = tokens == mask_id
    order = torch.where(masked, sure, -torch.inf)[0].topk(int(masked.sum())).indices
    chosen = torch.zeros_like(masked)
    for rank, position in enumerate(order):
        if rank > 0 and sure[0, position] < threshold:
            break
        chosen[0, position] = True
    return torch.where(chosen, proposal.to(tokens.dtype), tokens)


def statistics(logits):
    """What `lm_head_scores` returns, from logits [..., V] that exist: token, confidence, entropy, log-sum-exp."""
    logits = logits.float()
    logsumexp = logits.logsumexp(-1)
    log_p = logits - logsumexp[..., None]
    p = log_p.exp()
    best = log_p.max(-1)
    return best.indices.int(), best.values.exp(), -(p * log_p).sum(-1), logsumexp
