"""The harness refuses what is wrong, the peers compute what they claim to, and the README says what the files say."""

import dataclasses
import functools
import math
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels
from bench import (
    apart,
    attention,
    cross_entropy,
    divergence,
    harness,
    machine,
    peers,
    report,
    scale,
    suite,
    tpu_report,
    unmask,
)
from bench.harness import OURS, Case, Contender
from dlm_kernels.denoiser import model, sampler
from dlm_kernels.denoiser.config import DenoiserConfig


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


def test_a_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == "unknown"


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
    # Parts are summed up, and each has to have its infinities where the other has.
    long = np.tile(np.float32([1, -np.inf, 2, 4]), harness.PART)
    assert harness.error((long,), (long,)) == 0 and harness.error((long[::-1],), (long,)) == np.inf
    assert harness.error((1.5 * long,), (long,)) == pytest.approx(0.5)
    assert harness.error((np.array([1, 2, 3, 4]),), (np.array([1, 2, 3, 5]),)) == 0.25
    assert harness.error((np.array([1.0, 2.0]),), (np.array([1.0, 2.2]),)) == pytest.approx(0.2 / np.hypot(1, 2.2))


def test_measure_times_only_what_is_right_and_there():
    def fails(x):
        raise RuntimeError("no such instruction\nand more")

    def asserts(x):
        raise AssertionError

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
            "asserting": Contender(asserts),
        },
        read=4000,
        oracle=lambda x: 2 * np.asarray(x, np.float64),
    )
    row = harness.measure(case, 0.05)
    ours, jnp_ = (row["contenders"][name]["times"] for name in (OURS, "jnp"))
    assert len(ours) == len(jnp_) >= 2 and min(ours + jnp_) > 0
    assert row["contenders"]["absent"] == dict(missing="not here")
    assert row["contenders"]["failing"] == dict(missing="RuntimeError: no such instruction")
    assert row["contenders"]["asserting"] == dict(missing="AssertionError")
    assert row["contenders"]["wrong"]["missing"].startswith("wrong: differs by 0.5")
    assert row["contenders"]["a little wrong"]["missing"] == "wrong: differs by 0.0003, more than 0.0001"
    assert len(row["contenders"]["rounded"]["times"]) == len(ours)


# Without an oracle a wrong kernel of ours must not make its peers wrong; who draws other numbers is checked for what it can be.
def test_where_there_is_no_oracle_ours_has_to_agree_with_jnp():
    def one(ours, peer=lambda x: 2 * x, jnp_=lambda x: 2 * x, **others):
        contenders = {OURS: Contender(ours), "peer": Contender(peer), "jnp": Contender(jnp_)} | others
        row = harness.measure(Case("doubling", "1", lambda rng: (np.ones(4),), contenders, read=32), 0.0)
        return {name: result.get("missing", "ran").split()[0] for name, result in row["contenders"].items()}

    def fails(x):
        raise RuntimeError("no memory")

    assert one(lambda x: 2 * x) == {OURS: "ran", "peer": "ran", "jnp": "ran"}
    assert one(lambda x: 3 * x) == {OURS: "wrong:", "peer": "ran", "jnp": "ran"}
    assert one(lambda x: 3 * x, jnp_=fails) == {OURS: "wrong:", "peer": "ran", "jnp": "RuntimeError:"}
    assert one(lambda x: 3 * x, jnp_=fails, peer=fails)[OURS] == "unchecked:"
    other = Contender(lambda x: 7 * x, check=lambda output, x: float(abs(output - 7 * x).max()))
    assert one(lambda x: 2 * x, other=other)["other"] == "ran"
    assert one(lambda x: 2 * x, other=dataclasses.replace(other, function=lambda x: 6 * x))["other"] == "wrong:"


