"""python -m bench tpu-schedule: what the TPU's compiler makes of our kernels, of JAX's and of XLA's own code, without a TPU.

Each contender is compiled by libtpu for the chip; bench/tpu_bundles.py counts its static cycles. They are no measurement.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench import machine, report, tpu_bundles, tpu_report
from bench.harness import OURS
from bench.tpu_hardware import HARDWARE
from dlm_kernels.pallas_kernels import attention, chips
from dlm_kernels.xla import attention as xla_attention
from dlm_kernels.xla import cross_entropy as xla_cross_entropy
from dlm_kernels.xla import divergence as xla_divergence
from dlm_kernels.xla import experts as xla_experts
from dlm_kernels.xla import guidance as xla_guidance
from dlm_kernels.xla import lm_head as xla_lm_head
from dlm_kernels.xla import truncation as xla_truncation
from dlm_kernels.xla import unmask as xla_unmask

PALLAS = OURS, "splash", "flash"
BF16, INT = jnp.bfloat16, jnp.int32


@dataclasses.dataclass(frozen=True)
class Contender:
    function: Callable
    operands: tuple  # (shape, dtype), or None for an operand that is not given
    prefetched: dict = dataclasses.field(default_factory=dict)  # kernel -> values of its operands in SMEM
    repeated: dict = dataclasses.field(default_factory=dict)  # program -> passes of XLA's loop, whose body the listings have once
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    unit: str
    units: float  # of work in one call
    products: float  # multiply-adds that the call must make
    moved: float  # bytes that it must read from HBM and write there
    contenders: dict[str, list[Contender]]  # of several, the one with the fewest cycles counts


def cases():
    yield from attention_cases()
    yield from head_cases()
    yield from score_cases()
    yield from loss_cases()
    yield from experts_cases()


def attention_cases():
    """B 1, 32 heads of 128, LLaDA-8B's, and 12 of 64, MDLM's. All of S queries, and a block of queries against a cache of S keys.

    Every kernel is given its arrays head by head, as JAX's are defined; a contender of its own has what `attention` does around
    ours for arrays [B, T, N, H] that lie as they are written.
    """
    shapes = [(s, s, 32, 128) for s in (512, 1024, 2048, 4096)] + [(t, 2048, 32, 128) for t in (32, 64, 128, 256)]
    for t, s, heads, size in [*shapes, (1024, 1024, 12, 64), (64, 2048, 12, 64)]:
        rows, keys = ((1, t, heads, size), BF16), ((1, s, heads, size), BF16)
        as_written = rows, keys, keys, None, None
        by_head = ((1, heads, t, size), BF16), *[((1, heads, s, size), BF16)] * 2
        static = dict(scale=size**-0.5, logits_soft_cap=None)
        contenders = {
            OURS: [Contender(functools.partial(_ours_by_head, **static), by_head)],
            f"{OURS} and transposes": [Contender(functools.partial(attention.attention_forward, **static), as_written)],
        }
        contenders["splash"] = list(_splash(heads, t, s, size))
        contenders["flash"] = list(_flash(heads, t, s, size))
        contenders["XLA"] = [Contender(functools.partial(xla_attention.attention_forward, **static), as_written)]
        pairs, moved = heads * t * s, 2 * heads * size * (2 * t + 2 * s)
        name = f"attention {t} x {s}, {'' if size == 128 else f'{heads} heads of {size}, '}bfloat16"
        yield Case(name, "128 x 128 of a head", pairs / 128**2, 2 * pairs * size, moved, contenders)


def _ours_by_head(query, key, value, **static):
    """Our kernel alone: XLA cancels these transposes against the kernel's own."""
    arrays = (jnp.swapaxes(array, 1, 2) for array in (query, key, value))
    out, lse = attention.attention_forward(*arrays, None, None, **static)
    return jnp.swapaxes(out, 1, 2), lse


