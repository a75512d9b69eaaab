"""Static cycles as text: a line for a person who watches, the table beside a chip's results file, and the README's."""

import json

from bench.harness import OURS

LIMITS = """Static: cycles are the bundles of the compiler's schedule, each as often as the program's scalar instructions run it.
They leave out waits for copies and what the hardware stalls on, so they are a lower bound. `copies` is what the bytes to and from
HBM take at its full bandwidth, which a good pipeline overlaps with the cycles: the larger of the two bounds the time. Nothing here
ran on a TPU. The cycles are one core's: v5p's two share a call. Of JAX's kernels the block sizes with the fewest cycles count, of
those tried. XLA's cycles are the sum of its fusions', those in a loop as often as it runs; copies that it makes between them are
not counted, nor what it has put into a core's memory before a kernel: a count of less than operands and results is refused, and
they bound the time in its place. So are cycles in which the products do not fit. `ours / it` is of the bounds. `MXU` is the share
of the cycles in which the matrix units are busy, then what the case's products alone would take of them: as long as the cycles at
100%. A branch that data decides counts as taken into its body; `least` says the cycles without such bodies, where that differs.
`+ ?` is a copy whose size only data tells, or a loop that only data ends and that counts once."""


def refused(result):
    """Why a contender's cycles are no count, or None."""
    if result["products"] > 1:
        return f"{result['cycles']:,} cycles, of which the products alone take {result['products']:.0%}"
    return None


def bound(row, name):
    """The cycles that a contender takes at least, with its copies or at least those of operands and results; None where unknown."""
    result = row["contenders"].get(name, {})
    if "cycles" not in result or refused(result):
        return None
    return max(result["cycles"], result["copies"], row["least_copies"])


def ratio(row, *names):
    """Our bound over the least of those contenders', or None."""
    ours, theirs = bound(row, OURS), [found for name in names if (found := bound(row, name))]
    return ours / min(theirs) if ours and theirs else None


def line(row):
    parts = [f"{row['case']} (per {row['unit']}):"]
    for name, result in row["contenders"].items():
        if "missing" in result:
            parts.append(f"{name} missing ({result['missing']})")
            continue
        if reason := refused(result):
            parts.append(f"{name} refused ({reason})")
            continue
        against = f", ours {ratio(row, name):.2f}x" if name != OURS and ratio(row, name) else ""
        copies = f"copies {result['copies'] / row['units']:.0f} ({_megabytes(row, result)} MB)"
        parts.append(f"{name} {result['per_unit']:.0f} cycles, {copies}, MXU {result['mxu']:.0%}{against}")
    return "\n  ".join(parts)


def _megabytes(row, result):
    counted = f"{result['bytes'] / 1e6:.1f}"
    return f"refused: {counted} of {row['least_bytes'] / 1e6:.1f}" if result["bytes"] < row["least_bytes"] else counted


def table(result):
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    commits = ", ".join(dict.fromkeys(row["commit"] for row in result["rows"]))
    lines = [
        f"# Static cycles on TPU {result['chip']}",
        "",
        LIMITS,
        "",
        f"By `python -m bench tpu-schedule`; {versions}; commit {commits}; one core at {result['clock'] / 1e9:.2f} GHz, "
        f"{result['bandwidth'] / 1e9:.0f} GB/s.",
        "",
        "| case | contender | static cycles | per unit | copies, cycles | MB | MXU | ours / it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for name, each in row["contenders"].items():
            if "missing" in each:
                lines.append(f"| {row['case']} | {name} | not compiled: {each['missing']} | | | | | |")
                continue
            if reason := refused(each):
                lines.append(f"| {row['case']} | {name} | refused: {reason} | | | | | |")
                continue
            copies = "–" if each["bytes"] < row["least_bytes"] else f"{each['copies']:,.0f}"
            unknown = " + ?" if each["unknown"] else ""
            least = "" if each["least"] == each["cycles"] else f" (least {each['least']:,})"
            against = f"{ratio(row, name):.2f}" if name != OURS and ratio(row, name) else ""
            note = f" ({each['note']})" if each["note"] else ""
            lines.append(
                f"| {row['case']} | {name}{note} | {each['cycles']:,}{unknown}{least} | {each['per_unit']:.0f} per {row['unit']} | "
                f"{copies} | {_megabytes(row, each)} | {each['mxu']:.0%}, {each['products']:.0%} | {against} |"
            )
    return "\n".join(lines) + "\n"


def readme(folder):
    """Markdown: what matters of every chip's results, a column for each."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("tpu-static-*.json"))]
    if not results:
        return ""
    chips = [f"[{result['chip']}](bench/results/tpu-static-{result['chip']}.md)" for result in results]
    found = [{row["case"]: row for row in result["rows"]} for result in results]

    def rows(prefix, cell):
        for case in dict.fromkeys(case for each in found for case in each if case.startswith(prefix)):
            yield "| " + " | ".join([case, *(cell(each[case]) if case in each else "–" for each in found)]) + " |"

    def against_jax(row):
        share = ratio(row, "splash", "flash")
        return "–" if share is None else f"{share:.2f}"

    def of_copies(row):
        ours = row["contenders"][OURS]
        return "–" if "missing" in ours else f"{ours['cycles'] / ours['copies']:.2f}"

    return "\n".join(
        [
            "Static cycles on TPUs, counted in the compiler's schedules; nothing was timed. Attention, 32 heads of 128 unless "
            "said: ours over the better of splash and flash attention, each at the best block sizes tried, by the larger of "
            "cycles and HBM copies. Head, scores, truncation and experts: our cycles over those of their HBM copies alone; "
            "below 1, HBM is the limit.\n",
            "| | " + " | ".join(chips) + " |",
            "|---" * (len(chips) + 1) + "|",
            *rows("attention", against_jax),
            *rows("lm_head_scores", of_copies),
            *rows("score_tokens", of_copies),
            *rows("truncate_logits", of_copies),
            *rows("mix_experts", of_copies),
            "",
        ]
    )
