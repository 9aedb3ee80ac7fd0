"""Draw the pictures of the examples again, from the files that they left in docs/; nothing is trained.

python docs/redraw.py
"""

import csv
import importlib
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))


def rows(name: str) -> dict[str, dict[str, list[list[float]]]]:
    """The numbers of each run, by method and seed."""
    found: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    with (DOCS / f"{name}.csv").open() as file:
        reader = csv.reader(line for line in file if not line.startswith("#"))
        next(reader)
        for method, seed, *numbers in reader:
            found[method][seed].append([float(number) for number in numbers])
    return found


def redraw(name: str, run: Any, methods: Any) -> None:
    """Draw one: ``run`` makes what the example's ``draw`` wants of the columns of a run."""
    example = importlib.import_module(name)
    runs = {method: [run(example, each) for each in seeds.values()] for method, seeds in rows(name).items()}
    chosen = methods(example)
    assert [method.name for method in chosen] == list(runs), name
    example.draw(DOCS / f"{name}.png", runs, chosen)
    print(f"wrote docs/{name}.png")


if __name__ == "__main__":
    redraw(
        "mnist_bandit",
        lambda example, run: example.Curve(*map(list, zip(*run, strict=True))),
        lambda example: example.methods([0.03, 0.1]),
    )
    redraw(
        "trl_reversal",
        lambda example, run: example.Run([row[1] for row in run], [row[2] for row in run]),
        lambda example: example.methods(0.1),
    )
    redraw(
        "trainer_sft",
        lambda example, run: SimpleNamespace(points=[tuple(row) for row in run]),
        lambda example: example.methods([0.1], 40),
    )