def _splash(heads, t, s, size):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    operands = (((heads, t, size), BF16), *[((heads, s, size), BF16)] * 2)
    # The others of 512 to 4096 rows and keys at a time were never the best on v5e and v6e.
    columns = min(s, 2048)
    for rows, inners in [(t, (256, 512, 1024, 2048))] if t <= 1024 else [(1024, (256, 1024)), (2048, (256, 1024))]:
        for inner in inners:
            if inner > columns:
                continue
            sizes = kernel.BlockSizes(block_q=rows, block_kv=columns, block_kv_compute=inner)

            def run(q, k, v, sizes=sizes):
                every = mask.MultiHeadMask([mask.FullMask((t, s))] * heads)
                return kernel.make_splash_mha(every, head_shards=1, q_seq_shards=1, block_sizes=sizes)(q, k, v)

            yield Contender(run, operands, note=f"blocks {rows}, {columns}, {inner}")


def _flash(heads, t, s, size):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    operands = (((1, heads, t, size), BF16), *[((1, heads, s, size), BF16)] * 2)
    rows = min(t, 1024)
    for major, minor in ((512, 512), (1024, 512), (1024, 1024)):
        if min(s, 1024) <= major <= s:
            sizes = flash.BlockSizes(block_q=rows, block_k_major=major, block_k=minor, block_b=1)
            function = functools.partial(flash.flash_attention, sm_scale=size**-0.5, block_sizes=sizes)
            yield Contender(function, operands, note=f"blocks {rows}, {major}, {minor}")


