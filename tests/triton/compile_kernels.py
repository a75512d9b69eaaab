"""Compiles every kernel and configuration for one chip, with no GPU, and prints what ptxas says of each as JSON.

    python tests/triton/compile_kernels.py 90

Each is compiled as JAX launches it, with its sizes known, and attention, for Hopper, also as torch does, with sizes and
strides as arguments. Runs as a process of its own: the tests beside it have Triton's interpreter switched on, and that cannot
compile.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dlm_kernels.triton_kernels import (
    attention,
    cross_entropy,
    divergence,
    experts,
    guidance,
    launch,
    lm_head,
    truncation,
    unmask,
)

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "uint32": "u32", "bool": "i1"}


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def attention_cases():
    """Model shapes: head sizes of LLaDA (128), small models (64), Gemma (256, 512), one that is padded (96); G of 1, 4 and 8."""
    for dtype, h, pairs, groups, cap, queries in [
        ("bfloat16", 64, 1, 1, None, 1024),
        ("bfloat16", 64, 2, 1, None, 1024),
        ("bfloat16", 64, 2, 1, None, 32),
        ("bfloat16", 96, 1, 4, None, 1024),
        ("bfloat16", 128, 0, 1, None, 1024),
        ("bfloat16", 128, 1, 4, None, 1024),
        ("bfloat16", 128, 2, 4, None, 1024),
        ("bfloat16", 128, 1, 1, None, 32),
        ("float16", 128, 1, 8, 30.0, 32),
        ("float16", 64, 1, 1, None, 1024),
        ("float16", 96, 2, 1, 50.0, 1024),
        ("float16", 128, 2, 4, 50.0, 1024),
        ("float16", 256, 2, 8, 50.0, 1024),
        ("bfloat16", 256, 2, 8, 50.0, 1024),
        ("float32", 64, 1, 1, None, 1024),
        ("float32", 128, 2, 4, None, 1024),
        ("float32", 256, 2, 4, 50.0, 1024),
        ("bfloat16", 512, 1, 8, None, 1024),
        ("bfloat16", 512, 2, 8, 50.0, 32),
    ]:
        query = array(2, queries, 4 * groups, h, dtype=dtype)
        key = array(2, 2048, 4, h, dtype=dtype)
        bounds = array(2, queries, 2 * pairs, dtype="int32") if pairs else None
        lse = array(2, 4 * groups, queries)
        options = dict(scale=h**-0.5, logits_soft_cap=cap)
        name = f"{dtype} H={h} pairs={pairs} G={groups} cap={cap} T={queries}"
        yield f"forward {name}", lambda a=(query, key, key, bounds, None), o=options: attention.attention_forward(*a, **o)
        if queries > 32:
            backward = (query, key, key, bounds, None, query, lse, query, lse)
            yield f"backward {name}", lambda a=backward, o=options: attention.attention_backward(*a, **o)


def loss_gradient(*arguments):
    return cross_entropy.masked_cross_entropy_backward(*arguments, logits_soft_cap=30.0)


def vocabulary_cases():
    """LLaDA's vocabulary; every option of the pipeline on, or none."""
    rows, v, d = 128, 126464, 4096
    per_row, keys = array(rows), array(rows, 2, dtype="uint32")
    counters, active, banned = array(rows, dtype="int32"), array(rows, dtype="bool"), array(4, dtype="int32")
    targets = counters
    for dtype in ("bfloat16", "float32"):
        logits, hidden, weight = array(rows, v, dtype=dtype), array(rows, d, dtype=dtype), array(v, d, dtype=dtype)
        few = array(32, d, dtype=dtype)
        plain = dict(confidence="probability", tempered_confidence=False, logits_soft_cap=None)
        full = dict(confidence="margin", tempered_confidence=True, logits_soft_cap=30.0)
        nothing = (None,) * 8
        everything = (logits, per_row, per_row, keys, counters, None, active, banned)
        sampled = (per_row, keys, counters, None, active, banned)
        yield f"score {dtype}", lambda a=(logits, *nothing), o=plain: unmask.score_tokens(*a, **o)
        yield f"score {dtype}, all options", lambda a=(logits, *everything), o=full: unmask.score_tokens(*a, **o)
        for h in (few, hidden):
            arguments = (h, weight, *nothing[:6])
            yield (
                f"head {dtype} R={h.shape[0]}",
                lambda a=arguments, o=plain: lm_head.lm_head_scores(*a, **o, logits_dtype=None),
            )
        yield (
            f"head {dtype}, all options",
            lambda a=(hidden, weight, *sampled), o=full: lm_head.lm_head_scores(*a, **o, logits_dtype="bfloat16"),
        )
        loss = (hidden, weight, targets, active)
        yield f"loss {dtype}", lambda a=loss: cross_entropy.masked_cross_entropy_forward(*a, logits_soft_cap=30.0)
        gradient = (*loss, per_row, per_row)
        yield f"loss gradient {dtype}", lambda a=gradient: jax.eval_shape(loss_gradient, *a)
        for h in (few, hidden):
            r = h.shape[0]
            divergence_of = (h, weight, array(r, 2 * d, dtype=dtype), array(v, 2 * d, dtype=dtype), array(r, dtype="bool"))
            of_rows = (*divergence_of, array(r), array(r), array(r))
            yield f"divergence {dtype} R={r}", lambda a=divergence_of: divergence.masked_divergence_forward(*a)
            yield (
                f"divergence gradient {dtype} R={r}",
                lambda a=of_rows: jax.eval_shape(divergence.masked_divergence_backward, *a),
            )
        yield f"mix {dtype}", lambda a=(logits, logits, per_row): guidance.mix_guidance(*a)
        stacked = array(3, rows, v, dtype=dtype), array(3, rows)
        yield f"combine {dtype}", lambda a=stacked: guidance.combine_guidance(*a)
        limits = per_row, per_row, array(rows, dtype="int32")
        for name, chosen in (("top_p", (*limits[:2], None)), ("top_k", (limits[0], None, limits[2])), ("both", limits)):
            yield f"truncate {dtype}, {name}", lambda a=(logits, *chosen): truncation.truncate_logits(*a)
    # Its gradients alone are compiled otherwise than bfloat16's.
    hidden, weight = array(rows, d, dtype="float16"), array(v, d, dtype="float16")
    gradient = hidden, weight, targets, active, per_row, per_row
    yield "loss gradient float16", lambda a=gradient: jax.eval_shape(loss_gradient, *a)
    of_rows = hidden, weight, hidden, weight, active, per_row, per_row, per_row
    yield "divergence gradient float16", lambda a=of_rows: jax.eval_shape(divergence.masked_divergence_backward, *a)
    for length in (32, 256, 4096):
        tokens, sure = array(8, length, dtype="int32"), array(8, length)
        flags, number, bound = array(8, length, dtype="bool"), array(8, dtype="int32"), array(8)
        first = (tokens, tokens, sure, None, flags, flags, number, bound, bound, None, bound)
        second = (tokens, tokens, sure, sure, flags, None, None, None, None, bound, None)
        yield f"topk L={length}", lambda a=first: unmask.unmask_topk(*a)
        yield f"topk by entropy L={length}", lambda a=second: unmask.unmask_topk(*a)
        if length == 256:
            yield from step_cases(length, first, second)


