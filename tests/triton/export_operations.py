"""Exports every operation for `cuda` on a machine that has no GPU; Triton assembles each kernel's PTX for one chip.

    DLM_KERNELS_CUDA_ARCH=90 python tests/triton/export_operations.py

Prints as JSON each operation's kernels, whether Triton found them in its cache, and how long lowering took. Runs as a process of
its own, as the tests beside it interpret.
"""

import json
import pathlib
import re
import time
import zlib

import jax
import jax.numpy as jnp
import triton
from jax.export import DisabledSafetyCheck

from dlm_kernels import (
    attention,
    combine_guidance,
    lm_head_scores,
    masked_cross_entropy,
    masks,
    mix_guidance,
    score_tokens,
    unmask_step,
    unmask_topk,
)
from dlm_kernels.triton_kernels import launch

B, L, V, D = 2, 40, 5000, 256


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def attend(query, key, stop):
    mask = masks.KeyIntervals(jnp.zeros_like(stop), stop)
    return attention(query, key, key, mask=mask, logits_soft_cap=30.0, return_lse=True)


def attention_gradient(query, key, stop):
    return jax.grad(lambda *x: sum(jnp.sum(y.astype(jnp.float32)) for y in attend(*x, stop)), (0, 1))(query, key)


def step(logits, unconditional, tokens, key):
    return unmask_step(
        logits, tokens, mask_id=V - 1, unconditional=unconditional, guidance_scale=1.5, temperature=0.7, key=key, num_unmask=4
    )


def loss_gradient(hidden, weight, targets):
    return jax.grad(lambda *x: masked_cross_entropy(*x, targets, jnp.ones((B, L))), (0, 1))(hidden, weight)


LOGITS, TOKENS, SCALE = array(B, L, V), array(B, L, dtype="int32"), array(B, dtype="float32")
HIDDEN, WEIGHT = array(B, L, D), array(V, D)
KEY = jax.eval_shape(lambda: jax.random.key(0))
QUERY, SELF, STOP, CACHE = array(B, 300, 4, 64), array(B, 300, 2, 64), array(B, 300, dtype="int32"), array(B, 1300, 2, 64)
OPERATIONS = {
    "attention": (attend, QUERY, SELF, STOP),
    "attention of few queries": (lambda q, k: attention(q, k, k), array(B, 8, 4, 64), CACHE),
    "attention gradient": (attention_gradient, QUERY, SELF, STOP),
    "mix_guidance": (mix_guidance, LOGITS, LOGITS, SCALE),
    "combine_guidance": (combine_guidance, array(3, B, L, V), array(3, B, dtype="float32")),
    "score_tokens": (lambda x: score_tokens(x, confidence="margin"), LOGITS),
    "score_tokens at a temperature": (lambda x, key: score_tokens(x, temperature=0.7, key=key), LOGITS, KEY),
    "unmask_topk": (lambda x, t: unmask_topk(t, score_tokens(x), mask_id=1, threshold=0.9, factor=1.0), LOGITS, TOKENS),
    "unmask_step": (step, LOGITS, LOGITS, TOKENS, KEY),
    "lm_head_scores": (lm_head_scores, HIDDEN, WEIGHT),
    "lm_head_scores at a temperature": (lambda h, w, key: lm_head_scores(h, w, temperature=1.0, key=key), HIDDEN, WEIGHT, KEY),
    "masked_cross_entropy gradient": (loss_gradient, HIDDEN, WEIGHT, TOKENS),
}


def kernels(module):
    """(name, PTX) of every Triton kernel in an exported module."""
    for text in re.findall(r'@triton_kernel_call_ffi\(.*?opaque = "((?:[^"\\]|\\.)*)"', module):
        raw = re.sub(rb"\\([0-9A-F]{2}|.)", lambda m: bytes.fromhex(m[1].decode()) if len(m[1]) == 2 else m[1], text.encode())
        proto = zlib.decompress(raw)
        ptx = re.search(rb"\.version [\t\n\x20-\x7e]*\}", proto)[0].decode()
        yield re.search(r"\.entry (\w+)", ptx)[1], ptx


assembled = {}  # the PTX of every kernel that Triton has run ptxas on: was it found in its cache?


def note(*, metadata_group, cache_hit, **_):
    assembled.update((pathlib.Path(path).read_text(), cache_hit) for name, path in metadata_group.items() if name.endswith("ptx"))


triton.knobs.compilation.listener = note
for operation, (function, *arguments) in OPERATIONS.items():
    checks = [DisabledSafetyCheck.custom_call(launch.JAX_TARGET)]
    start = time.perf_counter()
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments)
    row = {"operation": operation, "seconds": time.perf_counter() - start, "kernels": [], "found": []}
    for name, ptx in kernels(exported.mlir_module()):
        row["kernels"].append(name)
        # Fails where the module holds another PTX than was assembled.
        row["found"].append(next(found for text, found in assembled.items() if ptx in text))
    print(json.dumps(row), flush=True)
