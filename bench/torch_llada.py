"""LLaDA as its published PyTorch code runs it: the whole sequence through the model in every step, all logits, a sampler on top.

The model reads the denoiser's own parameters (a flat dict, matrices [in, out]), so both must produce the same tokens.
"""

import torch
from torch.nn.functional import rms_norm, silu

from bench import peers


def generate(config, params, prompt, *, length, block, steps, precision="float64"):
    """prompt [B, P] -> [B, P + length]: greedy, in blocks from left to right, `steps` passes in each."""
    tokens = torch.nn.functional.pad(prompt, (0, length), value=config.mask_id)
    with torch.no_grad():
        for start in range(prompt.shape[1], tokens.shape[1], block):
            for step in range(steps):
                logits = forward(config, params, tokens)
                logits[..., [config.mask_id, config.pad_id]] = -torch.inf
                # Beyond the block nothing may be chosen yet; before it nothing is masked.
                window = tokens[:, : start + block]
                count = block // steps + (step < block % steps)
                chosen = peers.llada_step(
                    logits[:, : start + block],
                    window,
                    mask_id=config.mask_id,
                    num_unmask=count,
                    precision=precision,
                )
                tokens = torch.cat([chosen, tokens[:, start + block :]], 1)
    return tokens


def generate_autoregressive(config, params, prompt, *, length):
    """prompt [B, P] -> [B, P + length]: one greedy token per pass, each reading the keys and values of all before it."""
    tokens, cache = prompt, [None] * config.layers
    window = prompt
    with torch.no_grad():
        for _ in range(length):
            logits = forward(config, params, window, cache, at=tokens.shape[1] - window.shape[1])[:, -1:]
            logits[..., [config.mask_id, config.pad_id]] = -torch.inf
            window = logits.argmax(-1).to(tokens.dtype)
            tokens = torch.cat([tokens, window], 1)
    return tokens


def forward(config, params, tokens, cache=None, at=0):
    """tokens [B, L] at positions at, at + 1, ... -> logits [B, L, V]. With a cache (a list that it fills) attention is causal."""
    c, (b, length) = config, tokens.shape
    on_device = dict(dtype=torch.float32, device=tokens.device)
    position = torch.arange(at, at + length, **on_device)
    frequency = c.rope_theta ** (-torch.arange(0, c.head_size, 2, **on_device) / c.head_size)
    angle = torch.outer(position, frequency)[:, None]
    x = params["embed"][tokens]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    for i in range(c.layers):
        layer = f"layers.{i}."
        h = rms_norm(x, (c.d_model,), params[layer + "attention_norm"], c.rms_norm_eps)
        query, key, value = (_heads(c, params, layer + name, h) for name in ("query", "key", "value"))
        query, key = (_rotate(y, cos, sin) for y in (query, key))
        mask = None
        if cache is not None:
            if cache[i] is not None:
                key, value = (torch.cat(pair, 1) for pair in zip(cache[i], (key, value)))
            cache[i] = key, value
            if length > 1:  # the last one sees all
                mask = torch.ones(length, key.shape[1], dtype=torch.bool, device=tokens.device).tril(key.shape[1] - length)
        x = x + peers.sdpa(query, key, value, mask).reshape(b, length, -1) @ params[layer + "out"]
        h = rms_norm(x, (c.d_model,), params[layer + "ffn_norm"], c.rms_norm_eps)
        x = x + (silu(h @ params[layer + "gate"]) * (h @ params[layer + "up"])) @ params[layer + "down"]
    x = rms_norm(x, (c.d_model,), params["final_norm"], c.rms_norm_eps)
    return x @ params["embed" if c.tie_embeddings else "head"].T


def _heads(config, params, name, h):
    x = h @ params[name]
    if config.qkv_bias:
        x = x + params[f"{name}_bias"]
    x = x.reshape(*h.shape[:2], -1, config.head_size)
    if config.qk_norm and not name.endswith("value"):
        x = rms_norm(x, (config.head_size,), params[f"{name}_norm"], config.rms_norm_eps)
    return x


def _rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