# Draws of JAX's generator are the same in ours and in jnp; of torch's what is known is how many masks are gone.
def test_a_sampler_that_commits_nothing_is_wrong():
    case = unmask.case("LLaDA-8B", 8, 517, temperature=1.0, sweep=("rows", 8))
    idle = {name: dataclasses.replace(each, function=lambda logits, tokens: tokens) for name, each in case.contenders.items()}
    contenders = case.contenders | {f"{name}, idle": each for name, each in idle.items()}
    row = harness.measure(dataclasses.replace(case, contenders=contenders), 0.0, quick=True)
    here = {name: result for name, result in row["contenders"].items() if contenders[name].missing is None}
    assert {"dlm_kernels", "dlm_kernels, idle", "jnp", "jnp, idle"} <= here.keys()
    for name, result in here.items():
        assert result.get("missing", "").startswith("wrong:") == name.endswith(", idle"), (name, result)


# Ours must write what jnp writes; who takes other passes, every token.
def test_a_decoder_with_a_cache_that_writes_nothing_is_wrong():
    from bench import end_to_end

    case = end_to_end.case("shipped", 8, 8, 4, 2, cached=True)
    point = end_to_end.case("shipped", 8, 8, 4, 1, cached=True)  # the points of a curve compile one program
    assert all(case.contenders[name].function is point.contenders[name].function for name in (OURS, "jnp"))
    given = jnp.full((1, 8), 9, jnp.int32)
    text, other, idle, lost = (
        np.pad(given + change, ((0, 0), (0, 8)), constant_values=token)
        for change, token in ((0, 5), (0, 6), (0, end_to_end.BODIES["shipped"].mask_id), (1, 5))
    )
    for name in case.contenders:
        right = [harness.verify(case, name, each, text, (None, given))[0] is None for each in (text, other, idle, lost)]
        assert right == [True, name.endswith("autoregressive"), False, False]


# What a user pays once is told: its time, and its memory with the call's.
def test_what_is_prepared_once_is_told():
    packed = Contender(lambda x: x + 1, lambda x: (x + 0,), once=True)
    contenders = {OURS: Contender(lambda x: x + 1), "jnp": Contender(lambda x: x + 1), "ours, packed": packed}
    row = harness.measure(Case("adding", "1", lambda rng: (jnp.ones(1 << 20),), contenders, read=4 << 20), 0.0)["contenders"]
    assert row["ours, packed"]["once"] > 0 and row["ours, packed"]["once_bytes"] == 4 << 20 and "once" not in row["jnp"]
    assert (row["ours, packed"]["peak_bytes"] or 4 << 20) >= 4 << 20


# The least that anybody must do: six products of attention with its gradients, three of a loss, four of a divergence's.
def test_what_a_kernel_computes_anew_is_no_necessary_work():
    forward, backward = (attention.case("MDLM", 64, 64, "float32", backward=back) for back in (False, True))
    assert backward.flops == 3 * forward.flops
    for module, share in ((cross_entropy, 3), (divergence, 2)):
        forward, backward = (module.case("MDLM", 64, 64, 96, "float32", backward=back) for back in (False, True))
        assert backward.flops == share * forward.flops
    # Half of the row is padding, which nobody need read.
    row, padded = (attention.case("MDLM", 64, 64, "float32", mask) for mask in (None, "padded"))
    assert padded.flops == row.flops // 2 and padded.read == row.read * 2 // 3
    assert attention.keys_seen(np.array([[0, 2, 7, 7], [1, 3, 5, 6]]), 8).tolist() == [1, 1, 1, 0, 0, 1, 0, 0]
    # Untied embeddings are looked up, not read.
    from bench import end_to_end

    config = end_to_end.BODIES["LLaDA-8B"]
    held = sum(math.prod(shape) for shape in model.parameter_shapes(config).values())
    case = end_to_end.case("LLaDA-8B", 16, 16, 16, 4)
    assert case.read == pytest.approx(4 * 4 * (held - config.vocab * config.d_model), rel=1e-4)


