"""What became slower or faster between two results files, beyond noise."""

import statistics

from bench import report
from bench.harness import OURS

# A change counts if it is more than this share,
LEAST_CHANGE = 0.03
# and more than so often the medians' own uncertainty, the quartiles' distance by the root of the rounds, of both files together:
# of files of the same code one row in a hundred is as far apart by chance where it has three rounds, fewer where it has more.
UNCERTAINTIES = 4
# Of fewer rounds nobody knows the noise.
LEAST_ROUNDS = 3


def compare(before, after):
    """(text, whether something is slower): changes of our times beyond noise.

    The measure is our time over the fastest peer's of the same round, where both files have that peer, since that does not change
    when the machine is busy or another one; else our time itself.
    """
    old, new = ({(row["operation"], row["case"]): row for row in result["rows"]} for result in (before, after))
    lines, slower = [], False
    for name in old | new:
        said, worse = _judge(old[name], new[name]) if name in old and name in new else ("not in both", False)
        slower |= worse
        if said:
            lines.append(f"{', '.join(name)}: {said}")
    return "\n".join(lines) or "no change beyond noise", slower


def _judge(old, new):
    """(what to say of two rows of a case, or None; whether the second is slower)."""
    reasons = [row["contenders"][OURS].get("missing") for row in (old, new)]
    if any(reasons):
        if all(reasons):
            return "ours ran in neither", False
        return f"ours ran only {'after' if reasons[0] else 'before'} ({reasons[0] or reasons[1]})", reasons[0] is None
    what, a, b = _comparable(old, new)
    gap = statistics.median(b) - statistics.median(a)
    change = gap / statistics.median(a)
    if min(len(a), len(b)) < LEAST_ROUNDS:
        return f"{change:+.1%} ({what}), of too few rounds to tell noise, {len(a)} and {len(b)}", False
    if abs(change) <= LEAST_CHANGE or abs(gap) <= UNCERTAINTIES * (_uncertainty(a) + _uncertainty(b)):
        return None, False
    return f"{'SLOWER' if change > 0 else 'faster'} by {abs(change):.1%} ({what})", change > 0


def _comparable(old, new):
    """(what is compared, its value in each round of `old`, and of `new`): more is slower."""
    shared = [name for name in report.peers_of(new) if name in old["contenders"] and not name.startswith("ours")]
    inverse = {name: [[1 / ratio for ratio in report.ratios(row, name)] for row in (old, new)] for name in shared}
    # A peer that was timed once, at its first call, is no measure.
    inverse = {name: pair for name, pair in inverse.items() if all(_rounds(row, name) > 1 for row in (old, new))}
    if inverse:
        best = max(inverse, key=lambda name: statistics.median(inverse[name][0]))
        return f"against {best}", *inverse[best]
    return "time", *(row["contenders"][OURS]["times"] for row in (old, new))


def _rounds(row, name):
    return len(row["contenders"][name].get("times", []))


def _uncertainty(values):
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / len(values) ** 0.5
