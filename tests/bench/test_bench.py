"""The harness refuses what is wrong, the peers compute what they claim to, and the README says what the files say."""

import dataclasses
import functools
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels
from bench import apart, harness, machine, peers, report, scale, suite, tpu_report, unmask
from bench.harness import OURS, Case, Contender
from dlm_kernels.denoiser import model, sampler
from dlm_kernels.denoiser.config import DenoiserConfig

# Triton reads this when a kernel is decorated, at import.
os.environ.setdefault("TRITON_INTERPRET", "1")


def test_readme_is_what_the_results_files_say():
    text = (machine.ROOT / "README.md").read_text()
    block = text[text.index(report.BEGIN) : text.index(report.END) + len(report.END)]
    assert block == report.readme_block(), "run `python -m bench readme`"


def test_the_tables_are_what_the_results_files_say():
    for path in report.RESULTS.glob("*.json"):
        text = path.with_suffix(".md").read_text()
        if path.stem.startswith("tpu-static-"):
            assert text == tpu_report.table(report.read(path)), path.stem
        else:
            plots = [name for name in ("roofline", "ratios", "sweeps") if (path.with_suffix("") / f"{name}.svg").exists()]
            assert text == report.page(path.stem, report.load(path), plots), f"run `python -m bench report {path}`"


def test_a_table_is_written_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = shutil.copy(next(report.RESULTS.glob("amd*.json")), tmp_path)
    assert "| attention |" in report.write(results).read_text()
    assert not list(tmp_path.glob("*/*.svg"))


def test_the_header_of_tile_sizes_is_as_tune_writes_it():
    tune = pytest.importorskip("bench.tune")
    text = tune.HEADER.read_text()
    assert tune.header(tune.values(text), tune.measured(text), tune.machine_of(text)) == text


# In Triton's interpreter, where a time says nothing: what is tried reaches the kernel, and its key is the kind that was asked for.
def test_tune_tries_tiles_and_writes_the_table(monkeypatch):
    pytest.importorskip("triton")
    from bench import attention, tune_triton
    from dlm_kernels.triton_kernels import launch, tiles

    if not launch.interpreting():
        pytest.skip("on a GPU this is `python -m bench tune`")
    case = attention.case("LLaDA2-mini", 4, 16, "float32")
    run = functools.partial(dlm_kernels.attention, implementation="triton")
    case = dataclasses.replace(case, contenders={OURS: Contender(jax.jit(lambda q, k, v: run(q, k, v)))})
    kernel = tune_triton.Kernel(None, {"BLOCK_M": (16, 15)}, warps=(4,), stages=(1,))
    seen, measure = [], harness.measure
    monkeypatch.setattr(harness, "measure", lambda case, seconds: seen.append(measured := measure(case, 0.01, True)) or measured)
    key, found = tune_triton.fastest("attention_forward", kernel, case)
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


def test_every_case_has_its_own_name_and_starts_with_ours():
    cases = [case for module in suite.OPERATIONS for case in module.cases()]
    assert len({(case.operation, case.name) for case in cases}) == len(cases)
    for case in cases:
        jnp = "jnp, bfloat16 logits" if case.name.endswith(", as written") else "jnp"
        assert list(case.contenders)[:2] == [OURS, jnp]
    names = [{(case.operation, case.name) for case in harness.chosen(cases, grid)} for grid in ("quick", "main", "full")]
    assert set() < names[0] < names[1] < names[2] and len(names[2]) == len(cases)


def test_error_sees_every_kind_of_difference():
    x = np.array([1.0, -np.inf, 2.0])
    assert harness.error((x,), (x,)) == 0
    assert harness.error((np.array([1.0, 0, 2.0]),), (x,)) == np.inf
    assert harness.error((np.array([1.0, -np.inf, np.nan]),), (x,)) == np.inf
    assert harness.error((x[:2],), (x,)) == np.inf
    assert harness.error((np.array([1, 2, 3, 4]),), (np.array([1, 2, 3, 5]),)) == 0.25
    assert harness.error((np.array([1.0, 2.0]),), (np.array([1.0, 2.2]),)) == pytest.approx(0.2 / np.hypot(1, 2.2))