# Of 4000 bytes ten sets are four times a cache of 10000; a set that fills it is enough by itself.
def test_inputs_have_left_the_cache_when_they_come_again():
    case = Case("doubling", "1000", lambda rng: (rng.standard_normal(1000).astype("float32"),), {}, read=4000)
    sets = harness.input_sets(case, 10000)
    assert len(sets) == 10 and len({float(x[0]) for (x,) in sets}) == 10
    assert len(harness.input_sets(case, 1000)) == 1
    # A row of LLaDA's logits on an H200, whose cache holds a hundred of them.
    row = Case("row", "1", lambda rng: (np.empty(126464, "float32"),), {}, read=0)
    assert len(harness.input_sets(row, 60 << 20)) * 4 * 126464 >= 4 * 60 << 20


# Two of the usable processors share a cache, a third has its own, and a fourth is not for us.
def test_the_cache_is_all_of_the_last_level_that_the_usable_processors_have(tmp_path):
    for processor, shared in ((0, "0-1"), (1, "0-1"), (2, "2"), (3, "3")):
        for level, size, who in ((2, "1024K", str(processor)), (3, "32M", shared)):
            folder = tmp_path / f"cpu{processor}/cache/index{level}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", who)):
                (folder / name).write_text(f"{text}\n")
    assert machine._last_caches(tmp_path, [0, 1, 2]) == 64 << 20
    assert machine._last_caches(tmp_path / "nothing", [0]) == 0


# Files of two machines, or of a part of one, must not have one name.
def test_a_device_is_named_by_what_it_is_and_what_of_it_may_be_used(monkeypatch):
    arm = "processor: 0\nFeatures: fp asimd\nCPU implementer: 0x41\nCPU part: 0xd40\n"
    read = machine.Path.read_text
    monkeypatch.setattr(machine.Path, "read_text", lambda path, **how: arm if str(path) == "/proc/cpuinfo" else read(path, **how))
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: {3, 1, 2}, raising=False)
    assert machine.device_name() == "aarch64-implementer-0x41-part-0xd40-3-threads-aarch64"
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1)
    about = machine.describe()
    assert about["kind"] == "aarch64 implementer 0x41 part 0xd40" and about["threads"] == 3


