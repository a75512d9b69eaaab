"""What became slower or faster between two results files, beyond noise."""

import statistics

from bench import report


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
    names = [name for name in report.peers_of(new) if name in old["contenders"]]
    if shared := [name for name in names if report.ratios(old, name) and report.ratios(new, name)]:
        best = max(shared, key=lambda name: statistics.median(1 / r for r in report.ratios(old, name)))
        return f"against {best}", [1 / r for r in report.ratios(old, best)], [1 / r for r in report.ratios(new, best)]
    times = [row["contenders"][report.base(row)].get("times") for row in (old, new)]
    return ("time", *times) if all(times) else None


def _quartiles(values):
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