def step_cases(length, first, second):
    """Of 16 spans and, the most that are merged with 256 positions, of 32; greedy and drawn, and what `topk` has of the rules."""
    tokens, flags, rules = first[0], first[4], ("num_unmask", "threshold", "factor", "entropy_budget", "edit_threshold")
    for v, confidence, case in ((126464, "probability", first), (262144, "margin", first), (262144, "neg_entropy", second)):
        sampling = (None,) * 4
        if v > 126464:
            sampling = array(8, length), array(8, length, 2, dtype="uint32"), tokens, None
        logits = array(8, length, v, dtype="bfloat16")
        arguments, ruled = (logits, None, None, *sampling, flags, None, tokens, *case[4:6]), dict(zip(rules, case[6:]))
        step = functools.partial(unmask.unmask_step, confidence=confidence, tempered_confidence=False, logits_soft_cap=None)
        yield f"step {confidence} L={length}", lambda f=step, a=arguments, r=ruled: jax.eval_shape(f, *a, **r)


def experts_cases(arch):
    """LLaDA2-mini's layer on a prompt; for Hopper also DiffusionGemma's on a block, and SDAR's in float32."""
    layers = [
        ("LLaDA2", 8192, 256, 2048, 512, "bfloat16", "silu"),
        ("DiffusionGemma", 256, 128, 2816, 704, "bfloat16", "gelu"),
        ("SDAR", 32, 128, 2048, 768, "float32", "silu"),
    ]
    for name, n, count, d, f, dtype, activation in layers if arch == 90 else layers[:1]:
        gate, down = array(count, d, f, dtype=dtype), array(count, f, d, dtype=dtype)
        arguments = array(n, d, dtype=dtype), gate, gate, down, array(n, 8, dtype="int32"), array(n, 8)
        yield f"experts {name} {dtype} N={n}", lambda a=arguments, g=activation: experts.mix_experts(*a, activation=g)


