"""The benchmarks' figures, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Point = tuple[float, float]


def _figure(width: float = 7.0, height: float = 4.5) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other beats on both axes, where less is better; cheapest first."""
    front: list[int] = []
    for k in sorted(range(len(points)), key=lambda k: points[k]):
        if not front or points[k][1] < points[front[-1]][1]:
            front.append(k)
    return front


def pareto(groups: Mapping[str, Mapping[str, Point]], path: Path, title: str, x: str, y: str) -> Path:
    """Cost against quality on logarithmic axes: a colour a group, the front as a line.

    Args:
        groups: group -> label -> (cost, error); both above 0.
        path: the PNG file.
        title: of the figure.
        x: what the cost is.
        y: what the error is.
    """
    figure, axes = _figure()
    everything = [point for points in groups.values() for point in points.values()]
    front = [everything[k] for k in pareto_front(everything)]
    axes.plot(*zip(*front, strict=True), color="0.7", linewidth=6, zorder=0, label="Pareto front")
    for k, (name, points) in enumerate(groups.items()):
        axes.plot(*zip(*points.values(), strict=True), "o-", color=f"C{k}", linewidth=1, label=name)
        for label, (cost, error) in points.items():
            axes.annotate(label, (cost, error), textcoords="offset points", xytext=(5, 5), fontsize=8, color=f"C{k}")
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:.2g}")
        axis.set_tick_params(which="minor", labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path)


def curves(
    series: Mapping[str, Sequence[Point]], path: Path, title: str, x: str, y: str, logarithmic: bool = False
) -> Path:
    """Lines over a number, one per name; an empty series is left out. `logarithmic` is of both axes."""
    figure, axes = _figure()
    for name, points in series.items():
        if points:
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axes.set(xlabel=x, ylabel=y, title=title)
    if logarithmic:
        axes.set(xscale="log", yscale="log")
    else:
        axes.ticklabel_format(useOffset=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path)


def bars(values: Mapping[str, Mapping[str, float]], path: Path, title: str, y: str) -> Path:
    """Groups of bars: group -> name -> value; the names are the same in each group."""
    figure, axes = _figure()
    names = list(next(iter(values.values())))
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        places = [group + (k - (len(names) - 1) / 2) * width for group in range(len(values))]
        drawn = axes.bar(places, [entry[name] for entry in values.values()], width * 0.95, label=name)
        axes.bar_label(drawn, fmt="%.3g", fontsize=8)
    axes.set(title=title, ylabel=y)
    axes.set_xticks(range(len(values)), list(values))
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    return _save(figure, path)


def spans(values: Mapping[str, Sequence[float]], path: Path, title: str, x: str) -> Path:
    """Numbers with their intervals, one a line: name -> (value, low, high)."""
    figure, axes = _figure(height=1.2 + 0.35 * len(values))
    for place, (value, low, high) in enumerate(values.values()):
        axes.plot([low, high], [place, place], color=f"C{place % 10}", linewidth=3, alpha=0.5)
        axes.plot([value], [place], "o", color=f"C{place % 10}")
    axes.set(title=title, xlabel=f"{x}, with 95 % interval")
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    return _save(figure, path)
