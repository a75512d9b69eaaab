"""Which implementation decoding takes for each operation."""

import jax
import jax.numpy as jnp

import dlm_kernels
from dlm_kernels.denoiser.experts import Experts
from dlm_kernels.ops import dispatch

LENGTH, BLOCK = 128, 64  # columns of the canvas and of the block that are asked about


def recorded(choices):
    """{operation: implementation} on this machine's default device, of what `dispatch.recording` has collected."""
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    found = {}
    for choice in choices:
        kernels = found.setdefault(dispatch.operation(choice.kernel), {})
        kernels[choice.implementations.get(platform, choice.implementations["default"])] = None
    return {name: ", ".join(kernels) for name, kernels in found.items()}


def taken(config, params):
    """{operation: implementation} of all operations, those of training too, at shapes of this model's decoding."""
    dtype, length, block = params["embed"].dtype, LENGTH, BLOCK

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
    mixture = Experts(8, 2, config.ffn) if config.experts is None else config.experts
    count, chosen, width = mixture.count, mixture.chosen, mixture.ffn
    matrices = (shaped(count, *shape) for shape in ((config.d_model, width), (config.d_model, width), (width, config.d_model)))
    expert, share = (shaped(block, chosen, dtype=each) for each in (jnp.int32, jnp.float32))
    logits = shaped(1, block, config.vocab)
    hidden, weight = shaped(1, block, config.d_model), shaped(config.vocab, config.d_model)
    tokens, positions = shaped(1, block, dtype=jnp.int32), shaped(1, block)
    attention, loss = calls["attention"], (dlm_kernels.masked_cross_entropy, (hidden, weight, tokens, positions), {})
    divergence = dlm_kernels.masked_divergence, (hidden, weight, hidden, weight, positions), {}
    calls |= {
        "mix_experts": (dlm_kernels.mix_experts, (shaped(block, config.d_model), *matrices, expert, share), {}),
        "matmul": (dlm_kernels.matmul, (hidden, shaped(config.d_model, config.ffn)), {}),
        "gradient of attention": (jax.grad(lambda *x, mask: attention[0](*x, mask=mask).sum(), (0, 1, 2)), *attention[1:]),
        "combine_guidance": (dlm_kernels.combine_guidance, (shaped(2, *logits.shape), shaped(2)), {}),
        "truncate_logits": (dlm_kernels.truncate_logits, (logits,), dict(top_p=0.9)),
        "score_tokens": (dlm_kernels.score_tokens, (logits,), {}),
        "unmask_step": (dlm_kernels.unmask_step, (logits, tokens), dict(mask_id=config.mask_id, num_unmask=1)),
        "masked_cross_entropy": loss,
        "gradient of masked_cross_entropy": (jax.grad(loss[0], (0, 1)), *loss[1:]),
        "masked_divergence": divergence,
        "gradient of masked_divergence": (jax.grad(divergence[0], (0, 1)), *divergence[1:]),
        "soft_embedding": (dlm_kernels.soft_embedding, (hidden, weight), {}),
    }
    found = {}
    for name, (function, arguments, named) in calls.items():
        of_call = recorded(dlm_kernels.explain(function, *arguments, **named))
        found[name] = ", ".join(dict.fromkeys(of_call.values()))
    return found
