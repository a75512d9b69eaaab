"""Results files as tables, and the README's block."""

import json
import math
import os
import re
import statistics
from pathlib import Path

from bench import machine, tpu_report
from bench.harness import NO_PEERS, OURS, PACKED, WRONG

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- results: written by python -m bench readme -->", "<!-- end of results -->"


def replace(path, text):
    """The file whole: a run killed while it writes leaves the one of before."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


class Unusable(ValueError):
    """What the user gave, a file or a name, says what is wrong with it in one line."""


FIELDS = {"operation", "case", "read", "written", "flops", "dtype", "sweep", "tokens", "headline", "component", "contenders"}
FIELDS |= {"commit", "rates"}
RATES = {"read", "copy", "float32", "bfloat16"}


def read(path):
    """A file of rows, of the benchmarks or of the static cycles."""
    try:
        result = json.loads(Path(path).read_text())
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from None
    except ValueError as error:  # no JSON, or no text
        raise Unusable(f"{path}: expected the results of a run, got what is no JSON: {error}") from None
    rows = result.get("rows") if isinstance(result, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise Unusable(f"{path}: expected the results of a run, got JSON without rows")
    return result


def load(path):
    """A file of the benchmarks' results, all of whose rows can be shown and compared."""
    result = read(path)
    if not isinstance(result.get("machine"), dict):
        raise Unusable(f"{path}: expected the results of python -m bench, got no machine")
    for i, row in enumerate(result["rows"]):
        if lacking := FIELDS - row.keys():
            raise Unusable(f"{path}: expected {', '.join(sorted(lacking))} in every row, got none in rows[{i}]")
        rates = row["rates"] if isinstance(row["rates"], dict) else {}
        for name in sorted(RATES | {row["dtype"]}):
            if not (isinstance(rates.get(name), int | float) and rates[name] > 0):
                raise Unusable(f"{path}: expected rates above 0, got {rates.get(name)} of {name} in rows[{i}]")
        for name in (OURS, *row["contenders"]):
            each = row["contenders"].get(name, {})
            times = each.get("times")
            if "missing" not in each and not (times and all(isinstance(t, int | float) and t > 0 for t in times)):
                raise Unusable(f"{path}: expected times above 0 or why there are none, got {times} of {name} in rows[{i}]")
    return result


def base(row):
    """Who the ratios are against: our kernel, or where it did not run the package's plain version, which runs in its place."""
    plain = (name for name in row["contenders"] if name.startswith("jnp"))
    return OURS if row["contenders"][OURS].get("times") else next(plain, OURS)


def ratios(row, peer, own=None):
    """Peer's time over ours, or over that of `own`, in every round that both were in: above 1 we are faster."""
    ours, theirs = (row["contenders"][name].get("times", []) for name in (own or base(row), peer))
    if not ours or not theirs:
        return []
    # A contender that was timed once has no rounds of its own; its one time is set against each of the other's.
    n = max(len(ours), len(theirs))
    ours, theirs = (times * n if len(times) == 1 else times for times in (ours, theirs))
    return [b / a for a, b in zip(ours, theirs)]


def peers_of(row):
    return [name for name in row["contenders"] if name not in (OURS, base(row))]


def floor(row, rates):
    """Seconds that the machine needs at least: its bytes at the bandwidth measured, or its products at the matrix rate."""
    bandwidth = rates["copy" if 10 * row["written"] > row["read"] else "read"]
    return max((row["read"] + row["written"]) / bandwidth, row["flops"] / rates[row["dtype"]])


def roofline(row, rates):
    """The share of the floor in the median time, or None."""
    times = row["contenders"][base(row)].get("times")
    return floor(row, rates) / statistics.median(times) if times else None


def line(row, rates):
    """One row for a person who watches."""
    parts = [f"{row['operation']}: {row['case']}:"]
    for name, result in row["contenders"].items():
        if "missing" in result:
            parts.append(f"{name} missing ({result['missing']})")
            continue
        peer = f" ({statistics.median(ratios(row, name)):.2f}x)" if name != base(row) and ratios(row, name) else ""
        parts.append(f"{name} {_seconds(statistics.median(result['times']))}{peer}")
    share = roofline(row, rates)
    return parts[0] + " " + ", ".join(parts[1:]) + ("" if share is None else f"; {share:.0%} of roofline")


