"""Which implementation decoding takes for each operation."""

import jax
import jax.numpy as jnp

import dlm_kernels
from dlm_kernels.denoiser.experts import Experts

LENGTH = 128  # columns of the canvas that is asked about


def taken(config, params, block=64, *, truncated=False, every=False):
    """{operation: implementation} that decoding takes on this machine's default device, truncated by top_p or top_k or not; with
    `every` all operations.
    """
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    dtype, length = params["embed"].dtype, LENGTH

    def shaped(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    heads, keys = ((1, n, k, config.head_size) for n, k in ((block, config.heads), (length, config.kv_heads)))
    row = shaped(1, length, dtype=jnp.int32)
    score = shaped(1, length, dtype=jnp.float32)
    calls = {
        "attention": (
            dlm_kernels.attention,
            (shaped(*heads), shaped(*keys), shaped(*keys)),
            dict(mask=dlm_kernels.masks.cache(block, length)),
        ),
        "mix_guidance": (
            dlm_kernels.mix_guidance,
            (shaped(1, block, config.d_model), shaped(1, block, config.d_model), 2.0),
            {},
        ),
        "lm_head_scores": (
            dlm_kernels.lm_head_scores,
            (shaped(1, block, config.d_model), shaped(config.vocab, config.d_model)),
            {},
        ),
        "unmask_topk": (
            dlm_kernels.unmask_topk,
            (row, dlm_kernels.TokenScores(row, score, score, score)),
            dict(mask_id=config.mask_id, num_unmask=1),
        ),
    }
    mixture = Experts(8, 2, config.ffn) if every and config.experts is None else config.experts
    if mixture is not None:
        count, chosen, width = mixture.count, mixture.chosen, mixture.ffn
        matrices = (shaped(count, *shape) for shape in ((config.d_model, width), (config.d_model, width), (width, config.d_model)))
        expert, weight = (shaped(block, chosen, dtype=each) for each in (jnp.int32, jnp.float32))
        calls["mix_experts"] = dlm_kernels.mix_experts, (shaped(block, config.d_model), *matrices, expert, weight), {}
    logits = shaped(1, block, config.vocab)
    of_logits = {
        "truncate_logits": (dlm_kernels.truncate_logits, (logits,), dict(top_p=0.9)),
        "score_tokens": (dlm_kernels.score_tokens, (logits,), {}),
    }
    if truncated:
        del calls["lm_head_scores"]
        calls |= of_logits
    if every:
        hidden, weight = shaped(1, block, config.d_model), shaped(config.vocab, config.d_model)
        tokens, positions = shaped(1, block, dtype=jnp.int32), shaped(1, block)
        attention, loss = calls["attention"], (dlm_kernels.masked_cross_entropy, (hidden, weight, tokens, positions), {})
        divergence = dlm_kernels.masked_divergence, (hidden, weight, hidden, weight, positions), {}
        calls |= {
            "gradient of attention": (jax.grad(lambda *x, mask: attention[0](*x, mask=mask).sum(), (0, 1, 2)), *attention[1:]),
            "combine_guidance": (dlm_kernels.combine_guidance, (shaped(2, *logits.shape), shaped(2)), {}),
            **of_logits,
            "unmask_step": (dlm_kernels.unmask_step, (logits, tokens), dict(mask_id=config.mask_id, num_unmask=1)),
            "masked_cross_entropy": loss,
            "gradient of masked_cross_entropy": (jax.grad(loss[0], (0, 1)), *loss[1:]),
            "masked_divergence": divergence,
            "gradient of masked_divergence": (jax.grad(divergence[0], (0, 1)), *divergence[1:]),
            "soft_embedding": (dlm_kernels.soft_embedding, (hidden, weight), {}),
        }
    found = {}
    for name, (function, arguments, named) in calls.items():
        choices = dlm_kernels.explain(function, *arguments, **named)
        kernels = [choice.implementations.get(platform, choice.implementations["default"]) for choice in choices]
        found[name] = ", ".join(dict.fromkeys(kernels))
    return found
