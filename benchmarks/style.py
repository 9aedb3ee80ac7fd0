"""The style of all pictures: one colour for a method wherever it is drawn, and its name at the end of its curve.

A method is known by how its name begins, so that "DG-K 3%", "delight 10%, first" and "gated 10%" are of one hue: the
rate makes it darker or lighter.
"""

import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

INK, PAPER, GRAY = "#222222", "#ffffff", "#8c8c8c"

# What a method's name begins with, the first that fits; and its colour.
_HUES = (
    (r"all rows|PG, small|full|PG$|PG\b", INK),
    (r"DG, small|small batch|quarter of the batch", "#8250c4"),
    (r"DG-K tokens|delight tokens", "#e6a100"),
    (r"DG-K price|delight price", "#9c3d10"),
    (r".*screen-first|before the forward", "#0b8a5c"),
    (r"DG-K|delight|gated|windowed", "#d1342f"),
    (r"DG", "#1f6fd1"),
    (r"PPO|CPPO", "#8a5a44"),
    (r"PODS", "#b07d62"),
    (r"random|floor", GRAY),
    (r"noise|norm", "#1a9e4b"),
    (r"auto", "#00868a"),
    (r"lossless", "#7a8a00"),
    (r"\|advantage\||abs_advantage", "#12a5d8"),
    (r"advantage", "#4c5fd7"),
    (r"surprisal", "#c04fa8"),
    (r"additive|positive", "#e07b00"),
)


def color(method: str) -> str:
    """The colour of a method: one hue for a kind of method, lighter for higher rates.

    Raises:
        ValueError: if no kind of that name is known.
    """
    for beginning, hue in _HUES:
        if re.match(beginning, method):
            rate = re.search(r"(\d+)%", method)
            return _lighter(hue, {1: -0.25, 3: 0.0, 10: 0.25, 25: 0.4, 30: 0.45}.get(int(rate[1]), 0) if rate else 0)
    raise ValueError(f"{method!r} has no colour: give its kind one in benchmarks/style.py")


def _lighter(hue: str, by: float) -> str:
    """``hue`` mixed with white, or with black where ``by`` is negative."""
    other = 1.0 if by > 0 else 0.0
    return to_hex([value + abs(by) * (other - value) for value in to_rgb(hue)])


def use() -> None:
    """Take this style for the pictures that follow."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GRAY,
            "axes.labelcolor": INK,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.grid": True,
            "grid.color": "#ececec",
            "axes.axisbelow": True,
            "font.size": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "xtick.color": INK,
            "ytick.color": INK,
            "svg.hashsalt": "kondo-hooks",
        }
    )


def label_ends(axis: Axes, size: float = 8) -> None:
    """Write each labelled curve's name beside its last point, apart from each other, in its colour.

    Args:
        axis: whose curves they are; its limits are taken as they will be.
        size: of the letters, in points.
    """
    figure = axis.get_figure()
    assert figure is not None
    axis.set(xlim=axis.get_xlim(), ylim=axis.get_ylim())  # what is asked for late would move the curves
    curves = [line for line in axis.get_lines() if not line.get_label().startswith("_") and len(line.get_xdata())]
    height = axis.get_window_extent().height
    step = 1.35 * size * figure.dpi / 72 / height
    ends: list[tuple[float, float, Any]] = []
    for line in curves:
        x, y = axis.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1]))
        at = axis.transAxes.inverted().transform((x, y))
        ends.append((min(max(at[1], 0.02), 0.98), at[0], line))
    ends.sort(key=lambda end: end[0])
    places: list[float] = []
    for y, _, _ in ends:
        places.append(max(y, places[-1] + step) if places else y)
    if places and places[-1] > 1:  # push down what was pushed out at the top
        places[-1] = 1.0
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - step)
    for place, (y, x, line) in zip(places, ends, strict=True):
        axis.annotate(
            str(line.get_label()),
            (x, y),
            (min(x, 1.0) + 0.015, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=line.get_color(),
            fontsize=size,
            va="center",
            annotation_clip=False,
        )
