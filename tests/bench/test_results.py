"""What results files say: ratios, ceilings, noise, who is missing; and what the command line refuses, in one line."""

import copy
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bench import __main__ as command
from bench import comparison, harness, machine, report, suite
from bench.harness import FROM_TORCH, GREEDY, OURS, PACKED, Case

RATES = dict(read=100.0, copy=80.0, float32=1000.0, bfloat16=4000.0)


def row(ours, read=400, written=0, flops=0, dtype="float32", **theirs):
    contenders = {OURS: ours} | {name.replace("_", " "): each for name, each in theirs.items()}
    contenders = {name: dict(missing=each) if isinstance(each, str) else dict(times=each) for name, each in contenders.items()}
    return dict(
        dict(operation="attention", case="a", read=read, written=written, flops=flops, dtype=dtype, sweep=None, tokens=0),
        **dict(headline=True, component=None, contenders=contenders, commit="0", rates=RATES),
    )


def result(*rows):
    about = dict(kind="a machine", threads=2, versions=dict(jax="0"))
    return dict(machine=about, rows=[dict(each, case=str(i)) for i, each in enumerate(rows)])


def test_of_devices_of_one_kind_the_readme_shows_the_fastest_and_folds_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    devices = [("a", 10.0, "one"), ("b", 30.0, "one"), ("c", 20.0, "one"), ("d", 1.0, "other"), ("e-quick", 1.0, "one")]
    for name, rate, kind in devices:
        about = result(dict(row([1.0] * 7, peer=[2.0] * 7), rates=dict(RATES, bfloat16=rate)))
        about["machine"]["kind"] = kind
        (tmp_path / f"{name}.json").write_text(json.dumps(about))
    block = report.readme_block()
    order = [block.index(text) for text in ("](bench/results/b.md)", "<summary>c<", "](bench/results/c.md)", "<summary>a<")]
    assert sorted(order) == order and block.count("<summary>") == block.count("</details>") == 2
    assert "(bench/results/d.md)" in block and "e-quick" not in block


# Above 1 ours is faster; each ratio is of one round, so what slows a whole round changes none.
def test_a_ratio_is_of_one_round_and_above_1_where_ours_is_faster():
    burst = row([1.0, 10.0, 2.0], peer=[3.0, 30.0, 2.0])
    assert report.ratios(burst, "peer") == [3, 3, 1]
    assert report.ratios(row([1.0, 2.0], peer=[8.0]), "peer") == [8, 4]
    assert report.ratios(row([1.0], peer="not here"), "peer") == []
    plain = row("no such kernel", jnp=[1.0, 2.0], peer=[3.0, 1.0])
    # Where the plain version is another's, or neither ran, it is a row all the same.
    other = dict(row("no such kernel"), contenders={OURS: dict(missing="wrong"), "jnp, bfloat16 logits": dict(times=[2.0])})
    assert report.base(other) == "jnp, bfloat16 logits" and "2 s (2 s to 2 s) (jnp)" in report.table([other])
    assert report.roofline(row("no such kernel", peer=[1.0]), RATES) is None
    assert report.base(plain) == "jnp" and report.ratios(plain, "peer") == [3, 0.5] and report.peers_of(plain) == ["peer"]


# Bytes at the bandwidth of reading, or of copying where more than a tenth is written; products at their dtype's rate.
@pytest.mark.parametrize(
    "work, seconds",
    [
        (dict(read=400), 4.0),
        (dict(read=400, written=40), 4.4),
        (dict(read=400, written=80), 6.0),
        (dict(read=400, flops=3999), 4.0),
        (dict(read=400, flops=8000), 8.0),
        (dict(read=400, flops=8000, dtype="bfloat16"), 4.0),
    ],
)
def test_the_floor_is_what_the_machine_needs_at_least(work, seconds):
    assert report.floor(row([1.0], **work), RATES) == pytest.approx(seconds)
    assert report.roofline(row([16.0, 8.0, 1.0], **work), RATES) == pytest.approx(seconds / 8)
    assert report.roofline(row("not here", jnp="neither", **work), RATES) is None