def table(rows):
    """Markdown: time (median, min to max), each peer's time over ours, share of the roofline, peak memory."""
    lines = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        group = [row for row in rows if row["operation"] == operation]
        names = list(dict.fromkeys(name for row in group for name in peers_of(row)))
        decodes = any(row["tokens"] for row in group)
        packed = PACKED in names
        titles = ["case", "time", *(f"{name} / ours" for name in names), "roofline", "memory: ours, jnp" + ", packed" * packed]
        lines += ["", f"### {operation}", ""] + _header(titles + ["tokens/s"] * decodes)
        for row in group:
            ours, jnp = (row["contenders"].get(name, {}) for name in (base(row), "jnp"))
            cells = [
                row["case"],
                _times(ours) + " (jnp)" * (base(row) != OURS),
                *(_ratio(row, name) for name in names),
                _share(row),
                ", ".join(map(_memory, [ours, jnp] + [row["contenders"].get(PACKED, {})] * packed)),
            ]
            lines.append(_cells(cells + [_speed(row) or "–"] * decodes))
    return "\n".join(lines[1:]) + "\n"


def headlines(rows):
    """Markdown: the few cases that tell most, each with all of its peers in one cell."""
    lines = _header(["", "case", "time", "a peer's time / ours", "roofline"])
    for row in rows:
        if row.get("headline"):
            against = ", ".join(f"{name} {_ratio(row, name)}" for name in peers_of(row) if ratios(row, name))
            time = _times(row["contenders"][base(row)]) + (f", {speed} tokens/s" if (speed := _speed(row)) else "")
            lines.append(_cells([row["operation"], row["case"], time, against, _share(row)]))
    return "\n".join(lines) + "\n"


def compiling(rows):
    """Markdown: what the first call costs: JAX compiles before it, torch within it, and eager torch not at all. A packed weight is
    laid out once before all calls.
    """
    rows = [row for row in rows if not row["sweep"] and any("compile" in result for result in row["contenders"].values())]
    known = {name for row in rows for name in row["contenders"]}
    names = [name for name in (OURS, PACKED, "jnp", "torch.compile", "FlexAttention") if name in known]
    lines = _header(["", "case", *(f"{name}: {'packing + ' * (name == PACKED)}compile + first call" for name in names)])
    for row in rows:
        cells = [_first_call(row["contenders"].get(name, {})) for name in names]
        lines.append(_cells([row["operation"], row["case"], *cells]))
    return "\n".join(lines) + "\n"


def sweeps(rows):
    """[(operation, axis, {contender: (points, seconds, exponent)})]: of the power that fits best; None of two points."""
    found = []
    for operation, axis in dict.fromkeys((row["operation"], row["sweep"][0]) for row in rows if row["sweep"]):
        group = [row for row in rows if row["sweep"] and (row["operation"], row["sweep"][0]) == (operation, axis)]
        curves = {}
        for name in dict.fromkeys(name for row in group for name in row["contenders"]):
            points = sorted(
                (row["sweep"][1], statistics.median(times))
                for row in group
                if (times := row["contenders"].get(name, {}).get("times"))
            )
            if len(points) > 1:
                x, y = zip(*points)
                fit = statistics.linear_regression([*map(math.log, x)], [*map(math.log, y)]) if len(points) > 2 else None
                curves[name] = x, y, fit and fit.slope
        if curves:
            found.append((operation, axis, curves))
    return found


def scaling(rows):
    """Markdown: the exponent of each sweep by least squares of the logarithms: 1 is cost in proportion, 0 is none."""
    lines = _header(["", "axis", "points", "cost in proportion to the axis to the power; of two points, the second over the first"])
    for operation, axis, curves in sweeps(rows):
        points = next(iter(curves.values()))[0]
        fits = ", ".join(
            f"{name} {f'{y[-1] / y[0]:.2f}x' if exponent is None else f'{exponent:.2f}'}"
            + f" ({len(x)} points)" * (len(x) != len(points))
            for name, (x, y, exponent) in curves.items()
        )
        lines.append(_cells([operation, axis, " ".join(map(str, points)), fits]))
    return "\n".join(lines) + "\n"


