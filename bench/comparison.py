"""What became slower or faster between two results files, beyond noise."""

import functools
import math
import statistics

from bench import report
from bench.harness import NO_PEERS, OURS, is_ours

# A change counts if it is by more than this share, one way or the other: rounds of one process do not show how two differ, which
# lie apart in memory and in time. Of 59 ratios of peers, whose code had not changed, in two published runs three hours apart 13
# passed the test below, by up to 74%, and 2 by more than half.
LEAST_CHANGE = 0.5
# and if by chance the values of both files lie so far apart, ranked together, in no more than this share of rows. Of seven rounds
# each, two of the 49 pairs may then be out of order.
CHANCE = 0.0025
VERDICTS = {
    "slower": "slower",
    "faster": "faster",
    "same": "without a change beyond noise",
    "unknown": "of too few rounds to tell",
    "alone": "in one file alone",
}


def compare(before, after, least=LEAST_CHANGE):
    """(text, exit status): changes of our times beyond noise. The status is 1 where something is slower, else 3 where a row has too
    few rounds for anybody to tell.

    The measure is our time over the fastest peer's of the same round, where both files have that peer, since that does not change
    when the machine is busy or another one; else our time itself. Ours called from torch, or on a packed weight, counts too.
    """
    old, new = ({(row["operation"], row["case"]): row for row in result["rows"]} for result in (before, after))
    lines, verdicts = [], []
    for name in old | new:
        if name in old and name in new:
            found = [_judge(old[name], new[name], own, least) for own in _own(old[name], new[name])]
        else:
            found = [("not in both", "alone")]
        for said, verdict in found:
            verdicts.append(verdict)
            if said:
                lines.append(f"{', '.join(name)}: {said}")
    counts = [f"{verdicts.count(kind)} {words}" for kind, words in VERDICTS.items() if kind in verdicts]
    status = 1 if "slower" in verdicts else 3 if "unknown" in verdicts else 0
    return "\n".join([*lines, f"{len(verdicts)} compared: {', '.join(counts)}"]), status


def _own(old, new):
    shared = [name for name in (OURS, *NO_PEERS) if name in new["contenders"] and name in old["contenders"]]
    ran = [name for name in shared if all("times" in row["contenders"][name] for row in (old, new))]
    return [OURS, *(name for name in ran if name != OURS)]


def note(least):
    return (
        "Rounds of one run do not show how runs differ: between two of one commit some ratios are others. "
        f"So less than {least:.0%} is no change; for less, compare several runs of each."
    )


def _judge(old, new, own, least):
    """(what to say of two rows of a case, or None; which kind of verdict it is)."""
    reasons = [row["contenders"][own].get("missing") for row in (old, new)]
    if any(reasons):
        if all(reasons):
            return "ours ran in neither", "same"
        verdict = "faster" if reasons[0] else "slower"
        return f"ours ran only {'after' if reasons[0] else 'before'} ({reasons[0] or reasons[1]})", verdict
    what, a, b = _comparable(old, new, own)
    change = statistics.median(b) / statistics.median(a) - 1
    what += f", {own}" if own != OURS else ""
    if not _enough(a, b):
        return f"{change:+.1%} ({what}), of too few rounds to tell noise, {len(a)} and {len(b)}", "unknown"
    if max(change, 1 / (1 + change) - 1) <= least or _chance(len(a), len(b), _out_of_order(a, b)) > CHANCE:
        return None, "same"
    return f"{'SLOWER' if change > 0 else 'faster'} by {abs(change):.1%} ({what})", "slower" if change > 0 else "faster"


def _comparable(old, new, own):
    """(what is compared, its value in each round of `old`, and of `new`): more is slower."""
    shared = [name for name in report.peers_of(new) if name in old["contenders"] and not is_ours(name)]
    inverse = {name: [[1 / ratio for ratio in report.ratios(row, name, own)] for row in (old, new)] for name in shared}
    # A peer that was timed once, at its first call, is no measure.
    inverse = {name: pair for name, pair in inverse.items() if all(_rounds(row, name) > 1 for row in (old, new))}
    # One that left early in either file tells less than the next.
    inverse = {name: pair for name, pair in inverse.items() if _enough(*pair)} or inverse
    if inverse:
        best = max(inverse, key=lambda name: statistics.median(inverse[name][0]))
        return f"against {best}", *inverse[best]
    return "time", *(row["contenders"][own]["times"] for row in (old, new))


def _rounds(row, name):
    return len(row["contenders"][name].get("times", []))


def _enough(a, b):
    """Whether so many values of each could be told apart."""
    return _chance(len(a), len(b), 0) <= CHANCE


def _out_of_order(a, b):
    """Mann and Whitney's U: pairs of one of `a` and one of `b` that lie the other way round than most; of equal ones a half."""
    above = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    return min(above, len(a) * len(b) - above)


def _chance(m, n, pairs):
    """How often so few pairs of m and n values are out of order, one way or the other, where all come from one distribution."""
    if m * n > 400:  # so many that the sum is normally distributed
        deviation = (m * n / 2 - pairs) / math.sqrt(m * n * (m + n + 1) / 12)
        return math.erfc(deviation / math.sqrt(2))
    counts = _orders(m, n)
    return min(1.0, 2 * sum(counts[: math.floor(pairs) + 1]) / sum(counts))


@functools.cache
def _orders(m, n):
    """Of how many orders of m and n values each number of pairs, 0 to m n, is out of order."""
    if not m or not n:
        return (1,)
    # The greatest is one of the m, and all n lie below it, or one of the n.
    first, second = (0,) * n + _orders(m - 1, n), _orders(m, n - 1)
    size = m * n + 1
    return tuple(x + y for x, y in zip(first + (0,) * (size - len(first)), second + (0,) * (size - len(second))))