def test_the_matrix_rate_is_at_least_the_fastest_contenders():
    assert harness.achieved(row([4.0, 2.0], flops=100, peer=[1.0, 5.0], absent="not here")) == {"float32": 100}
    assert harness.achieved(row("wrong", flops=100)) == {}


def test_rows_slower_than_the_fastest_peer_are_listed():
    rows = [
        row([2.0, 2.0], near=[2.2, 2.2], best=[1.0, 1.6], far=[9.0, 9.0]),
        row([1.0, 1.0], best=[1.1, 1.1]),
        dict(row([2.0], best=[3.0], other="wrong"), contenders={OURS: dict(times=[2.0]), GREEDY: dict(times=[1.0])}),
    ]
    assert report.slower_than_best_peer(rows) == [(rows[0], "best", pytest.approx(0.65))]
    assert "1 of 3 cases" in report.losses(rows) and "best 1.54x faster than ours" in report.losses(rows)
    assert report.losses(rows[1:]) == "No case is slower than its fastest peer.\n"
    other = row([2.0]) | dict(contenders={name: dict(times=[1.0]) for name in (PACKED, FROM_TORCH)} | {OURS: dict(times=[2.0])})
    assert report.slower_than_best_peer([other]) == []


# torch.compile may have been the fastest where it did not run, but not in an operation in which it never is a peer.
def test_cases_without_torch_compile_are_counted():
    rows = [row([1.0], torch=[2.0]), row([1.0], torch=[0.5]), dict(row([1.0]), operation="experts")]
    assert "torch.compile" not in report.losses(rows)
    rows.append(row([1.0], **{"torch.compile": [2.0]}))
    assert report.losses(rows).endswith("\n2 of the 3 cases of attention were not run with torch.compile.\n")
    assert report.losses(rows[2:]) == "No case is slower than its fastest peer.\n"


# A peer that is said to be wrong is compared with nothing: then it may be ours that is.
def test_wrong_results_are_told_before_who_is_slower():
    text = report.losses([row([1.0], peer="wrong: differs by 0.5, more than 0.1")])
    assert text.startswith("WRONG") and "- attention, a: peer: wrong: differs by 0.5" in text


def test_the_exponent_of_a_sweep_is_that_of_its_medians():
    rows = [dict(row([n**1.5, n**1.5, 9e9], peer=[3.0]), sweep=["length", n]) for n in (16, 1, 4)]
    [(_, axis, curves)] = report.sweeps(rows)
    points, times, exponent = curves[OURS]
    assert axis == "length" and points == (1, 4, 16) and times == (1, 8, 64)
    assert exponent == pytest.approx(1.5) and curves["peer"][2] == pytest.approx(0)
    # Two points say how much more, and no power.
    assert report.sweeps(rows[:2])[0][2][OURS][2] is None and f"| {OURS} 64.00x, peer 1.00x |" in report.scaling(rows[:2])


def test_a_pass_of_all_layers_is_extrapolated_from_those_measured():
    parts = dict(layers=0.3, head=0.2, unmask=0.1)
    of = dict(body="LLaDA-8B", block=32, layers=2, whole=8)
    rows = [dict(row([time]), component=dict(of, part=part)) for part, time in parts.items()]
    cells = report.passes(rows).splitlines()[2]
    assert "1.5 s (extrapolated from 2 of 8) | 80% | 5.33 |" in cells


# What ran somewhere is not missing, whatever it was that did not run elsewhere; a run of a part changes nothing else.
def test_who_is_missing_is_what_the_rows_say():
    here, there = row([1.0], peer="not installed", other="no GPU"), row([1.0], peer=[2.0], other="no GPU")
    assert "Missing: peer (not installed)" in report.head(result(here))
    assert "Missing: other (no GPU)." in report.head(result(here, there)) and "peer" not in report.head(result(here, there))
    assert "- peer: not installed (attention, 0)" in report.absences(result(here, there)["rows"])


# Of runs of one process each the rank test alone: how far runs differ is another's test.
compare = functools.partial(comparison.compare, least=0.03)
SEVEN = [1.0, 1.02, 0.98, 1.01, 0.99, 1.0, 1.03]