def launches(function):
    """What a leaf would launch on these shapes: pairs of a call and the dtypes of its present arrays."""
    found = []

    def record(call, values):
        dtypes = {name: str(value.dtype) for name, value in zip(call.present, values)}
        found.append((call, dtypes | {name: out.dtype for name, out in call.wanted.items()}))
        return [jnp.zeros(out.shape, out.dtype) for out in call.wanted.values()]

    launch._launch_jax = record
    jax.eval_shape(function)
    return found


def source(call, dtypes, known_sizes):
    """What Triton compiles for a launch: arrays aligned to 16 bytes, and scalars as constants or specialised as Triton does it."""
    scalars, constants = dict(call.scalars), {**call.absent, **dict(call.constants)}
    constants |= {name: value for name, value in scalars.items() if known_sizes or value == 1}
    signature, attributes = {}, {}
    for position, name in enumerate(call.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = scalars.get(name)
        if name in dtypes:
            signature[name] = "*" + TYPES[dtypes[name]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        if name in dtypes or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(call.kernel, signature, constexprs=constants, attrs=attributes)


def compiled(call, dtypes, known_sizes):
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages, "enable_fp_fusion": True}
    target = GPUTarget("cuda", call.arch, 32)
    kernel = triton.compile(source(call, dtypes, known_sizes), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        # To disassemble takes longer than the rest.
        wanted = ["-res-usage"] + ["-sass"] * (call.kernel is unmask._score_kernel)
        usage = subprocess.run([tool, *wanted, cubin.name], capture_output=True, text=True, check=True).stdout
    ptx = kernel.asm["ptx"]
    return {
        "kernel": call.kernel.__name__,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "instructions": len(re.findall(r"^ +/\*[0-9a-f]+\*/ +(?!NOP)\S", usage, re.MULTILINE)),
        "shared": kernel.metadata.shared,
        # jax-triton passes no scratch memory and launches the warps it is told.
        "scratch": getattr(kernel.metadata, "global_scratch_size", 0),
        "warps": kernel.metadata.num_warps == call.num_warps,
        "tensor_core": "wgmma" if "wgmma" in ptx else "tcgen05" if "tcgen05.mma" in ptx else "mma" if "mma.sync" in ptx else "",
    }


def main(arch, wanted=""):
    os.environ["DLM_KERNELS_CUDA_ARCH"] = str(arch)
    seen = set()
    for name, function in [*attention_cases(), *vocabulary_cases(), *experts_cases(arch)]:
        if wanted not in name:
            continue
        for call, dtypes in launches(function):
            for known_sizes in (True, False) if "ward" in name and arch == 90 else (True,):
                # The same kernel and tiles in another case: one compilation stands for both.
                same = (call.kernel.__name__, call.constants, call.num_warps, call.num_stages, tuple(dtypes.items()), known_sizes)
                if same in seen:
                    continue
                seen.add(same)
                row = {"case": name + ("" if known_sizes else ", sizes unknown")}
                try:
                    row |= compiled(call, dtypes, known_sizes)
                except Exception as error:  # the report names the case; the test fails on it
                    row["error"] = f"{type(error).__name__}: {str(error)[-300:]}"
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
