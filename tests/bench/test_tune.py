"""`bench tune` tries the tiles that it should, compiles them beforehand, and writes the tables that the kernels read."""

import dataclasses
import functools
import importlib.util
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels
from bench import attention, harness, machine
from bench.harness import OURS, Contender


def test_the_header_of_tile_sizes_is_as_tune_writes_it():
    tune = pytest.importorskip("bench.tune")
    text = tune.HEADER.read_text()
    assert tune.header(tune.values(text), tune.measured(text), tune.machine_of(text)) == text


# In Triton's interpreter, where a time says nothing: what is tried reaches the kernel, and its key is the kind that was asked for.
def test_tune_tries_tiles_and_writes_the_table(monkeypatch):
    pytest.importorskip("triton")
    from bench import tune_triton
    from dlm_kernels.triton_kernels import launch, tiles

    if not launch.interpreting():
        pytest.skip("on a GPU this is `python -m bench tune`")
    case = attention.case("LLaDA2-mini", 4, 16, "float32")
    run = functools.partial(dlm_kernels.attention, implementation="triton")
    case = dataclasses.replace(case, contenders={OURS: Contender(jax.jit(lambda q, k, v: run(q, k, v)))})
    kernel = tune_triton.Kernel("attention_forward", None, {"BLOCK_M": (16, 15)}, warps=(4,), stages=(1,))
    seen, measure = [], harness.measure
    monkeypatch.setattr(harness, "measure", lambda case, seconds: seen.append(measured := measure(case, 0.01, True)) or measured)
    key, times = tune_triton.measured(kernel, case)
    found = tune_triton.fastest(kernel, [times])
    assert key == ("attention_forward", launch.arch(), "float32", 128, True, 0)
    assert found in (None, ({"BLOCK_M": 16}, 4, 1))
    # A tile has to be a power of two.
    assert ["missing" in result for result in seen[0]["contenders"].values()] == [False, False, True]
    table = {key: ({"BLOCK_M": 16}, 4, 1)}
    written = {}
    exec(tune_triton.text(table), written)
    assert written["MEASURED"] == table
    monkeypatch.setattr(tiles, "MEASURED", table)
    assert launch.tuned("attention_forward")(lambda *kind: ({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 3))("float32", 128, True, 0) == (
        {"BLOCK_M": 16, "BLOCK_N": 32},
        4,
        1,
    )


# 128 and 1024 rows of the head have one key: what is best for the last alone must not take the place of the others'.
def test_tune_chooses_for_all_cases_of_a_key(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from bench import tune_triton
    from dlm_kernels.triton_kernels import tiles

    seconds = {"few": {"own": 4.0, 0: 1.0, 1: 3.0, 2: 0.1}, "many": {"own": 4.0, 0: 3.0, 1: 2.0}, "alone": {"own": 1.0, 0: 0.99}}
    cases = [SimpleNamespace(name=name) for name in seconds]
    kernel = tune_triton.Kernel("lm_head", lambda: cases, {"BLOCK_R": (16, 32, 64)}, (4,), (1,))
    keys = {"few": ("lm_head", 90, 1), "many": ("lm_head", 90, 1), "alone": ("lm_head", 90, 2)}
    monkeypatch.setattr(tune_triton, "KERNELS", [kernel])
    monkeypatch.setattr(tune_triton, "TABLE", tmp_path / "tiles.py")
    monkeypatch.setattr(tune_triton, "compile_all", lambda cases: None)
    monkeypatch.setattr(tune_triton, "measured", lambda kernel, case: (keys[case.name], seconds[case.name]))
    monkeypatch.setattr(tiles, "MEASURED", {keys["alone"]: ({"BLOCK_R": 64}, 4, 1)})
    tune_triton.run()
    written = {}
    exec((tmp_path / "tiles.py").read_text(), written)
    # sqrt(1 x 3) against sqrt(3 x 2); the fastest of all does not run in both, and 1% is noise.
    assert written["MEASURED"] == {keys["few"]: ({"BLOCK_R": 16}, 4, 1)}


def test_tune_compiles_beforehand_what_it_measures(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    # Not imported here: that empties TRITON_CACHE_DIR, and processes that other tests start would have no cache.
    if importlib.util.find_spec("jax_triton") is None:
        pytest.skip("jax-triton is not installed")
    from bench import tune_triton

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kept = []
    # A tile has to be a power of two: what cannot be compiled stops nobody, and what has been is not compiled again.
    for rows in ((64,), (48, 64)):
        constants = {"BLOCK_R": rows, "BLOCK_D": (32,)}
        kernel = tune_triton.Kernel("lm_head", functools.partial(tune_triton._head, "bfloat16"), constants, (4,), (1,))
        tune_triton.compile_all([(kernel, kernel.cases()[0])])
        kept.append({path: path.stat().st_mtime_ns for path in tmp_path.glob("*/jax_triton.json")})
    assert kept[0] and kept[1] == kept[0]


def test_tune_leaves_out_what_cannot_fit():
    pytest.importorskip("triton")
    from bench import tune_triton

    for kernel in tune_triton.KERNELS:
        constants = [dict(zip(kernel.constants, values)) for values in itertools.product(*kernel.constants.values())]
        tried = kernel.candidates()
        itemsize = jnp.dtype(kernel.cases.args[0]).itemsize
        for candidate in itertools.product(constants, kernel.warps, kernel.stages):
            tile, warps, stages = candidate
            m, n = tile.get("BLOCK_M", 0), tile.get("BLOCK_N", 0)
            # Of a thread's 255 registers a quarter for logits; of Hopper's shared memory queries, and each stage's keys and values.
            registers, shared = m * n / (32 * warps), (m + 2 * n * stages) * 128 * itemsize
            assert (candidate in tried) == (registers <= 64 and shared <= 227 * 1024), (kernel.name, candidate)


# Each kind of arguments that a kernel's own choice tells apart, in both dtypes; nothing is computed.
def test_tune_asks_for_every_kind(monkeypatch):
    pytest.importorskip("triton")
    from bench import tune_triton
    from dlm_kernels.triton_kernels import launch, tiles

    monkeypatch.setattr(machine, "implementation", lambda: "triton")
    zeros = SimpleNamespace(standard_normal=lambda shape, dtype: np.broadcast_to(np.float32(0), shape), permutation=np.arange)
    kinds = {}
    for kernel in tune_triton.KERNELS:
        for case in kernel.cases():
            monkeypatch.setattr(tiles, "MEASURED", table := tune_triton.Table({}, kernel.name, None))
            jax.eval_shape(lambda case=case: case.contenders[OURS].function(*case.inputs(zeros)))
            name, arch, dtype, *kind = table.asked
            assert (name, arch) == (kernel.name, launch.arch())
            kinds.setdefault((name, dtype), set()).add(tuple(kind))
    heads = {(128, False), (128, True), (64, False), (256, False), (512, False)}
    for dtype in ("bfloat16", "float32"):
        assert kinds.pop(("attention_forward", dtype)) == {(*head, pairs) for head in heads for pairs in range(3)}
        assert kinds.pop(("attention_backward", dtype)) == {(128, 0), (64, 0), (256, 0)}
        assert kinds.pop(("lm_head", dtype)) == {(few, drawn) for few in (False, True) for drawn in (False, True)}
        assert kinds.pop(("experts", dtype)) == {(True,), (False,)}
    assert not kinds