@pytest.mark.parametrize(
    "ours, theirs, status, words",
    [
        ([1.5 * t for t in SEVEN], [2.0] * 7, 1, "SLOWER by 50.0% (against peer)"),
        ([0.5 * t for t in SEVEN], [2.0] * 7, 0, "faster by 50.0% (against peer)"),
        # The same, on a machine half as fast.
        ([2 * t for t in SEVEN], [4.0] * 7, 0, "1 compared: 1 without a change beyond noise"),
        # As slow, but in one round in either file.
        ([1.5] * 6 + [0.9], [2.0] * 7, 0, "without a change"),
        ([1.5] * 5 + [1.015, 9.0], [2.0] * 7, 1, "SLOWER"),
        ([1.5, 1.5], [2.0, 2.0], 3, "+50.0% (against peer), of too few rounds to tell noise, 7 and 2\n1 compared: 1 of too few"),
        # A peer timed once is no measure; our time is.
        ([1.5 * t for t in SEVEN], [9.0], 1, "SLOWER by 50.0% (time)"),
        ("it failed", [2.0] * 7, 1, "ours ran only before (it failed)"),
    ],
)
def test_compare_tells_what_changed_beyond_noise(ours, theirs, status, words):
    before, after = row(SEVEN, peer=[2.0] * 7), row(ours, peer=theirs)
    text, found = compare(result(before), result(after))
    assert words in text and found == status


# Both sides' times scatter by 10%, by chance, and some are a neighbour's burst, of twice the time: of 1000 such rows, of which all
# or none are slower in the second file.
@pytest.mark.parametrize("rounds, bursts, scale, least", [(7, 0, 1.5, 980), (7, 0.1, 3, 980), (12, 0, 1.5, 990), (12, 0.1, 2, 900)])
def test_noise_is_seldom_called_a_change_and_a_change_seldom_noise(rounds, bursts, scale, least):
    rng = np.random.default_rng(0)

    def rows(scale):
        times = rng.lognormal(0, 0.1, (1000, rounds)) * np.where(rng.random((1000, rounds)) < bursts, 2, 1)
        return result(*(row(list(each)) for each in scale * times))

    before, same, slower = rows(1.0), rows(1.0), rows(scale)
    text, _ = compare(before, same)
    assert len(text.splitlines()) - 1 <= 8
    text, status = compare(before, slower)
    assert text.count("SLOWER") >= least and status == 1


def test_chance_is_how_often_orders_are_so_far_apart():
    values = [[i in chosen for i in range(7)] for chosen in itertools.combinations(range(7), 3)]
    pairs = [
        comparison._out_of_order([i for i in range(7) if own[i]], [i for i in range(7) if not own[i]]) for own in values
    ]
    for few in range(6):
        assert comparison._chance(3, 4, few) == pytest.approx(sum(each <= few for each in pairs) / len(pairs))
    assert comparison._chance(21, 20, 130) == pytest.approx(0.037, abs=1e-3)  # of many the normal distribution


def test_a_small_change_is_none_however_sure():
    def file(time):
        return result(row([time] * 9), row([1.0] * 9))

    assert compare(file(1.0), file(1.02)) == ("2 compared: 2 without a change beyond noise", 0)
    text, status = compare(file(1.0), file(1.04))
    assert text.splitlines()[0] == "attention, 0: SLOWER by 4.0% (time)" and status == 1


# As ratios of peers whose code has not changed do from run to run.
def test_what_runs_of_one_commit_may_differ_by_is_no_change(capsys, tmp_path):
    for name, time in (("before", 1.0), ("slower", 1.45), ("faster", 0.7), ("much slower", 1.55), ("much faster", 0.6)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(row([time] * 9))))

    def said(name, *options):
        status = command.main(["compare", *options, str(tmp_path / "before.json"), str(tmp_path / f"{name}.json")])
        return capsys.readouterr().out.splitlines(), status

    for name in ("slower", "faster"):
        lines, status = said(name)
        assert (lines[0], status) == ("1 compared: 1 without a change beyond noise", 0)
        assert "less than 50% is no change" in lines[1]
    assert said("much slower")[1] == 1 and "faster by 40.0%" in said("much faster")[0][0]
    lines, status = said("slower", "--least", "0.03")
    assert "SLOWER by 45.0%" in lines[0] and status == 1 and "less than 3%" in lines[-1]