def test_measure_times_only_what_is_right_and_there():
    def fails(x):
        raise RuntimeError("no such instruction\nand more")

    case = Case(
        "doubling",
        "1000",
        lambda rng: (jnp.asarray(rng.standard_normal(1000), jnp.float32),),
        {
            OURS: Contender(jax.jit(lambda x: 2 * x)),
            "jnp": Contender(lambda x: np.asarray(x) * 2),
            "wrong": Contender(lambda x: x),
            "a little wrong": Contender(lambda x: x * (2 + 6e-4)),
            "rounded": Contender(lambda x: x * (2 + 1e-4)),
            "absent": Contender(None, missing="not here"),
            "failing": Contender(fails),
        },
        read=4000,
        oracle=lambda x: 2 * np.asarray(x, np.float64),
    )
    row = harness.measure(case, 0.05)
    ours, jnp_ = (row["contenders"][name]["times"] for name in (OURS, "jnp"))
    assert len(ours) == len(jnp_) >= 2 and min(ours + jnp_) > 0
    assert row["contenders"]["absent"] == dict(missing="not here")
    assert row["contenders"]["failing"] == dict(missing="RuntimeError: no such instruction")
    assert row["contenders"]["wrong"]["missing"].startswith("wrong: differs by 0.5")
    assert row["contenders"]["a little wrong"]["missing"] == "wrong: differs by 0.0003, more than 0.0001"
    assert len(row["contenders"]["rounded"]["times"]) == len(ours)


# Of 4000 bytes ten sets are four times a cache of 10000; a set that fills it is enough by itself.
def test_inputs_have_left_the_cache_when_they_come_again():
    case = Case("doubling", "1000", lambda rng: (rng.standard_normal(1000).astype("float32"),), {}, read=4000)
    sets = harness.input_sets(case, 10000)
    assert len(sets) == 10 and len({float(x[0]) for (x,) in sets}) == 10
    assert len(harness.input_sets(case, 1000)) == 1


# A time is of one call of several; in a round all begin at the same inputs, and the next goes on behind them.
def test_contenders_take_turns_on_the_same_inputs():
    turns = {"one": [], "two": []}

    def call(name, turn):
        turns[name].append(turn)
        return harness.Timed(len(name) + turn, 0.0)

    ready = {name: functools.partial(call, name) for name in turns}
    times = harness._rounds(ready, {"one": 1, "two": 2}, 0.0, 3, lambda: None)
    assert turns == {"one": [2, 4, 6], "two": [2, 3, 4, 5, 6, 7]}
    assert times == {"one": [5, 7, 9], "two": [5.5, 7.5, 9.5]}


@pytest.mark.parametrize("headline, quick, least", [(False, False, 3), (True, False, 7), (True, True, 2)])
def test_a_case_has_a_least_number_of_rounds(monkeypatch, headline, quick, least):
    seen = []
    monkeypatch.setattr(harness, "_rounds", lambda ready, calls, seconds, least, between: seen.append(least) or {})
    contenders = {OURS: Contender(lambda x: x), "jnp": Contender(lambda x: x)}
    harness.measure(Case("nothing", "1", lambda rng: (jnp.ones(1),), contenders, read=4, flops=1, headline=headline), 0.01, quick)
    assert seen == [least]


def test_calls_in_an_accelerators_queue_are_waited_for_once(monkeypatch):
    waited = []
    monkeypatch.setattr(harness, "wait", waited.append)
    harness._seconds(lambda turn: turn, 5, 3)
    assert waited == [7]


def test_a_case_may_have_only_slow_contenders(monkeypatch):
    monkeypatch.setattr(harness, "SLOW_SECONDS", 0.0)
    calls = []
    slow = Contender(lambda x: calls.append(x) or x + 1)
    row = harness.measure(Case("adding", "1", lambda rng: (jnp.ones(1),), {OURS: slow, "jnp": slow}, read=4), 0.01)
    assert [len(result["times"]) for result in row["contenders"].values()] == [1, 1] and len(calls) == 2


def test_peak_bytes_is_what_a_call_holds_at_one_time():
    # Over 32 MiB: glibc may keep smaller arrays, once freed, in a heap that counts as held.
    def call():
        a = np.ones(40 << 20, np.uint8)
        del a
        return np.ones(60 << 20, np.uint8)

    result, peak = machine.peak_bytes(call)
    assert len(result) == 60 << 20
    if peak is not None:
        assert 59 << 20 <= peak <= 63 << 20


# Rows that no rule makes even, a vocabulary that divides nothing; every third position is unmasked already.
def sampler_inputs():
    rng = np.random.default_rng(3)
    logits = unmask.logits(rng, 23, 517)[None]
    tokens = np.where(np.arange(23) % 3 == 0, 5, unmask.MASK).astype(np.int32)[None]
    return logits, tokens


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_llada_step_is_unmask_step(precision):
    torch = pytest.importorskip("torch")
    logits, tokens = sampler_inputs()
    got = peers.llada_step(
        torch.from_numpy(logits), torch.from_numpy(tokens), mask_id=unmask.MASK, num_unmask=6, precision=precision
    )
    want = dlm_kernels.unmask_step(logits, tokens, mask_id=unmask.MASK, num_unmask=6, implementation="xla")
    np.testing.assert_array_equal(got, want.tokens)
    assert (np.asarray(got) != tokens).sum() == 6


