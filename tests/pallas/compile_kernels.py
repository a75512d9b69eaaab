"""Compiles every TPU kernel at the shapes of real models for one chip, with no TPU; prints a JSON line for each.

    python tests/pallas/compile_kernels.py "TPU v5 lite"
    python tests/pallas/compile_kernels.py "TPU v5 lite" attention   # only the cases with this in their name

libtpu is the real compiler: it fails where a kernel needs more VMEM than the chip has, or tiles that it cannot lay out.
"""

import functools
import itertools
import json
import os
import sys

# No TPU is there to be asked what it is.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ["JAX_PLATFORMS"] = "cpu"
# Else a second process finds the compiler locked by the first.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding  # noqa: E402

import dlm_kernels  # noqa: E402
from dlm_kernels.pallas_kernels import (  # noqa: E402
    attention,
    chips,
    cross_entropy,
    divergence,
    experts,
    guidance,
    lm_head,
    truncation,
    unmask,
)

F32, BF16, INT, BOOL = jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_
# Rows, model width, vocabulary.
MODELS = {
    "LLaDA-8B": (128, 4096, 126464),
    "Dream-7B": (512, 3584, 152064),
    "SDAR-4B": (16, 2560, 151936),
    "DiffusionGemma": (256, 2816, 262144),
}
# Query heads, kv heads, head size.
HEADS = {
    "LLaDA-8B": (32, 32, 128),
    "Dream-7B": (28, 4, 128),
    "SDAR-4B": (32, 8, 128),
    "DiffusionGemma local": (16, 8, 256),
    "DiffusionGemma global": (16, 2, 512),
    "MDLM": (12, 12, 64),
}
# Queries, keys, intervals per query (0: no mask), dtype: whole sequences, blocks against a cache, block-causal and BD3 bounds.
ATTENTION = (
    ("LLaDA-8B", 1024, 1024, 0, BF16),
    ("LLaDA-8B", 512, 512, 0, F32),
    ("LLaDA-8B", 32, 2048, 1, BF16),
    ("LLaDA-8B", 64, 4096, 2, F32),
    ("Dream-7B", 500, 500, 1, BF16),
    ("Dream-7B", 256, 8192, 1, BF16),
    ("SDAR-4B", 4, 4096, 1, BF16),
    ("SDAR-4B", 1024, 1024, 1, BF16),
    ("SDAR-4B", 2048, 2048, 2, BF16),
    ("DiffusionGemma local", 256, 1280, 2, BF16),
    ("DiffusionGemma global", 256, 2048, 1, BF16),
    ("DiffusionGemma global", 128, 1024, 1, F32),
    ("MDLM", 1024, 1024, 0, F32),
    ("MDLM", 1024, 1024, 1, BF16),
)
def cases():
    """(name, function, shapes and dtypes of its operands or None for those it is not given)."""
    for model, (r, d, v) in MODELS.items():
        for dtype in (BF16, F32):
            logits, per_row = ((r, v), dtype), ((r,), F32)
            name = f"{model} {jnp.dtype(dtype).name}"
            yield f"{name} mix_guidance", guidance.mix_guidance, (logits, logits, per_row)
            yield f"{name} combine_guidance", guidance.combine_guidance, (((3, r, v), dtype), ((3, r), F32))
            yield f"{name} truncate_logits", truncation.truncate_logits, (logits, per_row, per_row, ((r,), INT))
            if model == "LLaDA-8B":
                yield f"{name} truncate_logits, top_k", truncation.truncate_logits, (logits, per_row, None, ((r,), INT))
            for confidence in ("probability", "margin", "neg_entropy"):
                static = dict(confidence=confidence, tempered_confidence=False, logits_soft_cap=None)
                yield f"{name} greedy {confidence}", functools.partial(unmask.score_tokens, **static), (logits, *[None] * 8)
            static = dict(confidence="margin", tempered_confidence=True, logits_soft_cap=30.0)
            sampling = per_row, ((r, 2), jnp.uint32), ((r,), INT)
            operands = (logits, logits, per_row, *sampling, None, ((r,), BOOL), ((5,), INT))
            yield f"{name} sampled", functools.partial(unmask.score_tokens, **static), operands
            operands = (logits, None, None, per_row, None, None, ((r, v), F32), None, None)
            yield f"{name} given noise", functools.partial(unmask.score_tokens, **static), operands
        yield from head_cases(model, r, d, v)
    yield from attention_cases()
    # DiffusionGemma's experts: a chip with little VMEM holds one whole in bfloat16, and in float32 a part at a time.
    for dtype in (BF16, F32) if chips.chip().vmem < 128 * chips.MIB else (BF16,):
        gate, down = ((2, 2816, 704), dtype), ((2, 704, 2816), dtype)
        operands = ((8, 2816), dtype), gate, gate, down, ((8, 8), INT), ((8, 8), F32)
        name = f"{jnp.dtype(dtype).name} mix_experts"
        yield name, functools.partial(experts.mix_experts, activation="gelu"), operands
    for b, length in ((1, 32), (8, 1024), (2, 8192)):
        row, rule = ((b, length), F32), ((b,), F32)
        integers, flags = ((b, length), INT), ((b, length), BOOL)
        positions = (integers, integers, row, row, flags, flags)
        yield f"unmask_topk {b} x {length}", unmask.unmask_topk, (*positions, ((b,), INT), rule, rule, rule, rule)
        few = (integers, integers, row, None, flags, None, ((b,), INT))
        yield f"unmask_topk {b} x {length}, num_unmask", unmask.unmask_topk, (*few, None, None, None, None)


