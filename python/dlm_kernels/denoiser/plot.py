"""The measurements of `compare.by_steps` as an SVG picture: a panel a measure, a line a model, over the number of passes."""

import itertools
import math
from xml.sax.saxutils import escape

PANELS = (
    ("holes of 4: tokens right", ".0%", lambda row: row.get("hole_of_4", {}).get("token_accuracy")),
    ("64 tokens: texts that parse", ".0%", lambda row: row["parse_share"]),
    ("64 tokens: bits per token, by the teacher", ".1f", lambda row: row["teacher_bits_per_token"]),
)
COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#efb118", "#6cc5b0", "#ff8ab7", "#9c6b4e")  # and again from the first
WIDTH, HEIGHT, LEFT, TOP = 260, 190, 44, 34


def steps_svg(rows):
    """The SVG text. rows: as `compare.by_steps` gives; the ways IN_ORDER are squares of their own."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    passes = [row["passes"] for row in rows]
    low, high = math.log2(min(passes)), math.log2(max(passes))
    parts = []
    for i, (title, shown, measure) in enumerate(PANELS):
        points = [(row, measure(row)) for row in rows if measure(row) is not None]
        top = max((value for _, value in points), default=0) * 1.15 or 1.0

        def place(row, value, i=i, top=top):
            x = i * (WIDTH + LEFT) + LEFT + (math.log2(row["passes"]) - low) / ((high - low) or 1) * (WIDTH - 24) + 12
            return round(x, 1), round(TOP + HEIGHT * (1 - value / top), 1)

        x0, bottom = i * (WIDTH + LEFT) + LEFT, TOP + HEIGHT
        parts.append(f'<text x="{x0}" y="{TOP - 14}" font-weight="bold">{title}</text>')
        parts.append(f'<path d="M{x0} {TOP}V{bottom}H{x0 + WIDTH}" fill="none" stroke="#888"/>')
        for value in (0, top / 2, top):
            y = TOP + HEIGHT * (1 - value / top)
            parts.append(f'<text x="{x0 - 5}" y="{y + 4:.1f}" text-anchor="end">{value:{shown}}</text>')
        for count in sorted({row["passes"] for row, _ in points}):
            x, _ = place({"passes": count}, 0)
            parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{count}</text>')
        for name, colour in zip(models, itertools.cycle(COLOURS)):
            own = [(row, value) for row, value in points if row["model"] == name]
            line = [place(*point) for point in own if isinstance(point[0]["steps"], int)]
            path = " ".join(f"{x},{y}" for x, y in line)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in line]
            for point in own:
                if not isinstance(point[0]["steps"], int):
                    x, y = place(*point)
                    box = f'x="{x - 4}" y="{y - 4}" width="8" height="8" stroke-width="2"'
                    parts.append(f'<rect {box} fill="none" stroke="{colour}"/>')
    entries = [*zip(map(escape, models), itertools.cycle(COLOURS)), ("over passes; squares: from left to right", None)]
    for i, (text, colour) in enumerate(entries):
        x, bottom = LEFT + 110 * (i % 6), TOP + HEIGHT + 42 + 18 * (i // 6)
        if colour:
            parts.append(f'<circle cx="{x}" cy="{bottom - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 10}" y="{bottom}">{text}</text>')
    size = f'width="{3 * (WIDTH + LEFT) + 10}" height="{bottom + 14}"'
    style = "font-family=\"sans-serif\" font-size=\"12\" fill=\"#777\""
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"
