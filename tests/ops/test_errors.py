"""Bad input raises a ValueError that names the argument, what was expected and what came."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels as dlm
from dlm_kernels import masks

q = jnp.zeros((2, 3, 4, 8))
kv = jnp.zeros((2, 5, 2, 8))
logits = jnp.zeros((2, 3, 7))
tokens = jnp.zeros((2, 3), jnp.int32)
scores = dlm.TokenScores(tokens, *(jnp.zeros((2, 3)),) * 3)
hidden, weight = jnp.zeros((2, 3, 8)), jnp.zeros((7, 8))
whole = jnp.ones((2, 3), bool)
rows, matrices, pairs = jnp.zeros((3, 8)), jnp.zeros((4, 8, 6)), jnp.zeros((3, 2), int)


def mix(x=rows, gate=matrices, up=matrices, down=matrices.mT, expert=pairs, weight=pairs, **options):
    return dlm.mix_experts(x, gate, up, down, expert, weight, **options)


CASES = {
    "banned tokens of no integers": (
        lambda: dlm.score_tokens(logits, banned_tokens=[3, 4.0]),
        r"banned_tokens: expected an array, got list",
    ),
    "query is a list": (lambda: dlm.attention([1.0], kv, kv), r"query: expected an array, got list"),
    "query of integers": (lambda: dlm.attention(q.astype(int), kv, kv), r"query: expected dtype float32, .* got int"),
    "query of objects": (lambda: dlm.attention(np.array([None]), kv, kv), r"query: expected an array of numbers, got"),
    "query of rank 3": (lambda: dlm.attention(q[0], kv, kv), r"query: expected shape \[B, T, N, H\], got \[3, 4, 8\]"),
    "key of another batch": (lambda: dlm.attention(q, kv[:1], kv), r"key: expected shape \[2, 5, 2, 8\]"),
    "value of another length": (
        lambda: dlm.attention(q, kv, kv[:, :4]),
        r"value: expected shape \[2, 5, 2, 8\].*got \[2, 4, 2, 8\]",
    ),
    "mixed dtypes": (
        lambda: dlm.attention(q, kv.astype(jnp.bfloat16), kv),
        r"key, value: expected query's dtype float32",
    ),
    "heads that do not divide": (
        lambda: dlm.attention(q[:, :, :3], kv, kv),
        r"key: expected a number of heads that divides",
    ),
    "head size over 512": (
        lambda: dlm.attention(*(jnp.zeros((1, 1, 1, 513)),) * 3),
        r"query: expected a head size from 1 to 512, got 513",
    ),
    "scale that is traced": (
        lambda: jax.jit(lambda scale: dlm.attention(q, kv, kv, scale=scale))(1.0),
        r"scale: expected a finite number, not traced, got .*Tracer",
    ),
    "scale past all floats": (lambda: dlm.attention(q, kv, kv, scale=10**400), r"scale: expected a finite number, .*got 1000"),
    "scale past float32": (lambda: dlm.attention(q, kv, kv, scale=1e300), r"scale: expected a finite number, .*got 1e\+300"),
    "offsets beside documents": (
        lambda: masks.block_causal(3, 2, offset=np.array([0, 1]), segment_ids=tokens),
        r"offset: expected 0 with segment_ids, .* got ndarray of int64, shape \[2\]",
    ),
    "scale of no number": (lambda: dlm.attention(q, kv, kv, scale=np.nan), r"scale: expected a finite number, .*got nan"),
    "soft cap of text": (
        lambda: dlm.attention(q, kv, kv, logits_soft_cap="30"),
        r"logits_soft_cap: expected a finite number, .*'30'",
    ),
    "soft cap of zero": (
        lambda: dlm.attention(q, kv, kv, logits_soft_cap=0),
        r"logits_soft_cap: expected None or a number from 1e-30 to 1e30, got 0",
    ),
    "mask of floats": (
        lambda: dlm.attention(q, kv, kv, mask=jnp.ones((3, 5))),
        r"mask: expected .*boolean array, got dtype float32",
    ),
    "mask that does not broadcast": (
        lambda: dlm.attention(q, kv, kv, mask=jnp.ones((3, 4), bool)),
        r"mask: expected a shape that broadcasts to \[2, 4, 3, 5\]",
    ),
    "mask of rank 5": (
        lambda: dlm.attention(q, kv, kv, mask=jnp.ones((1, 2, 4, 3, 5), bool)),
        r"mask: expected a shape that broadcasts to \[2, 4, 3, 5\]",
    ),
    "intervals of another batch": (
        lambda: dlm.attention(q, kv, kv, mask=dlm.masks.padding(jnp.array([1, 2, 3]), 3, 5)),
        r"mask.start: expected shape \[2 or 1, 3\]",
    ),
    "half an interval": (
        lambda: dlm.attention(q, kv, kv, mask=dlm.masks.KeyIntervals(tokens, tokens, tokens)),
        r"mask.stop2: expected an array, got NoneType",
    ),
    "unknown implementation": (
        lambda: dlm.attention(q, kv, kv, implementation="cuda"),
        r"implementation: expected one of .*'cuda'",
    ),
    "implementation that is no name": (
        lambda: dlm.mix_guidance(logits, logits, 1.0, implementation=[]),
        r"implementation: expected one of .*got \[\]",
    ),
    "streams of two shapes": (
        lambda: dlm.mix_guidance(logits, logits[:1], 1.0),
        r"unconditional: expected shape \[2, 3, 7\]",
    ),
    "streams of two ranks": (
        lambda: dlm.mix_guidance(logits, logits[0], 1.0),
        r"unconditional: expected shape \[B, L, V\], got \[3, 7\]",
    ),
    "scale of text": (lambda: dlm.mix_guidance(logits, logits, "2"), r"scale: expected a number or an array .* got '2'"),
    "scale of a wrong length": (
        lambda: dlm.mix_guidance(logits, logits, jnp.ones(3)),
        r"scale: expected a scalar, shape \[2\]",
    ),
    "weights of a wrong shape": (
        lambda: dlm.combine_guidance(logits[None], jnp.ones((2,))),
        r"weights: expected shape \[C\]",
    ),
    "weights of no stream": (lambda: dlm.combine_guidance(logits[None], 1.0), r"weights: expected shape \[C\].*got \[\]"),
    "weights of truth values": (
        lambda: dlm.combine_guidance(logits[None], jnp.array([True])),
        r"weights: expected a number or an array of numbers, got dtype bool",
    ),
    "top_p of nothing": (
        lambda: dlm.truncate_logits(logits, top_p=0),
        r"top_p: expected None or a number above 0 and at most 1, got 0",
    ),
    "top_p in percent": (lambda: dlm.truncate_logits(logits, top_p=np.float32(95)), r"top_p: expected .* at most 1, got 95"),
    "top_p of no number": (lambda: dlm.truncate_logits(logits, top_p=np.nan), r"top_p: expected .*got nan"),
    "top_p of another batch": (lambda: dlm.truncate_logits(logits, top_p=jnp.ones(3)), r"top_p: expected a scalar, shape \[2\]"),
    "top_k of no token": (
        lambda: dlm.truncate_logits(logits, top_k=0),
        r"top_k: expected None or an integer of at least 1, got 0",
    ),
    "top_k of half a token": (lambda: dlm.truncate_logits(logits, top_k=2.5), r"top_k: expected an integer .*got dtype float32"),
    "top_k of a truth value": (lambda: dlm.truncate_logits(logits, top_k=True), r"top_k: expected an integer .*got dtype bool"),
    "truncation at a temperature below zero": (
        lambda: dlm.truncate_logits(logits, temperature=-1),
        r"temperature: expected 0 or more, got -1",
    ),
    "truncation of positions without a batch": (
        lambda: dlm.truncate_logits(logits[0], top_p=0.5),
        r"logits: expected shape \[B, L, V\], got \[3, 7\]",
    ),
    "truncation by a kernel that is not there": (
        lambda: dlm.truncate_logits(logits, top_p=0.5, implementation="cudnn"),
        r"implementation='cudnn' cannot run truncate_logits: cudnn has no truncation",
    ),
    "soft cap below zero for no positions": (
        lambda: dlm.score_tokens(logits[:, :0], logits_soft_cap=-1.0),
        r"logits_soft_cap: expected None or a number from 1e-30 to 1e30, got -1.0",
    ),
    "no vocabulary": (lambda: dlm.score_tokens(logits[..., :0]), r"logits: expected a vocabulary of at least 1"),
    "guidance without a scale": (lambda: dlm.score_tokens(logits, unconditional=logits), r"expected both or neither"),
    "unknown confidence": (
        lambda: dlm.score_tokens(logits, confidence="sure"),
        r"confidence: expected one of 'probability'",
    ),
    "temperature below zero": (lambda: dlm.score_tokens(logits, temperature=-1), r"temperature: expected 0 or more, got -1"),
    "temperature without a key": (
        lambda: dlm.score_tokens(logits, temperature=1.0),
        r"key, noise: expected one of them",
    ),
    "a key of another generator": (
        lambda: dlm.score_tokens(logits, temperature=1.0, key=jax.random.key(0, impl="rbg")),
        r"key: expected a threefry key",
    ),
    "a seed for a key": (
        lambda: dlm.score_tokens(logits, temperature=1.0, key=0),
        r"key: expected a JAX key such as jax.random.key\(0\), or an array of one per row, got int",
    ),
    "a list of keys": (
        lambda: dlm.score_tokens(logits, confidence="random", key=[jax.random.key(0)] * 2),
        r"key: expected a JAX key such as .*, or an array of one per row, got list",
    ),
    "too many keys": (
        lambda: dlm.score_tokens(logits, temperature=1.0, key=jax.random.split(jax.random.key(0), 3)),
        r"key: expected shape \[2, 2\]",
    ),
    "noise of another shape": (
        lambda: dlm.score_tokens(logits, temperature=1.0, noise=logits[:, :2]),
        r"noise: expected shape \[2, 3, 7\]",
    ),
    "noise of another shape for the greedy": (
        lambda: dlm.score_tokens(logits, noise=logits[:, :2]),
        r"noise: expected shape \[2, 3, 7\]",
    ),
    "too many keys for the greedy": (
        lambda: dlm.score_tokens(logits, key=jax.random.split(jax.random.key(0), 3)),
        r"key: expected shape \[2, 2\]",
    ),
    "active of integers": (lambda: dlm.score_tokens(logits, active=tokens), r"active: expected dtype bool, got int32"),
    "no rule": (lambda: dlm.unmask_topk(tokens, scores, mask_id=0), r"expected at least one of num_unmask, threshold"),
    "two orders": (
        lambda: dlm.unmask_topk(tokens, scores, mask_id=0, threshold=0.9, entropy_budget=0.1),
        r"entropy_budget: goes by entropy",
    ),
    "scores of another shape": (
        lambda: dlm.unmask_topk(tokens[:, :2], scores, mask_id=0, num_unmask=1),
        r"scores.token: expected shape \[2, 2\]",
    ),
    "scores of no kind": (
        lambda: dlm.unmask_topk(tokens, tuple(scores), mask_id=0, num_unmask=1),
        r"scores: expected TokenScores, got tuple",
    ),
    "scores of proposals that are no tokens": (
        lambda: dlm.unmask_topk(tokens, scores._replace(token=scores.confidence), mask_id=0, num_unmask=1),
        r"scores.token: expected an integer dtype, got float32",
    ),
    "no mask token": (
        lambda: dlm.unmask_step(logits, tokens, mask_id=None, num_unmask=1),
        r"mask_id: expected a single integer, got None",
    ),
    "a mask token past 32 bits": (
        lambda: dlm.unmask_topk(tokens, scores, mask_id=2**31, num_unmask=1),
        r"mask_id: expected a single integer, got 2147483648",
    ),
    "a mask token per position": (
        lambda: dlm.unmask_topk(tokens, scores, mask_id=tokens, num_unmask=1),
        r"mask_id: expected a single integer, got shape \[2, 3\]",
    ),
    "half a token": (
        lambda: dlm.unmask_topk(tokens, scores, mask_id=0, num_unmask=2.5),
        r"num_unmask: expected an integer .*got dtype float32",
    ),
    "a block of three": (
        lambda: dlm.unmask_topk(tokens, scores, mask_id=0, num_unmask=1, candidates=(0, 1, 2)),
        r"candidates: expected bool \[B, L\] or \(start, stop\)",
    ),
    "active given twice": (
        lambda: dlm.unmask_step(logits, tokens, mask_id=0, num_unmask=1, active=whole),
        r"active: unmask_step derives it",
    ),
    "hidden states of no width": (
        lambda: dlm.lm_head_scores(hidden[..., :0], weight[:, :0]),
        r"hidden: expected a width of at least 1, got shape \[2, 3, 0\]",
    ),
    "loss of no width": (
        lambda: dlm.masked_cross_entropy(hidden[..., :0], weight[:, :0], tokens, jnp.ones((2, 3))),
        r"hidden: expected a width of at least 1",
    ),
    "a head of nothing packed": (lambda: dlm.pack_lm_head(weight[:0]), r"weight: expected shape \[V, D\] with .* got \[0, 8\]"),
    "a head of nothing": (lambda: dlm.lm_head_scores(hidden, weight[:0]), r"weight: .* with V of at least 1, got \[0, 8\]"),
    "head of another width": (lambda: dlm.lm_head_scores(hidden, weight[:, :5]), r"weight: expected shape \[V, 8\]"),
    "head of another dtype": (
        lambda: dlm.lm_head_scores(hidden, weight.astype(jnp.float16)),
        r"weight: expected hidden's dtype",
    ),
    "packed head of another width": (
        lambda: dlm.lm_head_scores(hidden, dlm.pack_lm_head(weight[:, :5])),
        r"weight: expected shape \[V, 8\].*got \[7, 5\]",
    ),
    "packed head of another dtype": (
        lambda: dlm.lm_head_scores(hidden, dlm.pack_lm_head(weight.astype(jnp.bfloat16))),
        r"weight: expected hidden's dtype float32, got bfloat16",
    ),
    "head packed for another implementation": (
        lambda: dlm.lm_head_scores(hidden, dlm.pack_lm_head(weight, implementation="cpu"), implementation="pallas"),
        r"implementation='pallas' cannot run lm_head_scores: .*not packed",
    ),
    "head packed for nobody": (
        lambda: dlm.pack_lm_head(weight, implementation="gpu"),
        r"implementation: expected one of .*got 'gpu'",
    ),
    "a packed head that was converted": (
        lambda: dlm.lm_head_scores(
            hidden.astype(jnp.bfloat16),
            jax.tree.map(lambda x: x.astype(jnp.bfloat16), dlm.pack_lm_head(weight, implementation="cpu")),
        ),
        r"weight: expected panels that pack_lm_head made of bfloat16, got those of another dtype, converted since",
    ),
    "packed head of integers": (lambda: dlm.pack_lm_head(weight.astype(int)), r"weight: expected dtype float32"),
    "loss of a packed head": (
        lambda: dlm.masked_cross_entropy(hidden, dlm.pack_lm_head(weight), tokens, jnp.ones((2, 3))),
        r"weight: expected an array, got PackedHead",
    ),
    "guided soft cap": (
        lambda: dlm.lm_head_scores(
            hidden, weight, unconditional_hidden=hidden, guidance_scale=2.0, logits_soft_cap=30.0
        ),
        r"logits_soft_cap: guidance in hidden space",
    ),
    "a guidance scale for nothing": (
        lambda: dlm.lm_head_scores(hidden, weight, guidance_scale=2.0),
        r"unconditional_hidden, guidance_scale: expected both or neither",
    ),
    "a soft cap below zero, of nothing": (
        lambda: dlm.lm_head_scores(hidden[:, :0], weight, logits_soft_cap=-1),
        r"logits_soft_cap: expected .*got -1",
    ),
    "a loss of nothing with a soft cap below zero": (
        lambda: dlm.masked_cross_entropy(hidden[:, :0], weight, tokens[:, :0], jnp.ones((2, 0)), logits_soft_cap=-1),
        r"logits_soft_cap: expected .*got -1",
    ),
    "unconditional hidden states of another batch": (
        lambda: dlm.lm_head_scores(hidden, weight, unconditional_hidden=hidden[:1], guidance_scale=2.0),
        r"unconditional_hidden: expected shape \[2, 3, 8\]",
    ),
    "unconditional hidden states of another dtype": (
        lambda: dlm.lm_head_scores(hidden, weight, unconditional_hidden=hidden.astype(jnp.float16), guidance_scale=2.0),
        r"unconditional_hidden: expected hidden's dtype float32, got float16",
    ),
    "a guidance scale of another batch": (
        lambda: dlm.lm_head_scores(hidden, weight, unconditional_hidden=hidden, guidance_scale=jnp.ones(3)),
        r"guidance_scale: expected a scalar.*got \[3\]",
    ),
    "integer logits": (
        lambda: dlm.lm_head_scores(hidden, weight, logits_dtype=jnp.int8),
        r"logits_dtype: expected float32",
    ),
    "logits of an unknown dtype": (lambda: dlm.lm_head_scores(hidden, weight, logits_dtype="bf16"), r"logits_dtype: .*got bf16"),
    "logits of the dtype of an array": (
        lambda: dlm.lm_head_scores(hidden, weight, logits_dtype=np.zeros(2)),
        r"logits_dtype: expected float32",
    ),
    "targets of another shape": (
        lambda: dlm.masked_cross_entropy(hidden, weight, tokens[:1], jnp.ones((2, 3))),
        r"targets: expected shape \[2, 3\]",
    ),
    "complex weights": (
        lambda: dlm.masked_cross_entropy(hidden, weight, tokens, jnp.ones((2, 3), complex)),
        r"weights: expected a number or an array of numbers, got dtype complex64",
    ),
    "unknown reduction": (
        lambda: dlm.masked_cross_entropy(hidden, weight, tokens, jnp.ones((2, 3)), reduction="mean"),
        r"reduction: expected one of 'sum', 'none'",
    ),
    "two reductions": (
        lambda: dlm.masked_cross_entropy(hidden, weight, tokens, jnp.ones((2, 3)), reduction=np.array(["sum", "none"])),
        r"reduction: expected one of 'sum', 'none'",
    ),
    "a target of another batch": (
        lambda: dlm.masked_divergence(hidden, weight, hidden[:1], weight, jnp.ones((2, 3))),
        r"target_hidden: expected shape \[2, 3, 8\]",
    ),
    "a target of another vocabulary": (
        lambda: dlm.masked_divergence(hidden, weight, hidden, weight[:5], jnp.ones((2, 3))),
        r"target_weight: expected shape \[7, 8\] \(as many entries as weight\), got \[5, 8\]",
    ),
    "a target's head of another width": (
        lambda: dlm.masked_divergence(hidden, weight, hidden, weight[:, :5], jnp.ones((2, 3))),
        r"target_weight: expected shape \[V, 8\] with V of at least 1, got \[7, 5\]",
    ),
    "a target of another dtype": (
        lambda: dlm.masked_divergence(hidden, weight, *(x.astype(jnp.float16) for x in (hidden, weight)), jnp.ones((2, 3))),
        r"target_hidden: expected hidden's dtype float32, got float16",
    ),
    "a target's head of another dtype": (
        lambda: dlm.masked_divergence(hidden, weight, hidden, weight.astype(jnp.float16), jnp.ones((2, 3))),
        r"target_weight: expected target_hidden's dtype float32, got float16",
    ),
    "divergence with weights of another shape": (
        lambda: dlm.masked_divergence(hidden, weight, hidden, weight, jnp.ones(3)),
        r"weights: expected shape \[2, 3\]",
    ),
    "divergence of another reduction": (
        lambda: dlm.masked_divergence(hidden, weight, hidden, weight, jnp.ones((2, 3)), reduction="mean"),
        r"reduction: expected one of 'sum', 'none'",
    ),
    "lengths of one row": (lambda: masks.padding(3, 4), r"lengths: expected shape \[B\], got \[\]"),
    "lengths that are no integers": (lambda: masks.padding(jnp.ones(2), 4), r"lengths: expected an integer .*got dtype float32"),
    "temperature of NumPy's zero": (
        lambda: dlm.soft_embedding(hidden, weight, temperature=np.float32(0)),
        r"temperature: expected a number above 0, got 0.0",
    ),
    "temperature of no number": (
        lambda: dlm.soft_embedding(hidden, weight, temperature=np.nan),
        r"temperature: expected a number above 0, got nan",
    ),
    "temperature of a truth value": (
        lambda: dlm.soft_embedding(hidden, weight, temperature=jnp.array(True)),
        r"temperature: expected a number or an array of numbers, got dtype bool",
    ),
    "queries of half a token": (
        lambda: masks.padding(jnp.array([1, 2]), 2.5),
        r"query_length: expected an integer of at least 0, .*got 2.5",
    ),
    "an unknown side": (lambda: masks.padding(jnp.array([1, 2]), 4, side="top"), r"side: expected one of 'left', .* got 'top'"),
    "fewer keys than none": (lambda: masks.sliding_window(3, 1, 1, key_length=-1), r"key_length: expected .*got -1"),
    "keys of a list": (lambda: masks.block_causal(3, 1, key_length=[3]), r"key_length: expected .*got \[3\]"),
    "a row without a length": (lambda: masks.block_diffusion(None, 2), r"length: expected an integer .*got None"),
    "a cache for text": (lambda: masks.cache("2", 3), r"query_length: expected an integer .*got '2'"),
    "documents of one row": (lambda: masks.packed(jnp.array([1, 1])), r"segment_ids: expected shape \[B, L\], got \[2\]"),
    "blocks of nothing": (lambda: masks.block_causal(4, 0), r"block_size: expected at least 1, got 0"),
    "blocks of NumPy's nothing": (lambda: masks.block_causal(4, np.int64(0)), r"block_size: expected at least 1, got 0"),
    "blocks of half a token": (lambda: masks.block_diffusion(4, 0.5), r"block_size: expected a single integer, got dtype float32"),
    "documents of another length": (
        lambda: masks.block_causal(5, 2, segment_ids=tokens),
        r"segment_ids: expected shape \[2, 5\].*got \[2, 3\]",
    ),
    "documents that begin in a cache": (
        lambda: masks.block_causal(3, 2, segment_ids=tokens, offset=4),
        r"offset: expected 0 with segment_ids.*got 4",
    ),
    "documents with more keys": (
        lambda: masks.block_causal(3, 2, segment_ids=tokens, key_length=9),
        r"key_length: expected None with segment_ids.*got 9",
    ),
    "a mask of intervals and a dense one": (
        lambda: masks.block_causal(3, 2) & whole,
        r"mask & mask: expected KeyIntervals on both sides, got ArrayImpl",
    ),
    "half a block": (lambda: masks.cache(2, 3, block_start=1), r"block_start, block_stop: expected both or neither"),
    "caches of two batches": (
        lambda: masks.cache(2, jnp.array([3, 5]), start=jnp.array([1, 2, 3])),
        r"stop: expected a scalar or shape \[3\].*got \[2\]",
    ),
    "an offset per position": (
        lambda: masks.sliding_window(3, 1, 1, offset=tokens),
        r"offset: expected a scalar or shape \[B\], got \[2, 3\]",
    ),
    "product of one axis": (lambda: dlm.matmul(rows[0], weight.T), r"x: expected shape \[N, D\] or \[B, L, D\], got \[8\]"),
    "product of integers": (lambda: dlm.matmul(pairs, weight), r"x: expected dtype float32, bfloat16 or float16, got int"),
    "a weight that is not turned round": (lambda: dlm.matmul(rows, weight), r"weight: expected shape \[8, F\], got \[7, 8\]"),
    "a weight of three axes": (lambda: dlm.matmul(rows, matrices), r"weight: expected shape \[D, F\], got \[4, 8, 6\]"),
    "a weight of another dtype": (
        lambda: dlm.matmul(rows, weight.T.astype(jnp.bfloat16)),
        r"weight: expected x's dtype float32, got bfloat16",
    ),
    "a product by a kernel that is not there": (
        lambda: dlm.matmul(rows, weight.T, implementation="triton"),
        r"implementation='triton' cannot run matmul: triton_kernels has no matmul",
    ),
    "mixture of one axis": (lambda: mix(x=rows[0]), r"x: expected shape \[N, D\] or \[B, L, D\], got \[8\]"),
    "mixture of integers": (lambda: mix(x=rows.astype(int)), r"x: expected dtype float32, bfloat16 or float16"),
    "experts of another width": (lambda: mix(gate=matrices[:, :5]), r"gate: expected shape \[E, 8, F\].*got \[4, 5, 6\]"),
    "a gate of one expert": (lambda: mix(gate=matrices[0]), r"gate: expected shape \[E, D, F\], got \[8, 6\]"),
    "no experts at all": (lambda: mix(gate=matrices[:0]), r"gate: expected shape \[E, 8, F\] with E and F of at least 1, got \[0"),
    "gate and up of two widths": (lambda: mix(up=matrices[..., :5]), r"up: expected shape \[4, 8, 6\] .*got \[4, 8, 5\]"),
    "down that is not turned round": (lambda: mix(down=matrices), r"down: expected shape \[4, 6, 8\] .*got \[4, 8, 6\]"),
    "experts of another dtype": (
        lambda: mix(up=matrices.astype(jnp.float16)),
        r"gate, up, down: expected x's dtype float32, got float32, float16 and float32",
    ),
    "experts of half a number": (lambda: mix(expert=jnp.zeros((3, 2))), r"expert: expected an integer dtype, got float32"),
    "experts of other rows": (lambda: mix(expert=jnp.zeros((2, 2), int)), r"expert: expected shape \[3, 2\].*got \[2, 2\]"),
    "experts of sequences for rows": (lambda: mix(expert=jnp.zeros((1, 3, 2), int)), r"expert: expected shape \[N, K\]"),
    "shares of other experts": (lambda: mix(weight=jnp.ones((3, 1))), r"weight: expected shape \[3, 2\] \(expert's shape\)"),
    "shares of truth values": (lambda: mix(weight=jnp.ones((3, 2), bool)), r"weight: expected a number or an array of numbers"),
    "an activation that experts do not have": (
        lambda: mix(activation="relu"),
        r"activation: expected one of 'silu', 'gelu', got 'relu'",
    ),
    "a mixture by a kernel that is not there": (
        lambda: mix(implementation="cudnn"),
        r"implementation='cudnn' cannot run mix_experts: cudnn has no experts",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message_names_the_argument(case):
    call, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_option_that_nobody_has_is_named_with_the_operation():
    with pytest.raises(TypeError, match=r"unmask_step\(\) got an unexpected keyword argument 'temprature'"):
        dlm.unmask_step(logits, tokens, mask_id=0, num_unmask=1, temprature=1.0)


@pytest.mark.parametrize("library", [np, jnp])
def test_integers_past_32_bits_are_not_wrapped(library):
    with jax.enable_x64(True):
        many, nobody = library.int64(2**62), library.full((2, 3), 2**32 + 1, "int64")
        assert (dlm.unmask_topk(tokens, scores, mask_id=0, num_unmask=many).count == 3).all()
        assert (dlm.unmask_topk(tokens, scores, mask_id=library.int64(2**32), num_unmask=many).count == 0).all()
        assert jnp.isnan(dlm.masked_cross_entropy(hidden, weight, nobody, jnp.ones((2, 3), jnp.float32)))
        with pytest.raises(ValueError, match=f"num_unmask: expected an integer .*, got {2**40}"):
            dlm.unmask_topk(tokens, scores, mask_id=0, num_unmask=2**40)


@pytest.mark.parametrize("banned", [[], [3, -1], (np.int64(3), 4, 2**32 + 5, -(2**70))])
def test_banned_tokens_may_be_a_list(banned):
    """Of ids of which one past 32 bits, wrapped, would be another token."""
    draw = jax.random.normal(jax.random.key(0), (2, 3, 7))
    expected = draw.at[..., [int(x) for x in banned if 0 <= x < 7]].set(-jnp.inf) if banned else draw
    head = jnp.eye(7)
    for got in (dlm.score_tokens(draw, banned_tokens=banned), dlm.lm_head_scores(draw, head, banned_tokens=banned)):
        np.testing.assert_array_equal(got.token, expected.argmax(-1))
        np.testing.assert_allclose(got.logsumexp, jax.nn.logsumexp(expected, -1), rtol=1e-6)


def test_a_temperature_of_zero_needs_no_noise():
    for zero in (0, 0.0, np.float32(0)):
        np.testing.assert_array_equal(dlm.score_tokens(logits, temperature=zero).token, logits.argmax(-1))


def test_the_greatest_head_size_is_taken():
    assert jax.eval_shape(dlm.attention, *(jnp.zeros((1, 1, 1, 512)),) * 3).shape == (1, 1, 1, 512)