def passes(rows):
    """Markdown: where a pass's time goes, and what a pass of all layers would take, were the others like those measured."""
    lines = _header(["one pass of", "layers", "head", "unmask", "all layers", "share of the layers", "tokens/s at 8 tokens a pass"])
    parts = {}
    for row in rows:
        if (part := row.get("component")) and (times := row["contenders"][base(row)].get("times")):
            parts.setdefault(part["body"], {})[part["part"]] = statistics.median(times), part
    for body, found in parts.items():
        if len(found) < 3:
            continue
        (layers, part), (head, _), (unmask, _) = (found[name] for name in ("layers", "head", "unmask"))
        scale = part["whole"] / part["layers"]
        total = scale * layers + head + unmask
        measured = f"extrapolated from {part['layers']} of {part['whole']}" if scale > 1 else "measured"
        cells = [f"{body}, {part['block']} tokens", *map(_seconds, (layers, head, unmask)), f"{_seconds(total)} ({measured})"]
        lines.append(_cells([*cells, f"{scale * layers / total:.0%}", f"{8 / total:.3g}"]))
    return "\n".join(lines) + "\n"


def _header(titles):
    return [_cells(titles), "|---" * len(titles) + "|"]


def _cells(texts):
    return "| " + " | ".join(texts) + " |"


def _first_call(result):
    if "compile" not in result:
        return "–"
    return " + ".join(_seconds(result[part]) for part in ("once", "compile", "first_call") if part in result)


def _share(row):
    share = roofline(row, row["rates"])
    return "–" if share is None else f"{share:.0%}"


def _speed(row):
    """Tokens/s of ours, or None."""
    times = row["contenders"][base(row)].get("times")
    return f"{row['tokens'] / statistics.median(times):.3g}" if times and row["tokens"] else None


def _times(result):
    times = result.get("times")
    if not times:
        return "–"
    return f"{_seconds(statistics.median(times))} ({_seconds(min(times))} to {_seconds(max(times))}){_start(result)}"


def _start(result):
    """Of an accelerator: the kernel itself may be faster than so short a time says."""
    return " (start)" if result.get("start", 0) > 0.8 * statistics.median(result["times"]) else ""


def _ratio(row, name):
    values = ratios(row, name) if name in row["contenders"] else []
    return f"{statistics.median(values):.2f}x{_start(row['contenders'][name])}" if values else "–"


def _memory(result):
    size = result.get("peak_bytes")
    return "–" if size is None else f"{size / 2**20:.0f} MiB"


def _seconds(t):
    unit, scale = next((u, s) for u, s in (("s", 1), ("ms", 1e3), ("us", 1e6)) if t * s >= 1 or u == "us")
    return f"{t * scale:.3g} {unit}"


def slower_than_best_peer(rows):
    """(row, peer, ratio) where the fastest peer beats us."""
    found = []
    for row in rows:
        peers = [name for name in peers_of(row) if name not in NO_PEERS]
        medians = {name: statistics.median(r) for name in peers if (r := ratios(row, name))}
        if medians and (best := min(medians, key=medians.get)) and medians[best] < 1:
            found.append((row, best, medians[best]))
    return found


def losses(rows):
    """Every row that is slower than its fastest peer; before them those in which somebody is wrong, who then is in no ratio."""
    lines = [
        f"- {row['operation']}, {row['case']}: {name} {1 / ratio:.2f}x faster than ours"
        for row, name, ratio in slower_than_best_peer(rows)
    ]
    wrong = [
        f"- {row['operation']}, {row['case']}: {name}: {result['missing']}"
        for row in rows
        for name, result in row["contenders"].items()
        if result.get("missing", "").startswith(WRONG)
    ]
    told = f"WRONG, and so not compared, {len(wrong)}:\n\n" + "\n".join(wrong) + "\n\n" if wrong else ""
    if not lines:
        return told + f"No case is slower than its fastest peer.{_not_compiled(rows)}\n"
    found = f"Slower than the fastest peer, {len(lines)} of {len(rows)} cases:\n\n" + "\n".join(lines) + "\n"
    return told + found + (f"\n{said.strip()}\n" if (said := _not_compiled(rows)) else "")


def _not_compiled(rows):
    """Where torch.compile ran in some cases of an operation, in how many others it might have been the fastest."""
    ran = [(row["operation"], "times" in row["contenders"].get("torch.compile", {})) for row in rows]
    operations = dict.fromkeys(operation for operation, compiled in ran if compiled)
    without = [compiled for operation, compiled in ran if operation in operations].count(False)
    every = sum(operation in operations for operation, _ in ran)
    names = ", ".join(operations)
    return f" {without} of the {every} cases of {names} were not run with torch.compile." if without else ""


def absences(rows):
    """Who is missing in which cases, and why; who gave a wrong result is, too."""
    reasons = {}
    for row in rows:
        for name, result in row["contenders"].items():
            if "missing" in result:
                reasons.setdefault((name, result["missing"]), []).append(f"{row['operation']}, {row['case']}")
    lines = [
        f"- {name}: {reason} ({cases[0]}{f' and {len(cases) - 1} more' if len(cases) > 1 else ''})"
        for (name, reason), cases in reasons.items()
    ]
    return "Not measured:\n\n" + "\n".join(lines) + "\n" if lines else "Every peer ran in every case.\n"