def head_cases(model, r, d, v):
    for rows, dtype in ((r, BF16), (r, F32), (8, BF16), (1024, BF16)):
        name = f"{model} {jnp.dtype(dtype).name} {rows} x {d} x {v}"
        head, per_row = (((rows, d), dtype), ((v, d), dtype)), ((rows,), F32)
        static = dict(confidence="margin", tempered_confidence=True, logits_soft_cap=30.0, logits_dtype=BF16)
        sampling = per_row, ((rows, 2), jnp.uint32), ((rows,), INT), None, ((rows,), BOOL), ((5,), INT)
        yield f"{name} sampled", functools.partial(lm_head.lm_head_scores, **static), (*head, *sampling)
        if rows == r:
            static = dict(confidence="probability", tempered_confidence=False, logits_soft_cap=None, logits_dtype=None)
            yield f"{name} greedy", functools.partial(lm_head.lm_head_scores, **static), (*head, *[None] * 6)
        if rows != 8:
            # LLaDA's and Dream's heads have no cap, which is the other branch.
            static = dict(logits_soft_cap=30.0 if model == "DiffusionGemma" else None)
            loss = (*head, ((rows,), INT), ((rows,), BOOL))
            yield f"{name} loss", functools.partial(cross_entropy.masked_cross_entropy_forward, **static), loss
            gradient = functools.partial(cross_entropy.masked_cross_entropy_backward, **static)
            yield f"{name} gradient", gradient, (*loss, per_row, per_row)
            # From another model of the kind, and what a narrower student has from it.
            student = head if rows == r else (((rows, 1024), dtype), ((v, 1024), dtype))
            both = (*student, *head, ((rows,), BOOL))
            yield f"{name} divergence", divergence.masked_divergence_forward, both
            yield f"{name} divergence gradient", divergence.masked_divergence_backward, (*both, *[per_row] * 3)


def attention_cases():
    for model, t, s, pairs, dtype in ATTENTION:
        n, k, h = HEADS[model]
        name = f"attention {model} {t} x {s}, {pairs} intervals, {jnp.dtype(dtype).name}"
        query, key, row = ((2, t, n, h), dtype), ((2, s, k, h), dtype), ((2, n, t), F32)
        operands = query, key, key, ((2, t, 2 * pairs), INT) if pairs else None, None
        static = dict(scale=h**-0.5, logits_soft_cap=30.0 if s == 1280 else None)
        yield f"{name}, forward", functools.partial(attention.attention_forward, **static), operands
        if t == s:
            gradient = functools.partial(attention.attention_backward, **static)
            yield f"{name}, backward", gradient, (*operands, query, row, query, row)


def several_chips(devices):
    """(name, function, arrays split over two devices): by their types, or left to the compiler, which is given XLA's code."""
    for axis in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(axis,), devices=devices[:2])

        def split(shape, dtype, *spec, mesh=mesh):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

        query, key = split((2, 256, 32, 128), BF16, "data"), split((2, 256, 8, 128), BF16, "data")
        hidden, weight = split((2, 64, 2560), BF16, "data"), split((151936, 2560), BF16)
        targets, weights = split((2, 64), INT, "data"), split((2, 64), F32, "data")
        gradient = jax.grad(lambda *x: dlm_kernels.attention(*x).astype(F32).sum(), (0, 1, 2))
        yield f"two chips, {axis}, attention's gradient", gradient, (query, key, key)
        loss = jax.grad(dlm_kernels.masked_cross_entropy, (0, 1))
        yield f"two chips, {axis}, the loss's gradient", loss, (hidden, weight, targets, weights)


def main(kind, part=""):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=chips.CHIPS[kind].topology).devices
    assert devices[0].device_kind == kind, (devices[0].device_kind, kind)
    chips.chip = lambda: chips.CHIPS[kind]
    # A user's setting, which must not reach into the kernels.
    jax.config.update("jax_default_matmul_precision", "highest")
    one = SingleDeviceSharding(devices[0])
    on_one = ((*case[:2], [x and jax.ShapeDtypeStruct(*x, sharding=one) for x in case[2]]) for case in cases())
    for name, function, arrays in itertools.chain(on_one, several_chips(devices)):
        if part not in name:
            continue
        row = {"case": name}
        try:
            lowered = jax.jit(function).lower(*arrays)
            lowered.compile()
            # Not in the compiled program's text: jaxlib cannot read back a copy that a 7x leaves to its SparseCores.
            row["kernels"] = lowered.as_text().count("stablehlo.custom_call @tpu_custom_call")
        except Exception as error:  # the test tells all that fail, not the first
            row["error"] = str(error)[:2000]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