def test_the_build_of_llama_cpp_is_among_the_versions(monkeypatch, tmp_path):
    from bench import llama_cpp

    program = tmp_path / "llama-diffusion-cli"
    program.write_text("#!/bin/sh\necho 'version: 6800 (abc)' >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("LLAMA_DIFFUSION_CLI", str(program))
    llama_cpp.version.cache_clear()
    try:
        assert machine.describe()["versions"]["llama.cpp"] == "6800 (abc)"
    finally:
        llama_cpp.version.cache_clear()


# A time is of one call of several; in a round all begin at the same inputs, and the next goes on behind them.
def test_contenders_take_turns_on_the_same_inputs(monkeypatch):
    turns = {"one": [], "two": []}

    def call(name, turn):
        turns[name].append(turn)
        return harness.Timed(len(name) + turn, 0.0)

    ready = {name: functools.partial(call, name) for name in turns}
    monkeypatch.setattr(harness, "LEAST_ROUNDS", 3)
    times = harness._rounds(ready, {"one": 1, "two": 2}, 0.0)
    assert turns == {"one": [2, 4, 6], "two": [2, 3, 4, 5, 6, 7]}
    assert times == {"one": [5, 7, 9], "two": [5.5, 7.5, 9.5]}


# Ours and the fastest peers are in every round, whatever they take; of the slow ones one half as fast has one, another has two.
def test_every_case_has_rounds_enough_to_be_compared():
    seconds = {OURS: 2.0, "slow": 3.0, "fast": 0.5, "faster": 0.4, "fair": 0.7, "ours, packed": 1.0}
    ready = {name: lambda turn, each=each: harness.Timed(each, 0.0) for name, each in seconds.items()}
    times = harness._rounds(ready, dict.fromkeys(ready, 1), 0.0)
    rounds = {OURS: 7, "slow": 1, "fast": 7, "faster": 7, "fair": 2, "ours, packed": 7}
    assert {name: len(each) for name, each in times.items()} == rounds


# The n-th times of two lists are of one round, so who has left must not come back when the others get slower.
def test_who_has_left_stays_away():
    seconds = {OURS: [1.0] * 7, "fast": [1.0, 9.0] + [1.0] * 5, "left": [6.0] * 7}
    ready = {name: functools.partial(lambda each, _: harness.Timed(each.pop(0), 0.0), each) for name, each in seconds.items()}
    times = harness._rounds(ready, dict.fromkeys(ready, 1), 0.0)
    assert {name: len(each) for name, each in times.items()} == {OURS: 7, "fast": 7, "left": 1}


def test_calls_in_an_accelerators_queue_are_waited_for_once(monkeypatch):
    waited = []
    monkeypatch.setattr(harness, "wait", waited.append)
    harness._seconds(lambda turn: turn, 5, 3)
    assert waited == [7]


# On an accelerator what is no jitted function loads and compiles within its first call, and the time of a short one is its start.
def test_an_accelerators_first_call_is_no_time_of_a_contender(monkeypatch):
    called = []

    def loads(x):
        called.append(x) or len(called) > 1 or time.sleep(0.3)
        return 2 * x

    monkeypatch.setattr(machine, "platform_name", lambda: "cuda")
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1)
    contenders = {OURS: Contender(jax.jit(lambda x: 2 * x)), "jnp": Contender(lambda x: 2 * x), "loads": Contender(loads)}
    row = harness.measure(Case("doubling", "1", lambda rng: (jnp.ones(4),), contenders, read=32), 0.0)
    found = row["contenders"]["loads"]
    assert found["compile"] > 0.3 > 0.1 > found["first_call"] and len(found["times"]) == 7 and max(found["times"]) < 0.1
    assert 0 < found["start"] < 0.1 and row["contenders"][OURS]["start"] > 0


def test_a_time_says_where_it_is_that_of_starting_the_call():
    assert report._times(dict(times=[1e-5, 2e-5], start=1.4e-5)) == "15 us (10 us to 20 us) (start)"
    assert report._times(dict(times=[1e-5, 2e-5], start=1e-6)) == report._times(dict(times=[1e-5, 2e-5]))
    contenders = {OURS: dict(times=[1.0]), "peer": dict(times=[2.0], start=1.9), "slow": dict(times=[2.0], start=0.1)}
    row = dict(contenders=contenders)
    assert report._ratio(row, "peer") == "2.00x (start)" and report._ratio(row, "slow") == "2.00x"


# Queued calls wait for nothing, so their seconds are the starts'.
def test_a_start_is_timed_before_the_queue_is_waited_for(monkeypatch):
    clock, waited = [0.0], []

    def call(turn):
        clock[0] += 1.0
        return turn

    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(harness, "wait", lambda output: waited.append(output) or clock.append(clock.pop() + 100.0))
    assert harness._start(call, 4) == 1.0 and waited == [3]


def test_torch_multiplies_in_full_while_a_case_is_measured():
    torch = pytest.importorskip("torch")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with harness.precision("bfloat16"):
        assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision(before)


# Ours multiply float32 numbers as three products of TF32, whose ceiling is no lower for IEEE's being slower.
@pytest.mark.parametrize("tf32, rate", [(6.0, 2.0), (2.0, 1.0)])
def test_a_gpus_ceiling_of_float32_is_ieees_or_a_third_of_tf32s(monkeypatch, tf32, rate):
    rates = {(jnp.float32, "highest"): 1.0, (jnp.bfloat16, "highest"): 9.0, (jnp.float32, "default"): tf32}
    monkeypatch.setattr(machine, "platform_name", lambda: "cuda")
    monkeypatch.setattr(machine, "installed", lambda package: False)
    monkeypatch.setattr(machine, "_memory", lambda: (1, [1.0], [1.0]))
    monkeypatch.setattr(machine, "_jnp_product", lambda shape, dtype, precision="highest": rates[dtype, precision])
    monkeypatch.setattr(machine, "_fastest", lambda rate, seconds: 2 * 8192**3 / rate)
    found = machine.rates()
    assert found["float32"] == pytest.approx(rate) and found["bfloat16"] == pytest.approx(9)


