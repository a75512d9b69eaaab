"""What one would use instead of our kernels: PyTorch's attention, and published samplers' steps rewritten from their semantics."""

import functools

import jax

from bench import machine
from bench.harness import Contender


def torch_peer(function, prepare=None, compiled=False, around=None, check=None):
    """`function` on torch tensors that share the inputs' memory; or the reason there is none.

    compiled: through torch.compile. around: what makes of it the function that is called, as `with_gradients`.
    """
    if not machine.installed("torch"):
        return Contender(function, missing=machine.why_missing("torch"))
    import torch

    def tensors(*inputs):
        shared = jax.tree.map(torch.from_dlpack, inputs)
        return shared if prepare is None else prepare(*shared)

    # Loading torch's compiler takes ten seconds, so not before a contender asks for it. It compiles one function for eight kinds
    # of inputs and runs it as it is for more, and several cases are of one function; each begins anew.
    @functools.cache
    def compiler():
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    called = (lambda *inputs: compiler()(*inputs)) if compiled else function
    return Contender(called if around is None else around(called), tensors, compiles=compiled, check=check)


def ours_from_torch(name, **options):
    """The operation of `dlm_kernels.torch`, as it is called on tensors."""
    if not machine.installed("torch"):
        return torch_peer(None)
    import dlm_kernels.torch

    return torch_peer(no_grad(functools.partial(getattr(dlm_kernels.torch, name), **options)))


def with_gradients(loss):
    """`loss` and its gradients for hidden states and weight, its first two inputs."""

    def call(hidden, weight, *others):
        hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
        value = loss(hidden, weight, *others)
        value.backward()
        return value, (hidden.grad, weight.grad)

    return call


def no_grad(function):
    """`function` as inference code runs it."""

    @functools.wraps(function)
    def call(*inputs):
        import torch

        with torch.no_grad():
            return function(*inputs)

    return call


def of_torch(function, compiled=True, around=no_grad):
    """The contenders "torch" and, where `compiled`, "torch.compile" of one function."""
    contenders = {"torch": torch_peer(function, around=around)}
    if compiled:
        contenders["torch.compile"] = torch_peer(function, compiled=True, around=around)
    return contenders


def sdpa(query, key, value, mask=None, scale=None):
    """torch's scaled_dot_product_attention of [B, T, N, H] tensors; its heads come before positions, which a view can say."""
    from torch.nn.functional import scaled_dot_product_attention

    groups = query.shape[2] // key.shape[2]
    # No fused kernel takes groups with a mask, or with heads of more than 256: torch's plain path would write all logits.
    if groups > 1 and query.is_cuda and (mask is not None or query.shape[-1] > 256):
        key, value = (x.repeat_interleave(groups, 2) for x in (key, value))
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    grouped = query.shape[2] != key.shape[2]
    out = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def with_mask(boolean):
    """For `prepare`: the inputs and the mask `boolean()` [1, 1, T, S] or None, which is the same for all of them."""

    @functools.cache
    def mask():
        import torch

        return None if boolean() is None else torch.from_dlpack(boolean())

    return lambda *inputs: (*inputs, mask())


def flex_peer(bounds, keys):
    """FlexAttention of [B, T, N, H] tensors with the intervals `bounds` [T, 2 or 4] of `keys` keys as block mask, built before."""

    @functools.cache
    def block_mask(device):
        import torch
        from torch.nn.attention.flex_attention import create_block_mask

        # Tensors of their own: torch's compiler looks at all that the function holds, and stumbles over NumPy's.
        ends = [torch.tensor(end.tolist(), dtype=torch.int32, device=device) for end in bounds.T]

        def one(b, h, t, s):
            return (ends[0][t] <= s) & (s < ends[1][t])

        def two(b, h, t, s):
            return (ends[0][t] <= s) & (s < ends[1][t]) | (ends[2][t] <= s) & (s < ends[3][t])

        return create_block_mask(one if len(ends) == 2 else two, None, None, len(bounds), keys, device=device)

    def call(query, key, value, blocks):
        from torch.nn.attention.flex_attention import flex_attention

        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        grouped = query.shape[2] != key.shape[2]
        return flex_attention(*heads_first, block_mask=blocks, enable_gqa=grouped).transpose(1, 2)

    return torch_peer(call, lambda *inputs: (*inputs, block_mask(inputs[0].device)), compiled=True)


def why_no_attention(name):
    """Why jax.nn's cuDNN, or tokamax, is no contender here; None where it is one."""
    if name == "cuDNN" and jax.default_backend() != "gpu":
        return "cuDNN needs an NVIDIA GPU"
    return machine.why_missing("tokamax") if name == "tokamax" else None


def tokamax_attention(query, key, value, mask=None):
    """The implementation that tokamax itself takes for the device."""
    import tokamax
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # or it would look for its own among our arguments
    return tokamax.dot_product_attention(query, key, value, mask=mask)


def llada_step(logits, tokens, *, mask_id, num_unmask, temperature=0.0, precision="float64"):
    """The inner step of LLaDA's sampler: logits [B, L, V], tokens [B, L] -> tokens.

    Its Gumbel form multiplies: exp(l) / (-log u) ** T; the confidence is a softmax of the whole vocabulary, gathered at one place;
    each row of the batch has its own top-k. All in `precision`: its releases have the noise in float64, the first ones all of it.
    """
    import torch

    dtype = getattr(torch, precision)
    if temperature == 0:
        noisy = logits
    else:
        uniform = torch.rand_like(logits, dtype=dtype)
        noisy = logits.to(dtype).exp() / (-uniform.log()) ** temperature
    proposal = noisy.argmax(-1)
    probability = logits.to(dtype).softmax(-1)
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


def threshold_step(logits, tokens, *, mask_id, threshold):
    """The same in float32 and without a walk: what a compiler can make one loop of."""
    import torch

    probability, proposal = logits.float().softmax(-1).max(-1)
    masked = tokens == mask_id
    sure = torch.where(masked, probability, -torch.inf)
    first = torch.zeros_like(masked).scatter(-1, sure.argmax(-1, keepdim=True), True)
    return torch.where(masked & (first | (sure >= threshold)), proposal.to(tokens.dtype), tokens)


def statistics(logits):
    """What `lm_head_scores` returns, from logits [..., V] that exist: token, confidence, entropy, log-sum-exp."""
    logits = logits.float()
    logsumexp = logits.logsumexp(-1)
    log_p = logits - logsumexp[..., None]
    p = log_p.exp()
    best = log_p.max(-1)
    return best.indices.int(), best.values.exp(), -(p * log_p).sum(-1), logsumexp
