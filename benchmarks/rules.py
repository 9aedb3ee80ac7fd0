"""What rules that are right on average cost: seconds of a step times the noise of its gradient, beside no gate.

    python benchmarks/rules.py    # the models of step.py, and the MLP of make demo; about three minutes on 2 cores

A step of twice the noise is worth half of one, so the product is what ``rate="auto"`` minimises: it should be no more
than that of the best fixed rule, or of no gate, by more than what it takes to find that out. Half of the rows have no
advantage, as in groups without variance. The last table is of rows that are padded: answers of 8 to 64 tokens, in which
the later tokens count for less, by rules that choose rows, tokens or the first tokens of rows. Rules take turns within
a round; medians over rounds.
"""

import argparse
import contextlib
import csv
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from step import Workload, workloads
from torch import nn
from tqdm import tqdm

import kondo_hooks as kondo

Rules = dict[str, dict[str, Any] | None]
RULES: Rules = {
    "no gate": None,
    "lossless": {"rate": "lossless"},
    **{f"noise {noise:g}": {"noise": noise} for noise in (0.25, 0.5, 1.0, 2.0)},
    "auto": {"rate": "auto"},
}
UNITS: Rules = {
    "no gate": None,
    "lossless, rows": {"rate": "lossless"},
    "lossless, prefixes": {"rate": "lossless", "unit": "prefix"},
    "noise 0.5, rows": {"noise": 0.5},
    "noise 0.5, tokens": {"noise": 0.5, "unit": "token"},
    "noise 0.5, prefixes": {"noise": 0.5, "unit": "prefix"},
}


def demo() -> Workload:
    """The model of ``make demo``."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    actions = torch.randint(0, 10, (100,), generator=g)
    return Workload("MLP of make demo, B=100", model, (torch.rand(100, 784, generator=g),), actions, actions * 0.0)


def padded(work: Workload) -> Workload:
    """Answers of other lengths, whose later tokens count for less."""
    n, length = work.advantages.shape
    lengths = torch.randint(length // 8, length + 1, (n, 1), generator=torch.Generator().manual_seed(2))
    counts = torch.linspace(1.5, 0.3, length) * (torch.arange(length) < lengths)
    return dataclasses.replace(work, name="the same, padded: 8 to 64 tokens", advantages=counts)


def measure(work: Workload, rules: Rules, rounds: int, each: int, first: int) -> list[dict[str, float | str]]:
    """Milliseconds a step, noise and share of the rows, or tokens, by rule."""
    g = torch.Generator().manual_seed(1)
    shape, counts = work.advantages.shape, work.advantages
    gates = {name: None if o is None else kondo.gated(work.model, **o) for name, o in rules.items()}
    spent: dict[str, list[float]] = {name: [] for name in rules}
    noises: dict[str, list[float]] = {name: [] for name in rules}

    def steps(gate: kondo.Gated | None, n: int) -> tuple[float, float]:
        begun, noise = time.perf_counter(), 0.0
        for _ in range(n):
            rows = torch.randn(len(work.actions), generator=g) * (torch.rand(len(work.actions), generator=g) < 0.5)
            work.advantages = rows if len(shape) == 1 else rows[:, None] * counts
            before = 0 if gate is None else gate.stats.decided
            work.loss(work.logits()).backward()
            if gate is not None and gate.stats.decided > before:
                noise += gate.stats.noise
        return (time.perf_counter() - begun) / n * 1e3, noise / n

    with tqdm(total=rounds + 1, desc=work.name.split(",")[0], unit="round") as bar:
        for turn in range(rounds + 1):
            for name, gate in gates.items():
                with contextlib.nullcontext() if gate is None else gate:
                    ms, noise = steps(gate, each if turn else first)
                if turn:
                    spent[name].append(ms)
                    noises[name].append(noise)
            bar.update()
    full = statistics.median(spent["no gate"])
    rows = []
    for name, gate in gates.items():
        ms, noise = statistics.median(spent[name]), statistics.mean(noises[name])
        kept = 1.0 if gate is None else gate.stats.rate
        rows.append({"model": work.name, "rule": name, "ms": ms, "noise": noise, "kept": kept})
        rows[-1]["product"] = ms / full * (1 + noise)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    found = []
    sizes = [(400, 600), (150, 300), (40, 60), (3, 12)]  # steps a round, and steps at first
    models = [demo(), *workloads(torch.device("cpu"))]
    models[-1].advantages = torch.ones_like(models[-1].advantages)
    tables = [(work, RULES, *size) for work, size in zip(models, sizes, strict=True)]
    for work, rules, each, first in [*tables, (padded(models[-1]), UNITS, 3, 12)]:
        rows = measure(work, rules, args.rounds, each, first)
        print(f"\n{work.name:<48} {'ms':>8} {'x no gate':>10} {'noise':>6} {'kept':>6} {'seconds x noise':>16}")
        for row in rows:
            print(
                f"  {row['rule']:<46} {row['ms']:>8.2f} {row['ms'] / rows[0]['ms']:>10.2f} {row['noise']:>6.2f} "
                f"{row['kept']:>6.0%} {row['product']:>16.2f}"
            )
        found += rows
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "rules.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