def test_llada_guided_step_is_unmask_step_with_guidance():
    torch = pytest.importorskip("torch")
    logits, tokens = sampler_inputs()
    other = logits + 0.3 * np.random.default_rng(4).standard_normal(logits.shape, "float32")
    arrays = map(torch.from_numpy, (logits, other, tokens))
    got = peers.llada_guided_step(*arrays, scale=2.5, mask_id=unmask.MASK, num_unmask=6)
    guidance = dict(unconditional=other, guidance_scale=2.5)
    want = dlm_kernels.unmask_step(logits, tokens, mask_id=unmask.MASK, num_unmask=6, implementation="xla", **guidance)
    np.testing.assert_array_equal(got, want.tokens)


# No position, some, and all reach the threshold.
@pytest.mark.parametrize("threshold, least, most", [(1.0, 1, 1), (0.9, 2, 14), (0.0, 15, 15)])
def test_fast_dllm_step_is_unmask_step_with_a_threshold(threshold, least, most):
    torch = pytest.importorskip("torch")
    logits, tokens = sampler_inputs()
    got = peers.fast_dllm_step(
        torch.from_numpy(logits), torch.from_numpy(tokens), mask_id=unmask.MASK, threshold=threshold
    )
    want = dlm_kernels.unmask_step(logits, tokens, mask_id=unmask.MASK, threshold=threshold, implementation="xla")
    np.testing.assert_array_equal(got, want.tokens)
    assert least <= (np.asarray(got) != tokens).sum() <= most


def test_sdpa_and_statistics_are_attention_and_scores():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    query, key, value = (rng.standard_normal(s, "float32") for s in ((1, 9, 6, 16), (1, 13, 2, 16), (1, 13, 2, 16)))
    mask = dlm_kernels.masks.sliding_window(9, 2, 3, key_length=13)
    got = peers.sdpa(*map(torch.from_numpy, (query, key, value)), mask=torch.from_numpy(np.array(mask.as_boolean(13))))
    want = dlm_kernels.attention(query, key, value, mask=mask, implementation="xla")
    np.testing.assert_allclose(got, want, atol=1e-5)
    logits, _ = sampler_inputs()
    for got, want in zip(
        peers.statistics(torch.from_numpy(logits)), dlm_kernels.score_tokens(logits, implementation="xla"), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# Grouped heads, biases, a prompt that no block divides; untied so that the head is not the embedding.
def test_torch_decoders_write_what_they_should():
    torch = pytest.importorskip("torch")
    from bench import torch_llada

    config = DenoiserConfig(
        layers=2, d_model=48, heads=4, kv_heads=2, head_size=12, ffn=80, vocab=90, qkv_bias=True, tie_embeddings=False
    )
    params = model.init(config, jax.random.key(0))
    tensors = {name: torch.from_dlpack(array) for name, array in params.items()}
    prompt = np.random.default_rng(6).integers(3, 90, (2, 7)).astype(np.int32)
    canvas = np.pad(prompt, ((0, 0), (0, 12)), constant_values=config.mask_id)
    ours = sampler.decode(config, params, canvas, first=7, block=6, steps=3, implementation="xla")
    np.testing.assert_array_equal(
        torch_llada.generate(config, tensors, torch.from_numpy(prompt), length=12, block=6, steps=3),
        ours.tokens,
    )
    # One at a time: what the cache made, one causal pass over all of it makes too.
    written = torch_llada.generate_autoregressive(config, tensors, torch.from_numpy(prompt), length=12)
    logits = torch_llada.forward(config, tensors, written, [None] * config.layers)
    logits[..., [config.mask_id, config.pad_id]] = -torch.inf
    np.testing.assert_array_equal(written[:, 7:], logits[:, 6:-1].argmax(-1))


# The oracle checks what the devices have put together; their number is settled when the process starts.
def test_a_case_is_measured_over_two_devices_in_a_process_of_its_own():
    case = next(case for case in scale.cases() if "lm_head" in case.name and case.name.endswith("2 devices"))
    row = apart.measure(case, 0.01, quick=True)
    assert row["sweep"][1] == 2 and all(result["times"] for result in row["contenders"].values())
