"""Exports every operation for `cuda` on a machine that has no GPU, and assembles the PTX inside for one chip.

    DLM_KERNELS_CUDA_ARCH=90 python tests/triton/export_operations.py

Prints the kernels of each operation as JSON. Runs as a process of its own, as the tests beside it interpret.
"""

import json
import os
import re
import subprocess
import tempfile
import time
import zlib

import jax
import jax.numpy as jnp
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas

from dlm_kernels import (
    attention,
    combine_guidance,
    export_checks,
    lm_head_scores,
    masked_cross_entropy,
    masked_divergence,
    masks,
    mix_experts,
    mix_guidance,
    score_tokens,
    truncate_logits,
    unmask_step,
    unmask_topk,
)
from dlm_kernels.triton_kernels.head_loss import CHUNK

ARCH = int(os.environ["DLM_KERNELS_CUDA_ARCH"])
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


def greedy_steps(logits, tokens):
    return jax.vmap(lambda x, t: unmask_step(x[None], t[None], mask_id=V - 1, num_unmask=4, candidates=(0, 8)))(logits, tokens)


def loss_gradient(hidden, weight, targets):
    return jax.grad(lambda *x: masked_cross_entropy(*x, targets, jnp.ones((B, L))), (0, 1))(hidden, weight)


def divergence_gradient(hidden, weight, target_hidden, target_weight):
    target = target_hidden, target_weight
    return jax.grad(lambda *x: masked_divergence(*x, *target, jnp.ones((B, L))), (0, 1))(hidden, weight)


LOGITS, TOKENS, SCALE = array(B, L, V), array(B, L, dtype="int32"), array(B, dtype="float32")
HIDDEN, WEIGHT = array(B, L, D), array(V, D)
KEY = jax.eval_shape(lambda: jax.random.key(0))
QUERY, SELF, STOP, CACHE = array(B, 300, 4, 64), array(B, 300, 2, 64), array(B, 300, dtype="int32"), array(B, 1300, 2, 64)
EXPERTS = array(5, D, 64), array(5, D, 64), array(5, 64, D), array(B, L, 3, dtype="int32"), array(B, L, 3, dtype="float32")
OPERATIONS = {
    "attention": (attend, QUERY, SELF, STOP),
    "attention of few queries": (lambda q, k: attention(q, k, k), array(B, 8, 4, 64), CACHE),
    "attention gradient": (attention_gradient, QUERY, SELF, STOP),
    "mix_guidance": (mix_guidance, LOGITS, LOGITS, SCALE),
    "combine_guidance": (combine_guidance, array(3, B, L, V), array(3, B, dtype="float32")),
    "truncate_logits": (lambda x: truncate_logits(x, top_p=0.9, top_k=50), LOGITS),
    "score_tokens": (lambda x: score_tokens(x, confidence="margin"), LOGITS),
    "score_tokens at a temperature": (lambda x, key: score_tokens(x, temperature=0.7, key=key), LOGITS, KEY),
    "unmask_topk": (lambda x, t: unmask_topk(t, score_tokens(x), mask_id=1, threshold=0.9, factor=1.0), LOGITS, TOKENS),
    "unmask_step": (step, LOGITS, LOGITS, TOKENS, KEY),
    "unmask_step under vmap": (greedy_steps, LOGITS, TOKENS),
    "lm_head_scores": (lm_head_scores, HIDDEN, WEIGHT),
    "lm_head_scores at a temperature": (lambda h, w, key: lm_head_scores(h, w, temperature=1.0, key=key), HIDDEN, WEIGHT, KEY),
    "masked_cross_entropy gradient": (loss_gradient, HIDDEN, array(5 * CHUNK, D), TOKENS),
    "mix_experts": (mix_experts, HIDDEN, *EXPERTS),
    "masked_divergence gradient": (divergence_gradient, HIDDEN, WEIGHT, array(B, L, 2 * D), array(V, 2 * D)),
}


def kernels(module):
    """(name, PTX) of every Triton kernel in an exported module."""
    for text in re.findall(r'@triton_kernel_call\(.*?backend_config = "((?:[^"\\]|\\.)*)"', module):
        raw = re.sub(rb"\\([0-9A-F]{2}|.)", lambda m: bytes.fromhex(m[1].decode()) if len(m[1]) == 2 else m[1], text.encode())
        proto = zlib.decompress(raw)
        ptx = re.search(rb"\.version [\t\n\x20-\x7e]*\}", proto)[0].decode()
        yield re.search(r"\.entry (\w+)", ptx)[1], ptx


def assemble(ptx):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = f"sm_{ARCH}" + "a" * (ARCH >= 90)
        command = [get_ptxas(ARCH).path, "-arch", target, file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True).stderr


made = []  # every compilation; what is found on disk makes none
make_ttgir = CUDABackend.make_ttgir
CUDABackend.make_ttgir = staticmethod(lambda *arguments: made.append(None) or make_ttgir(*arguments))
for operation, (function, *arguments) in OPERATIONS.items():
    made.clear()
    start = time.perf_counter()
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=export_checks())(*arguments)
    row = {"operation": operation, "seconds": time.perf_counter() - start, "made": len(made)}
    found = list(kernels(exported.mlir_module()))
    # What was found on disk was assembled by the process that made it.
    errors = [error for _, ptx in found if made and (error := assemble(ptx))]
    print(json.dumps(row | {"kernels": [name for name, _ in found], "errors": errors}), flush=True)
