"""The first picture of the README: what a gated step does, and what it costs.

python docs/flow.py     # writes docs/flow.svg, from benchmarks/results/step.csv
"""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import style  # noqa: E402

style.use()

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

MODEL = "Llama-like"
SCREEN, LOSS, KEPT = "#9db8d9", "#d9cfa3", style.color("gated 3%")


def step(column: str) -> dict[str, float]:
    """A column of the steps of the language model, and of their parts, by name."""
    with (ROOT / "benchmarks" / "results" / "step.csv").open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {row["step"]: float(row[column]) for row in rows if row["model"].startswith(MODEL)}


def flow(axis: Axes) -> None:
    """The stations of a gated step, in their order."""
    stations = [
        ("all rows", "model, without a graph", SCREEN),
        ("your loss", "unchanged", LOSS),
        ("the rule", "a factor for each row", "#f0f0f0"),
        ("kept rows", "model, with a graph", KEPT),
    ]
    axis.set(xlim=(0, 4.06), ylim=(0, 1))
    axis.axis("off")
    for i, (name, told, face) in enumerate(stations):
        light = face == KEPT
        axis.add_patch(plt.Rectangle((i + 0.03, 0.14), 0.86, 0.72, facecolor=face, edgecolor="none"))
        color = style.PAPER if light else style.INK
        axis.text(i + 0.46, 0.62, name, ha="center", va="center", fontsize=11.5, weight="bold", color=color)
        axis.text(i + 0.46, 0.34, told, ha="center", va="center", fontsize=8.6, color=color)
        if i:
            axis.annotate("", (i + 0.03, 0.5), (i - 0.11, 0.5), arrowprops={"arrowstyle": "-|>", "color": style.INK})


def bars(axis: Axes, ms: dict[str, float], of_full: dict[str, float]) -> None:
    """What a plain step and two gated ones take, to scale."""
    full, one, first = ms["full step"], ms["gated, 3%"], ms["gated screen-first, 3%"]
    screen, loss = ms["- no-grad forward"], ms["- loss on its outputs"]
    axis.set(xlim=(0, 1.0), ylim=(2.55, -0.55))
    axis.axis("off")
    lanes = [
        ("plain", "full step", [(full, style.INK)], "every row: forward and backward, with a graph"),
        ("one line", "gated, 3%", [(screen, SCREEN), (loss, LOSS), (one - screen - loss, KEPT)], ""),
        ("one line, decided\nbefore the forward", "gated screen-first, 3%", [(first, KEPT)], ""),
    ]
    left, scale = 0.205, 0.735 / full
    for i, (name, column, parts, told) in enumerate(lanes):
        axis.text(left - 0.012, i, name, ha="right", va="center", fontsize=10, weight="bold", linespacing=1.1)
        at = left
        for width, face in parts:
            axis.barh(i, width * scale, 0.56, left=at, color=face, linewidth=0)
            at += width * scale
        axis.text(at + 0.01, i, f"{of_full[column]:.2f}", va="center", fontsize=12, weight="bold")
        if told:
            axis.text(left + 0.015, i, told, va="center", fontsize=9.5, color=style.PAPER)


def main() -> None:
    """Draw both."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.6, 3.5), height_ratios=(1, 1.75))
    top.set_title("A gated step: no row builds a graph until a rule has kept it", fontsize=11.5)
    bottom.set_title("What it takes: a language model, 64 rows, 3% kept, two CPU threads; plain = 1", fontsize=10)
    flow(top)
    bars(bottom, step("ms"), step("of_full"))
    figure.tight_layout(pad=0.6, h_pad=1.2)
    figure.savefig(ROOT / "docs" / "flow.svg", metadata={"Date": None})
    print("wrote docs/flow.svg")


if __name__ == "__main__":
    main()