# Those of ours that are no peers are compared too: what became slower from torch is slower.
def test_compare_takes_the_fastest_peer_of_before_that_is_not_ours_too():
    def file(scale, fast, from_torch):
        times = dict(slow=[3.0] * 7, fast=[fast] * 7) | {"ours,_from_torch": [from_torch] * 7}
        return result(row([scale] * 7, **times))

    def compared(after):
        return compare(file(1.0, 2.0, 1.5), after)[0].splitlines()[:-1]

    early = result(row([1.5] * 7, slow=[3.0] * 7, fast=[2.0] * 2))
    assert compared(early) == ["attention, 0: SLOWER by 50.0% (against slow)"]
    assert compared(file(1.5, 2.0, 1.5)) == ["attention, 0: SLOWER by 50.0% (against fast)"]
    assert compared(file(1.0, 4.0, 3.0)) == ["attention, 0: faster by 50.0% (against fast)"]
    assert compared(file(1.0, 2.0, 3.0)) == ["attention, 0: SLOWER by 100.0% (against fast, ours, from torch)"]


def test_compare_tells_which_rows_are_in_one_file_alone():
    one, two = result(row([1.0] * 7)), result(row([1.0] * 7), row([1.0] * 7))
    said = "attention, 1: not in both\n2 compared: 1 without a change beyond noise, 1 in one file alone"
    assert compare(one, two) == compare(two, one) == (said, 0)


# Rows that a run of a part has left in the file are not of its commit, its packages or its ceilings.
def test_the_head_says_of_each_run_what_it_had():
    old = dict(row([1.0]), run="2026-01-01 10:00", commit="aaa", versions=dict(jax="1"), rates=dict(RATES, read=50e9))
    new = dict(row([1.0]), run="2026-02-02 11:00", commit="bbb", versions=dict(jax="2", torch="3"), rates=dict(RATES, read=60e9))
    text = report.head(result(old, new, new))
    assert "1 case of the run of 2026-01-01 10:00, commit aaa: jax 1. Ceilings: read 50.0 GB/s" in text
    assert "2 cases of the run of 2026-02-02 11:00, commit bbb: jax 2, torch 3. Ceilings: read 60.0 GB/s" in text


@pytest.fixture
def measured(monkeypatch):
    """suite.run of 40 cases, whose measures are made up and take a minute; the seconds that each was given, and what ours is said
    to be.
    """

    def measure(case, seconds, quick):
        given[case.name] = seconds
        clock[0] += 60
        made = row(ours.get(case.name, [1.0]), flops=9000 * (case.name == "x1"), jnp=theirs.get(case.name, [2.0]))
        del made["rates"]
        if case.name == "y9":  # on a part of the processors
            made["rates"] = dict(RATES, read=1.0)
        return dict(made, operation=case.operation, case=case.name)

    def case(i):
        return Case("attention", f"{'x' if i < 2 else 'y'}{i}", None, {}, read=1, headline=i == 5, full=i == 3)

    given, ours, theirs, clock, module = {}, {}, {}, [0.0], type(sys)("bench.attention")
    module.cases = lambda: [case(i) for i in range(40)]
    monkeypatch.setattr(suite, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(suite, "OPERATIONS", [module])
    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(machine, "rates", lambda: RATES)
    return given, ours, theirs


# Of one case alone: the best of several looks, which its row has.
def test_a_part_of_a_run_measures_its_ceilings_several_times(measured, monkeypatch, tmp_path):
    looks = iter((5.0, 6.0, 8.0, 7.0))
    monkeypatch.setattr(machine, "rates", lambda: dict(RATES, read=next(looks)))
    suite.run(None, "x0", None, tmp_path / "results.json")
    (found,) = report.load(tmp_path / "results.json")["rows"]
    assert found["rates"]["read"] == 8.0 and next(looks, None) is None


# What another run has compiled would be in no first call.
def test_a_run_has_compilers_caches_of_its_own(measured, monkeypatch, tmp_path):
    names, seen = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), []
    for name in names:
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(machine, "rates", lambda: seen.append([os.environ[name] for name in names]) or RATES)
    for _ in range(2):
        suite.run(None, "x0", None, tmp_path / "results.json")
    assert len({*seen[0], *seen[-1], str(tmp_path)}) == 5 and [os.environ[name] for name in names] == [str(tmp_path)] * 2
    assert not any(map(os.path.exists, seen[0]))