def nowhere(rows):
    """{reason: names} of who was measured in no row at all."""
    ran = {name for row in rows for name, result in row["contenders"].items() if "missing" not in result}
    reasons = {}
    for row in rows:
        for name, result in row["contenders"].items():
            if name not in ran:
                reasons.setdefault(result["missing"], {})[name] = None
    return reasons


def runs(result):
    """{(when, commit): its rows}: a run of a part leaves the rows of before in the file."""
    found = {}
    for row in result["rows"]:
        found.setdefault((row.get("run"), row["commit"]), []).append(row)
    return found


def head(result):
    about, rows = result["machine"], result["rows"]
    plain = any(base(row) != OURS for row in rows)
    several = runs(result)
    return (
        f"{about['kind']}, {about['threads']} threads.\n"
        + "".join(_run(about, when, commit, some, len(several) > 1) for (when, commit), some in several.items())
        + "Times marked (jnp): our kernel did not run, and the package's plain XLA path stands in its place.\n" * plain
        + "".join(f"Missing: {', '.join(names)} ({reason}).\n" for reason, names in nowhere(rows).items())
    )


def _run(about, when, commit, rows, several):
    """What one run had and reached. Ceilings are the greatest of its rows': only a part of the processors has lower ones."""
    versions = rows[0].get("versions", about["versions"])
    rates = {name: max(row["rates"][name] for row in rows) for name in rows[0]["rates"]}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    name = f"the run of {when}, commit {commit}" if when else f"commit {commit}"
    return (
        f"{'' if several else 'All '}{len(rows)} case{'s' * (len(rows) > 1)} of {name}: {packages}. "
        f"Ceilings: read {rates['read'] / 1e9:.1f} GB/s, copy {rates['copy'] / 1e9:.1f} GB/s, "
        f"products float32 {rates['float32'] / 1e9:.0f} and bfloat16 {rates['bfloat16'] / 1e9:.0f} GFLOP/s.\n"
    )


def write(path):
    """The Markdown table and the plots beside a results file; returns what it wrote the table to."""
    from bench import plots

    path = Path(path)
    result = load(path)
    names = plots.draw(result, path.with_suffix(""))
    path.with_suffix(".md").write_text(page(path.stem, result, names))
    return path.with_suffix(".md")


def page(name, result, plots):
    images = "".join(f"![{plot}]({name}/{plot}.svg)\n" for plot in plots)
    rows = result["rows"]
    return (
        f"# {name}\n\n{head(result)}\n{table(rows)}\n"
        f"## Slower than a peer, or without one\n\n{losses(rows)}\n{absences(rows)}\n"
        f"## Where a pass's time goes\n\n{passes(rows)}\n"
        f"## Cost against size\n\n{scaling(rows)}\n## The first call\n\n{compiling(rows)}\n{images}"
    )


def readme_block():
    """The README's results: for each results file the headlines, where we lose, and a link to all the rest. Of several devices of
    one kind the fastest is shown, the others are there to unfold.
    """
    kinds = {}
    for path in sorted(RESULTS.glob("*.json")):
        if not (path.stem.endswith("-quick") or path.stem.startswith("tpu-static-")):
            result = load(path)
            kinds.setdefault(result["machine"]["kind"], []).append((path.stem, result))
    parts = [BEGIN]
    for devices in kinds.values():
        (name, fastest), *others = sorted(devices, key=lambda device: -device[1]["rows"][0]["rates"]["bfloat16"])
        parts.append(_device(name, fastest))
        parts += [f"<details><summary>{name}</summary>\n\n{_device(name, each)}\n</details>\n" for name, each in others]
    return "\n".join([*parts, tpu_report.readme(RESULTS), END])


def _device(name, result):
    rows = result["rows"]
    rest = f"All {len(rows)} cases, with memory, plots and the cost of the first call: [{name}](bench/results/{name}.md)\n"
    return "\n".join([head(result), headlines(rows), losses(rows), rest])


def rewrite_readme():
    path = machine.ROOT / "README.md"
    text = path.read_text()
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit(f"{path.name}: expected the lines {BEGIN!r} and {END!r}")
    path.write_text(re.sub(pattern, lambda _: readme_block(), text, flags=re.DOTALL))
