"""Results files as tables, the README's block, and the comparison of two of them."""

import json
import re
import statistics
from pathlib import Path

from bench import machine
from bench.harness import OURS

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- results: written by python -m bench readme -->", "<!-- end of results -->"


def load(path):
    return json.loads(Path(path).read_text())


def base(row):
    """Who the ratios are against: our kernel, or where it did not run the package's plain version, which runs in its place."""
    return OURS if row["contenders"][OURS].get("times") else "jnp"


def ratios(row, peer):
    """Peer's time over ours in every round: above 1 we are faster."""
    ours, theirs = (row["contenders"][name].get("times", []) for name in (base(row), peer))
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


def table(rows, full=False):
    """Markdown: time (median, min to max), each peer's time over ours, share of the roofline, peak memory, first calls."""
    lines = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        group = [row for row in rows if row["operation"] == operation]
        names = list(dict.fromkeys(name for row in group for name in peers_of(row)))
        titles = ["case", "time", *(f"{name} / ours" for name in names), "roofline"]
        titles += ["tokens/s"] * (operation == "end_to_end")
        titles += ["memory, ours / jnp", "first call, ours / jnp"] * full
        lines += ["", f"### {operation}", "", _cells(titles), "|---" * len(titles) + "|"]
        for row in group:
            ours, jnp = (row["contenders"][name] for name in (base(row), "jnp"))
            share = roofline(row, row["rates"])
            cells = [
                row["case"],
                _times(ours) + " (jnp)" * (base(row) == "jnp"),
                *(_ratio(row, name) for name in names),
            ]
            cells += ["–" if share is None else f"{share:.0%}"]
            if operation == "end_to_end":
                times = ours.get("times")
                cells += [f"{row['tokens'] / statistics.median(times):.3g}" if times and row["tokens"] else "–"]
            if full:
                cells += [f"{_memory(ours)} / {_memory(jnp)}", f"{_first_call(ours)} / {_first_call(jnp)}"]
            lines.append(_cells(cells))
    return "\n".join(lines[1:]) + "\n"


def _cells(texts):
    return "| " + " | ".join(texts) + " |"


def _first_call(result):
    """Compiling included."""
    return _seconds(result["first_call"]) if "first_call" in result else "–"


def _times(result):
    times = result.get("times")
    if not times:
        return "–"
    return f"{_seconds(statistics.median(times))} ({_seconds(min(times))} to {_seconds(max(times))})"


def _ratio(row, name):
    values = ratios(row, name) if name in row["contenders"] else []
    return f"{statistics.median(values):.2f}x" if values else "–"


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
        medians = {name: statistics.median(r) for name in peers_of(row) if (r := ratios(row, name))}
        if medians and (best := min(medians, key=medians.get)) and medians[best] < 1:
            found.append((row, best, medians[best]))
    return found


def notes(rows):
    """What the table leaves out: who was missing or wrong, and where we lose."""
    lines = [
        f"- {row['operation']}, {row['case']}: {name} {1 / ratio:.2f}x faster than ours"
        for row, name, ratio in slower_than_best_peer(rows)
    ]
    text = (
        "Slower than the fastest peer:\n\n" + "\n".join(lines) + "\n"
        if lines
        else "No case is slower than its fastest peer.\n"
    )
    reasons = {}
    for row in rows:
        for name, result in row["contenders"].items():
            if "missing" in result:
                reasons.setdefault((name, result["missing"]), []).append(f"{row['operation']}, {row['case']}")
    if reasons:
        text += "\nNot measured:\n\n" + "\n".join(
            f"- {name}: {reason} ({cases[0]}{f' and {len(cases) - 1} more' if len(cases) > 1 else ''})"
            for (name, reason), cases in reasons.items()
        )
        text += "\n"
    return text


def head(result):
    about = result["machine"]
    rates = {name: max(row["rates"][name] for row in result["rows"]) for name in result["rows"][0]["rates"]}
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    commits = ", ".join(dict.fromkeys(row["commit"] for row in result["rows"]))
    plain = any(base(row) == "jnp" for row in result["rows"])
    return (
        f"{about['kind']}, {about['threads']} threads; {versions}; commit {commits}.\n"
        f"Measured in the same run: read {rates['read'] / 1e9:.1f} GB/s, copy {rates['copy'] / 1e9:.1f} GB/s, "
        f"products float32 {rates['float32'] / 1e9:.0f} and bfloat16 {rates['bfloat16'] / 1e9:.0f} GFLOP/s.\n"
        + "Times marked (jnp): our kernel did not run, and the package's plain jax.numpy version stands in its place.\n"
        * plain
        + "".join(f"Missing peer: {reason}.\n" for reason in result["missing"].values())
    )


def write(path):
    """The Markdown table and the plots beside a results file; returns what it wrote the table to."""
    from bench import plots

    path = Path(path)
    result = load(path)
    names = plots.draw(result, path.with_suffix(""))
    images = "".join(f"![{name}]({path.stem}/{name}.svg)\n" for name in names)
    text = f"# {path.stem}\n\n{head(result)}\n{table(result['rows'], full=True)}\n{notes(result['rows'])}\n{images}"
    path.with_suffix(".md").write_text(text)
    return path.with_suffix(".md")


def readme_block():
    """The README's results: for each results file the main cases, where we lose, and a link to all the rest."""
    parts = [BEGIN]
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem.endswith("-quick"):
            continue
        result = load(path)
        parts.append(
            f"{head(result)}\nRatios are the peer's time over ours in the same round, interleaved in one process.\n"
        )
        parts.append(table([row for row in result["rows"] if not row["sweep"]]))
        parts.append(notes(result["rows"]))
        parts.append(f"All cases, with plots: [{path.stem}](bench/results/{path.stem}.md)\n")
    return "\n".join([*parts, END])


def rewrite_readme(path=machine.ROOT / "README.md"):
    text = path.read_text()
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit(f"{path.name}: expected the lines {BEGIN!r} and {END!r}")
    path.write_text(re.sub(pattern, lambda _: readme_block(), text, flags=re.DOTALL))


def compare(before, after):
    """(text, whether something is slower): changes of our times beyond noise.

    The measure is our time over the fastest peer's of the same round, where both files have that peer, since that does not change
    when the machine is busy or another one; else our time itself. Beyond noise: the quartiles do not overlap, and by over 3%.
    """
    old = {(row["operation"], row["case"]): row for row in before["rows"]}
    lines, slower = [], False
    for row in after["rows"]:
        name = (row["operation"], row["case"])
        if name not in old or not (pair := _comparable(old[name], row)):
            lines.append(f"{', '.join(name)}: not in both")
            continue
        what, a, b = pair
        change = statistics.median(b) / statistics.median(a) - 1
        (a1, a3), (b1, b3) = _quartiles(a), _quartiles(b)
        if abs(change) > 0.03 and (b1 > a3 or b3 < a1):
            slower |= change > 0
            lines.append(f"{', '.join(name)}: {'SLOWER' if change > 0 else 'faster'} by {abs(change):.1%} ({what})")
    return "\n".join(lines) or "no change beyond noise", slower


def _comparable(old, new):
    shared = [name for name in peers_of(new) if name in old["contenders"] and ratios(old, name) and ratios(new, name)]
    if shared:
        best = max(shared, key=lambda name: statistics.median(1 / r for r in ratios(old, name)))
        return f"against {best}", [1 / r for r in ratios(old, best)], [1 / r for r in ratios(new, best)]
    times = [row["contenders"][base(row)].get("times") for row in (old, new)]
    return ("time", *times) if all(times) else None


def _quartiles(values):
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