def head_cases():
    """The four models' heads at 128 rows; LLaDA's at the fewest and the most."""
    from dlm_kernels.pallas_kernels import head, lm_head

    models = {
        "LLaDA-8B": (4096, 126464),
        "Dream-7B": (3584, 152064),
        "SDAR-4B": (2560, 151936),
        "DiffusionGemma": (2816, 262144),
    }
    static = dict(confidence="probability", tempered_confidence=False, logits_soft_cap=None, logits_dtype=None)
    for model, rows in [(model, 128) for model in models] + [("LLaDA-8B", 8), ("LLaDA-8B", 32), ("LLaDA-8B", 1024)]:
        d, v = models[model]
        held, columns = head.tiles(rows, v, d, 2, *head.streamed(2))
        live = {"lm_head_scores": [np.ones(-(-rows // held), int)]}
        operands = (((rows, d), BF16), ((v, d), BF16), *[None] * 6)
        yield Case(
            f"lm_head_scores {model} {rows} x {d} x {v}, bfloat16",
            f"{columns} rows of the weight",
            v / columns,
            rows * d * v,
            2 * d * (rows + v),
            {
                OURS: [Contender(functools.partial(lm_head.lm_head_scores, **static), operands, live)],
                "XLA": [Contender(functools.partial(xla_lm_head.lm_head_scores, **static), operands)],
            },
        )


def score_cases():
    """LLaDA's logits, in memory: scored, scored under guidance, mixed, and truncated."""
    from dlm_kernels.pallas_kernels import guidance, truncation, unmask

    static = dict(confidence="probability", tempered_confidence=False, logits_soft_cap=None)
    score, plain = (functools.partial(module.score_tokens, **static) for module in (unmask, xla_unmask))
    r, v = 128, 126464
    logits, per_row, live = ((r, v), BF16), ((r,), jnp.float32), {"score_tokens": [np.ones(2, int)]}
    for name, ours, peer, operands, arrays in (
        ("score_tokens", score, plain, (logits, *[None] * 8), 1),
        ("score_tokens, guided,", score, plain, (logits, logits, per_row, *[None] * 6), 2),
        ("mix_guidance", guidance.mix_guidance, xla_guidance.mix_guidance, (logits, logits, per_row), 3),
    ):
        contenders = {OURS: [Contender(ours, operands, live)], "XLA": [Contender(peer, operands)]}
        yield Case(f"{name} LLaDA-8B {r} x {v}, bfloat16", "1024 logits", r * v / 1024, 0, 2 * arrays * r * v, contenders)
    for dtype in (BF16, jnp.float32):
        operands = ((r, v), dtype), per_row, per_row, None
        bisection = {"select_reduce_fusion": 8 * jnp.dtype(dtype).itemsize}
        contenders = {
            OURS: [Contender(truncation.truncate_logits, operands)],
            "XLA": [Contender(xla_truncation.truncate_logits, operands, repeated=bisection)],
        }
        name = f"truncate_logits, top_p, LLaDA-8B {r} x {v}, {jnp.dtype(dtype).name}"
        yield Case(name, "1024 logits", r * v / 1024, 0, 2 * jnp.dtype(dtype).itemsize * r * v, contenders)


def loss_cases():
    """MDLM's head: the training loss, and distillation's from a teacher of its width, of 512 rows that are all masked."""
    from dlm_kernels.pallas_kernels import cross_entropy, divergence

    r, d, v = 512, 768, 50258
    head, per_row, active = (((r, d), BF16), ((v, d), BF16)), ((r,), jnp.float32), ((r,), jnp.bool_)
    losses = (
        ("masked_cross_entropy", cross_entropy, xla_cross_entropy, (*head, ((r,), INT), active), 2, dict(logits_soft_cap=None)),
        ("masked_divergence", divergence, xla_divergence, (*head, *head, active), 3, {}),
    )
    for name, ours, plain, operands, saved, static in losses:
        # The logits of each head, and backward the gradients of the hidden states and of the weight.
        logits = operands.count(head[0])
        for way, more, kernels, products in (
            ("forward", 0, [""], logits), ("backward", saved, ["_hidden", "_weight"], logits + 2)
        ):  # fmt: skip
            arrays = (*operands, *[per_row] * more)
            # Every tile of rows is live, however many there are.
            live = {f"{name}_{way}{kernel}": [np.ones(1, int)] for kernel in kernels}
            function, peer = (functools.partial(getattr(module, f"{name}_{way}"), **static) for module in (ours, plain))
            yield Case(
                f"{name} MDLM {r} x {d} x {v}, bfloat16, {way}",
                "1024 logits",
                r * v / 1024,
                products * r * d * v,
                2 * d * (r + v) * (logits + (way == "backward")),
                {OURS: [Contender(function, arrays, live)], "XLA": [Contender(peer, arrays)]},
            )


def experts_cases():
    """A block of 32 tokens, of which each has 8 experts at random, most of which have a tile each."""
    from dlm_kernels.pallas_kernels import experts

    rows, chosen, cores = 32, 8, chips.chip().cores
    for model, count, d, f in (("LLaDA2-mini", 256, 2048, 512), ("SDAR-30B", 128, 2048, 768)):
        rng = np.random.default_rng(0)
        expert = np.array([rng.permutation(count)[:chosen] for _ in range(rows)], np.int32)
        tiles = chips.round_up(min(rows * chosen, rows * chosen // experts.LEAST_ROWS + count), cores)
        plan = experts.schedule(jnp.asarray(expert), count, experts.LEAST_ROWS, tiles)
        used = int(plan.used[0])
        matrices = ((count, d, f), BF16), ((count, d, f), BF16), ((count, f, d), BF16)
        operands = ((rows, d), BF16), *matrices, ((rows, chosen), INT), ((rows, chosen), jnp.float32)
        ours, peer = (functools.partial(module.mix_experts, activation="silu") for module in (experts, xla_experts))
        prefetched = {"mix_experts": [np.asarray(plan.expert), np.asarray(plan.used)]}
        yield Case(
            f"mix_experts {model} {rows} x {d}, {used} tiles of {count} experts, bfloat16",
            "an expert",
            used,
            3 * used * experts.LEAST_ROWS * d * f,
            2 * d * (3 * f * len(np.unique(expert)) + 2 * rows),
            {OURS: [Contender(ours, operands, prefetched)], "XLA": [Contender(peer, operands)]},
        )


def run(chip, only=None, pallas=False, out=None):
    """Compiles every case for `chip`, prints and writes its figures; those of what is left out stay. Each chip needs its process.

    pallas: leaves out contenders that are XLA's code, or ours with XLA's around it.
    """
    hardware = HARDWARE[chip]
    folder = Path(tempfile.mkdtemp(prefix="tpu-schedule-"))
    # Before libtpu starts; there is no TPU to be asked what it is.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    # With no TPU to share, several processes may compile at a time.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["LIBTPU_INIT_ARGS"] = tpu_bundles.dump_flags(folder)
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    known = chips.CHIPS[hardware.kind]
    device = topologies.get_topology_desc(platform="tpu", topology_name=known.topology).devices[0]
    chips.chip = lambda: known
    every, commit = list(cases()), machine.commit()
    if not any((only or "") in case.name for case in every):
        raise report.Unusable(f"--only: expected a part of a case's name, got {only!r}")
    path = out or report.RESULTS / f"tpu-static-{chip}.json"
    rows = {row["case"]: row for row in report.read(path)["rows"]} if path.exists() else {}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    try:
        for case in every:
            if only and only not in case.name:
                continue
            before = rows.get(case.name, {}).get("contenders", {})
            row = dict(case=case.name, unit=case.unit, units=case.units, commit=commit, contenders={})
            row |= least(case, hardware)
            for name, variants in case.contenders.items():
                if pallas and name not in PALLAS:
                    row["contenders"] |= {name: before[name]} if name in before else {}
                    continue
                found = [_count(variant, case, hardware, SingleDeviceSharding(device), folder) for variant in variants]
                ran = [result for result in found if "missing" not in result]
                row["contenders"][name] = min(ran, key=lambda result: result["cycles"]) if ran else found[0]
            rows[case.name] = row
            print(tpu_report.line(row), flush=True)
            write(path, chip, versions, [rows[each.name] for each in every if each.name in rows])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def least(case, hardware):
    """Of the core whose cycles are counted: the bytes that it has to move, and the cycles that they take."""
    moved = case.moved / chips.CHIPS[hardware.kind].cores
    return dict(least_bytes=moved, least_copies=moved / hardware.bandwidth * hardware.clock)


def write(path, chip, versions, rows):
    hardware = HARDWARE[chip]
    result = dict(static=True, chip=chip, clock=hardware.clock, bandwidth=hardware.bandwidth, versions=versions, rows=rows)
    report.replace(path, json.dumps(result, indent=1) + "\n")
    report.replace(path.with_suffix(".md"), tpu_report.table(result))


def _count(contender, case, hardware, sharding, folder):
    shutil.rmtree(folder)
    folder.mkdir()
    arrays = [x and jax.ShapeDtypeStruct(*x, sharding=sharding) for x in contender.operands]
    try:
        jax.jit(contender.function).lower(*arrays).compile()
    except Exception as error:  # a peer that does not take the shape; ours are compiled by `make test-tpu`
        return dict(missing=machine.first_line(error), note=contender.note)
    counts = {}
    for program in tpu_bundles.programs(folder, hardware.delay_slots):
        values = contender.prefetched.get(program.name.split(".")[0], ())
        counts[program.name] = tpu_bundles.run(program, values)
    if not counts:
        raise RuntimeError("the compiler wrote no listings: libtpu had started before it was told to")
    times = {name: contender.repeated.get(name.split(".")[0], 1) for name in counts}
    if gone := contender.repeated.keys() - {name.split(".")[0] for name in counts}:
        raise RuntimeError(f"expected programs called {sorted(gone)}, got {sorted(counts)}")
    cycles = sum(times[name] * count.cycles for name, count in counts.items())
    moved = sum(times[name] * (count.read + count.written) for name, count in counts.items())
    return dict(
        cycles=cycles,
        least=sum(times[name] * count.least_cycles for name, count in counts.items()),
        per_unit=cycles / case.units,
        copies=moved / hardware.bandwidth * hardware.clock,
        bytes=moved,
        mxu=sum(times[name] * count.mxu * count.cycles for name, count in counts.items()) / cycles,
        products=case.products / (hardware.rate * chips.CHIPS[hardware.kind].cores) / cycles,
        unknown=sum(count.endless + count.unsized for count in counts.values()),
        programs={name: times[name] * count.cycles for name, count in counts.items()},
        note=contender.note,
    )


def main(chip, only, pallas):
    # JAX that may look for a TPU has started libtpu by now.
    if chip != "all" and os.environ.get("JAX_PLATFORMS") == "cpu":
        run(chip, only, pallas)
        return 0
    command = [sys.executable, "-m", "bench", "tpu-schedule", *(["--only", only] if only else []), *["--pallas"] * pallas, "--chip"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    every = HARDWARE if chip == "all" else [chip]
    return max(subprocess.run([*command, each], env=environment).returncode for each in every)