# Asked for any precision, XLA keeps its faster products from bfloat16 numbers too.
def test_jax_multiplies_in_full_where_the_numbers_are_float32(monkeypatch):
    monkeypatch.setattr(machine, "platform_name", lambda: "cuda")
    for dtype, found in (("float32", "highest"), ("bfloat16", None)):
        with harness.precision(dtype):
            assert jax.config.jax_default_matmul_precision == found


def test_a_case_may_have_only_slow_contenders(monkeypatch):
    monkeypatch.setattr(harness, "SLOW_SECONDS", 0.0)
    calls = []
    slow = Contender(lambda x: calls.append(x) or x + 1)
    row = harness.measure(Case("adding", "1", lambda rng: (jnp.ones(1),), {OURS: slow, "jnp": slow}, read=4), 0.01)
    assert [len(result["times"]) for result in row["contenders"].values()] == [1, 1] and len(calls) == 2


PEAK = """
import numpy as np
from bench import machine

def call():
    a = np.ones(40 << 20, np.uint8)
    del a
    return np.ones(60 << 20, np.uint8)

result, peak = machine.peak_bytes(call)
assert len(result) == 60 << 20
print(peak)
"""


def test_peak_bytes_is_what_a_call_holds_at_one_time():
    """In a process of its own: where glibc's heap has room for an array, once freed it stays there, and counts as held."""
    told = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=machine.ROOT).stdout.strip()
    assert told == "None" or 59 << 20 <= int(told) <= 63 << 20


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


# No position, some, and all reach the threshold: by Fast-dLLM's walk, and as one loop.
@pytest.mark.parametrize("threshold, least, most", [(1.0, 1, 1), (0.9, 2, 14), (0.0, 15, 15)])
def test_fast_dllm_step_is_unmask_step_with_a_threshold(threshold, least, most):
    torch = pytest.importorskip("torch")
    logits, tokens = sampler_inputs()
    want = dlm_kernels.unmask_step(logits, tokens, mask_id=unmask.MASK, threshold=threshold, implementation="xla")
    for step in (peers.fast_dllm_step, peers.threshold_step):
        got = step(torch.from_numpy(logits), torch.from_numpy(tokens), mask_id=unmask.MASK, threshold=threshold)
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


# Both would be the plain path's on a GPU, which writes all logits.
@pytest.mark.parametrize("size, masked, grouped", [(128, False, True), (512, False, False), (128, True, False)])
def test_sdpa_gives_a_gpu_what_its_fused_kernels_take(monkeypatch, size, masked, grouped):
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    def attend(query, key, value, attn_mask, scale, enable_gqa):
        given.append((key.shape[1] == 2, value.shape[1] == 2, enable_gqa))
        return query

    given = []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    with FakeTensorMode():
        query, key = (torch.empty(1, 4, heads, size, device="cuda") for heads in (16, 2))
        peers.sdpa(query, key, key, mask=torch.ones(4, 4, device="cuda") if masked else None)
    assert given == [(grouped,) * 3]