@pytest.mark.parametrize("name", ["file/results.json", "folder.json"])
def test_a_run_that_could_write_nothing_times_nothing(measured, capsys, tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(SystemExit) as ended:
        command.main(["--out", str(tmp_path / name)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and f"--out: {tmp_path / name}: " in error and not measured[0]


# Two cases of the 39 without the large one: rounds of as long as in the whole run, unless they were given time of their own.
@pytest.mark.parametrize("minutes, most", [(None, 0.3 * 14 * 60 / 39), (20.0, 0.3 * 20 * 60 / 2)])
def test_a_part_of_a_run_takes_a_part_of_its_time(measured, tmp_path, minutes, most):
    given, *_ = measured
    assert suite.run(None, "attention X", minutes, tmp_path / "results.json") == 0
    assert [*given] == ["x0", "x1"] and given["x0"] == pytest.approx(most)


# What compiling and checking took, a minute a case here, is not there for rounds.
def test_a_run_ends_when_its_time_is_up_and_begins_with_what_the_readme_shows(measured, capsys, tmp_path):
    given, *_ = measured
    assert suite.run("full", None, 10.5, tmp_path / "results.json") == 0
    assert [*given] == ["y5", "x0", "x1", "y2", "y4", "y6", "y7", "y8", "y9", "y10", "y11"]
    assert given["y5"] == pytest.approx(0.3 * 630 / 40) and given["x0"] == 0.5
    assert capsys.readouterr().out.count("left out, the time is up") == 29
    suite.run("full", None, 60, tmp_path / "results.json")
    assert [*given][-1] == "y3"


# The best that was reached holds for all but for what has only a part of the processors.
def test_ceilings_are_the_runs_best(measured, tmp_path):
    for part in ("x", "y9"):
        suite.run(None, part, None, tmp_path / "results.json")
    rates = {each["case"]: each["rates"] for each in report.load(tmp_path / "results.json")["rows"]}
    assert rates == {"x0": dict(RATES, float32=9000), "x1": dict(RATES, float32=9000), "y9": dict(RATES, read=1.0)}


def test_a_run_keeps_the_rows_that_it_does_not_measure(measured, tmp_path):
    _, ours, _ = measured
    out = tmp_path / "results.json"
    gone = dict(row([9.0]), case="a case of before")
    out.write_text(json.dumps(dict(machine={}, rows=[gone])))
    for name, time in (("x", 1.0), ("y7", 2.0), ("x1", 3.0)):
        ours |= {case: [time] for case in ("x0", "x1", "y7")}
        assert suite.run(None, name, None, out) == 0
    found = [(each["case"], each["contenders"][OURS]["times"]) for each in report.load(out)["rows"]]
    assert sorted(found) == [("x0", [1.0]), ("x1", [3.0]), ("y7", [2.0])]


# What our kernel says that it does not take, the package's plain version computes.
@pytest.mark.parametrize(
    "missing, status",
    [
        ("wrong: differs by 0.5, more than 0.1", 1),
        ("ValueError: implementation='triton' cannot run attention: it takes masks as key intervals only", 0),
    ],
)
def test_a_run_fails_where_ours_is_wrong(measured, capsys, tmp_path, missing, status):
    measured[1]["x1"] = missing
    assert suite.run(None, "x", None, tmp_path / "results.json") == status
    said = capsys.readouterr().out
    assert ("FAILED, 1:" in said and said.splitlines()[-1] == f"attention: x1: dlm_kernels: {missing}") == bool(status)


def test_a_run_that_is_stopped_writes_its_table(measured, monkeypatch, tmp_path):
    before, measure = signal.getsignal(signal.SIGTERM), harness.measure

    def stopped(case, *how):
        return os.kill(os.getpid(), signal.SIGTERM) if case.name == "x1" else measure(case, *how)

    monkeypatch.setattr(harness, "measure", stopped)
    try:
        with pytest.raises(SystemExit, match="143"):
            suite.run(None, "x", None, tmp_path / "results.json")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "| x0 |" in (tmp_path / "results.md").read_text()


# Which of the two is wrong, nobody knows.
def test_a_run_fails_where_a_peer_is_wrong(measured, tmp_path):
    measured[2]["x1"] = "wrong: differs by 0.5, more than 0.1"
    assert suite.run(None, "x", None, tmp_path / "results.json") == 1
    measured[2]["x1"] = "not installed"
    assert suite.run(None, "x", None, tmp_path / "results.json") == 0


def test_the_help_starts_nothing():
    look = "import sys, bench.__main__; print(*{'jax', 'numpy', 'libtpu', 'torch'} & sys.modules.keys())"
    made = subprocess.run([sys.executable, "-c", look], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--minutes", "0"], "--minutes: expected more than 0, got 0"),
        (["--minutes", "nan"], "--minutes: expected more than 0, got nan"),
        (["--out", "results"], "--out: expected a name that ends in .json, got 'results'"),
        (["--only", "no such case"], "--only: expected a part of a case's operation and name, got 'no such case'"),
        (["--only", "attention", "readme"], "--only: readme takes none before its name"),
        (["--quick", "tune"], "--quick: tune takes none before its name"),
        (["tune", "--only", "nothing"], "--only: expected a part of one of "),
        (["report", "results.md"], "file: expected a name that ends in .json, got 'results.md'"),
        (["report", "no-such.json"], "no-such.json: No such file or directory"),
    ],
)
def test_a_bad_command_line_is_told_in_one_line(capsys, arguments, words):
    if arguments[0] == "tune":
        pytest.importorskip("pybind11")
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_tune_names_the_package_that_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(machine, "platform_name", lambda: "cpu")
    monkeypatch.setattr(machine, "why_missing", lambda package: f"the Python package {package} is not installed")
    with pytest.raises(SystemExit) as ended:
        command.main(["tune", "--build"])
    assert ended.value.code == 2 and "tune: the Python package pybind11 is not installed" in capsys.readouterr().err


def without(result, field):
    result = copy.deepcopy(result)
    del result["rows"][-1][field]
    return result


GOOD = result(row([1.0] * 7, peer="not here"), row([1.0] * 7))


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is no JSON"),
        (json.dumps(GOOD)[:-9], "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        ("[]", "JSON without rows"),
        (json.dumps(dict(GOOD, rows=[])), "JSON without rows"),
        (json.dumps(dict(rows=GOOD["rows"])), "got no machine"),
        (json.dumps(without(GOOD, "contenders")), "expected contenders in every row, got none in rows[1]"),
        (json.dumps(result(row([1.0], dtype="float16"))), "expected rates above 0, got None of float16 in rows[0]"),
        (json.dumps(result(row([1.0]) | dict(rates=dict(RATES, copy=0)))), "expected rates above 0, got 0 of copy in rows[0]"),
        (json.dumps(result(row([]))), "got [] of dlm_kernels in rows[0]"),
        (json.dumps(result(row([1.0], peer=[1.0, 0.0]))), "got [1.0, 0.0] of peer in rows[0]"),
    ],
)
def test_a_damaged_results_file_is_told_in_one_line(capsys, tmp_path, text, words):
    path, good = tmp_path / "a.json", tmp_path / "good.json"
    good.write_text(json.dumps(GOOD))
    assert command.main(["compare", str(good), str(good)]) == 0
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command.main(["compare", str(good), str(path)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and str(path) in error and words in error
