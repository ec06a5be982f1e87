"""The outcome as an SVG: waiting times of every person, and the devices' hours."""

from __future__ import annotations

from tests.simulation.week import HOUR, Outcome

WIDTH, HEIGHT, LEFT, TOP, GAP = 760, 190, 60, 34, 70
COLOURS = {"worst": "#c2541d", "p95": "#b98a10", "median": "#2f6fb0"}
STYLE = (
    "text{font:12px sans-serif;fill:#555}.grid{stroke:#8884;stroke-width:1}"
    "polyline{fill:none;stroke-width:2}rect.bar{fill:#2f6fb0}"
)


def svg(outcome: Outcome) -> str:
    inside = WIDTH - LEFT - 20
    lower = TOP + HEIGHT + GAP
    parts = [f"<style>{STYLE}</style>", _waits(outcome, inside), _hours(outcome, inside, lower)]
    total = lower + HEIGHT + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" role="img" '
        f'aria-label="Waiting times of {len(outcome.waits)} persons, and use of '
        f'{outcome.devices} devices">' + "".join(parts) + "</svg>\n"
    )


def _waits(outcome: Outcome, inside: int) -> str:
    persons = outcome.of_persons()
    most = max(1.0, persons["worst"][-1] / HOUR)
    parts = [f'<text x="{LEFT}" y="16">Waiting time of each person, hours (sorted)</text>']
    parts += _grid(most, TOP, inside, "{:.1f}")
    for order, (name, colour) in enumerate(COLOURS.items()):
        values = persons[name]
        step = inside / max(1, len(values) - 1)
        points = " ".join(
            f"{LEFT + n * step:.1f},{TOP + HEIGHT * (1 - value / HOUR / most):.1f}"
            for n, value in enumerate(values)
        )
        parts.append(f'<polyline points="{points}" stroke="{colour}"/>')
        x = LEFT + 300 + order * 90
        parts.append(f'<rect x="{x}" y="7" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="16">{name}</text>')
    return "".join(parts)


def _hours(outcome: Outcome, inside: int, top: int) -> str:
    hours = outcome.days * 24
    parts = [f'<text x="{LEFT}" y="{top - 12}">Devices in use, per cent of each hour</text>']
    parts += _grid(100, top, inside, "{:.0f}")
    wide = inside / hours
    for hour in range(hours):
        share = outcome.busy[hour] / (outcome.devices * HOUR)
        tall = HEIGHT * min(1.0, share)
        parts.append(
            f'<rect class="bar" x="{LEFT + hour * wide:.2f}" y="{top + HEIGHT - tall:.1f}" '
            f'width="{wide * 0.8:.2f}" height="{tall:.1f}"/>'
        )
    for day in range(outcome.days):
        x = LEFT + day * 24 * wide
        parts.append(f'<text x="{x:.0f}" y="{top + HEIGHT + 18}">day {day + 1}</text>')
    return "".join(parts)


def _grid(most: float, top: int, inside: int, form: str) -> list[str]:
    parts = []
    for quarter in range(5):
        y = top + HEIGHT * (1 - quarter / 4)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + inside}" y1="{y}" y2="{y}"/>')
        label = form.format(most * quarter / 4)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>')
    return parts