# What lies at the edge may round the other way; a token that is likely may not be missing, nor one stand where it does not belong.
def test_a_wide_nucleus_is_right_up_to_rounding_at_its_edge():
    from bench import truncation

    case = truncation.case("small", 16, 4096, "float32", temperature=1.0)
    (logits,) = case.inputs(np.random.default_rng(0))
    contender = case.contenders["jnp"]
    out = np.array(contender.function(logits))
    assert harness.verify(case, "jnp", out, None, (logits,))[:2] == (None, 0)
    row, values = out[0, 0], np.array(logits[0, 0])
    order = np.argsort(-values)
    last = int(np.isfinite(row).sum()) - 1

    def wrong(change):
        changed = out.copy()
        change(changed[0, 0])
        return harness.verify(case, "jnp", changed, None, (logits,))[0] is not None

    def drop(row, ranks):
        row[order[ranks]] = -np.inf

    def keep(row, ranks):
        row[order[ranks]] = values[order[ranks]]

    # Of 4096 tokens a few at the edge have more probability than rounding moves.
    assert wrong(lambda row: drop(row, slice(last - 4, last + 1))) and wrong(lambda row: keep(row, slice(last + 1, last + 6)))
    assert wrong(lambda row: drop(row, 3)) and wrong(lambda row: row.__setitem__(order[0], 0)) and wrong(lambda row: keep(row, -1))
    assert harness.verify(case, "jnp", out[:, :1], None, (logits,))[0] is not None
    assert truncation.beyond(out, logits, 1.0) == 0
    # Dream's temperature leaves so few that nothing rounds.
    assert truncation.case("small", 1, 64, "float32").tolerance == 0


# Where texts part at the first tie, ours that writes other tokens than jnp's logits say is wrong all the same.
def test_a_decoders_first_pass_is_checked_where_texts_part(monkeypatch):
    from bench import end_to_end

    case = end_to_end.case("shipped", 8, 8, 4, 2)
    inputs = case.inputs(np.random.default_rng(0))
    right = case.contenders[OURS].function
    text = right(*inputs, jnp.int32(2))
    monkeypatch.setattr(end_to_end, "ON_CPU", False)
    for decode, is_right in ((right, True), (lambda *given: right(*given) // 2 + 3, False)):
        monkeypatch.setattr(end_to_end, "_decode", lambda *_, decode=decode, **__: decode)
        on_gpu = end_to_end.case("shipped", 8, 8, 4, 2)
        assert (harness.verify(on_gpu, OURS, text, text, inputs)[0] is None) == is_right
        assert harness.verify(on_gpu, "jnp", text, text, inputs)[0] is None


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
@pytest.mark.parametrize("operation", ["lm_head", "end_to_end"])
def test_a_case_is_measured_over_two_devices_in_a_process_of_its_own(operation):
    case = next(case for case in scale.cases() if operation in case.name and case.name.endswith("2 devices"))
    row = apart.measure(case, 0.01, quick=True)
    assert row["sweep"][1] == 2 and all(result["times"] for result in row["contenders"].values())


# Half of a machine is not held against all of it; what somebody reached there is reachable there, and so few are measured once.
def test_a_part_of_the_processors_has_ceilings_of_its_own(monkeypatch, capsys):
    def process(command, **_):
        exec(command[-1][command[-1].index("from bench") :], {})
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    row = dict(flops=600, dtype="float32", contenders={OURS: dict(times=[2.0, 3.0])})
    measured = []
    monkeypatch.setattr(harness, "measure", lambda case, seconds, quick: dict(row))
    monkeypatch.setattr(machine, "rates", lambda: measured.append(1) or dict(read=5.0, float32=200.0, bfloat16=400.0))
    monkeypatch.setattr(apart, "PROCESSORS", [0, 1])
    monkeypatch.setattr(apart, "RATES", {})
    monkeypatch.setattr(apart.subprocess, "run", process)
    part, whole = (dataclasses.replace(scale.cases()[0], apart=dict(processors=n)) for n in (1, 2))
    assert apart.measure(whole, 0.0) == row
    for _ in range(2):
        assert apart.measure(part, 0.0) == row | dict(rates=dict(read=5.0, float32=300.0, bfloat16=400.0))
    assert measured == [1]
