"""Roofline, ratio bars and sweeps of a results file, as SVG."""

import importlib.util
import math
import statistics

from bench import report


def draw(result, folder):
    """Writes folder/*.svg and returns their names; none without matplotlib, for what was timed still wants its table."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    # The same numbers must give the same file: no random ids, no date.
    matplotlib.rcParams.update({"svg.hashsalt": "dlm_kernels", "font.size": 8, "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, figure in (
        ("roofline", _roofline(plt, result["rows"])),
        ("ratios", _ratios(plt, result["rows"])),
        ("sweeps", _sweeps(plt, result["rows"])),
    ):
        if figure is not None:
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
            names.append(name)
    return names


def _measured(rows):
    return [row for row in rows if row["contenders"][report.base(row)].get("times")]


def _roofline(plt, rows):
    """Our rate against operations per byte, under the machine's two ceilings."""
    rows = [row for row in _measured(rows) if row["flops"]]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(6, 4))
    intensities = [row["flops"] / (row["read"] + row["written"]) for row in rows]
    spread = [min(intensities) / 2, max(intensities) * 2]
    for dtype in sorted({row["dtype"] for row in rows}):
        rates = next(row["rates"] for row in rows if row["dtype"] == dtype)
        points = sorted([*spread, rates[dtype] / rates["read"]])
        axes.plot(points, [min(rates[dtype], x * rates["read"]) / 1e9 for x in points], label=f"{dtype} ceiling")
    for operation in dict.fromkeys(row["operation"] for row in rows):
        at = [i for i, row in enumerate(rows) if row["operation"] == operation]
        speeds = [
            rows[i]["flops"] / statistics.median(rows[i]["contenders"][report.base(rows[i])]["times"]) / 1e9 for i in at
        ]
        axes.plot([intensities[i] for i in at], speeds, "o", label=operation)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s", title="Roofline")
    axes.legend()
    return figure


def _ratios(plt, rows):
    """Each peer's time over ours; right of the line we are faster."""
    bars = [
        (f"{row['operation']}: {row['case']}", name, statistics.median(values))
        for row in _measured(rows)
        for name in report.peers_of(row)
        if (values := report.ratios(row, name))
    ]
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(7, 0.16 * len(bars) + 1))
    peers = list(dict.fromkeys(name for _, name, _ in bars))
    # Twelve shades, so that no two of the peers look alike.
    colours = [plt.get_cmap("Paired")(i % 12) for i in range(len(peers))]
    for i, (_, name, value) in enumerate(bars):
        axes.barh(-i, math.log10(value), color=colours[peers.index(name)])
        axes.annotate(f"{value:.2f}", (math.log10(value), -i), fontsize=5, va="center")
    labels = [label if i == 0 or label != bars[i - 1][0] else "" for i, (label, _, _) in enumerate(bars)]
    axes.set_yticks([-i for i in range(len(bars))], labels, fontsize=5)
    ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if t <= 2 * max(value for _, _, value in bars)]
    axes.set_xticks([math.log10(t) for t in ticks], [f"{t:g}x" for t in ticks])
    axes.axvline(0, color="black", linewidth=0.5)
    axes.set(title="peer's time / ours", ylim=(-len(bars), 1))
    axes.legend([plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours], peers, fontsize=6)
    return figure


def _sweeps(plt, rows):
    """Time against an axis, with the exponent of the fitted power."""
    found = report.sweeps(rows)
    if not found:
        return None
    columns = min(4, len(found))
    lines = math.ceil(len(found) / columns)
    figure, panels = plt.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), squeeze=False)
    for panel in panels.flat[len(found) :]:
        panel.set_axis_off()
    for panel, (operation, axis, curves) in zip(panels.flat, found):
        for name, (x, y, exponent) in curves.items():
            label = name if exponent is None else f"{name} ~ x^{exponent:.2f}"
            panel.plot(x, [1e3 * t for t in y], "o-", label=label, markersize=3)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms", title=operation)
        points = sorted({point for x, _, _ in curves.values() for point in x})
        panel.set_xticks(points, [f"{x}" for x in points], rotation=30)
        panel.minorticks_off()
        panel.legend(fontsize=6)
    figure.tight_layout()
    return figure
