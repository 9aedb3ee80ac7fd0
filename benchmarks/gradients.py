"""What the gated gradient is: how near to the full PG and DG gradients, how biased, how noisy.

    python benchmarks/gradients.py --out benchmarks/results   # the committed run
    python benchmarks/gradients.py --quick

Checkpoints along a run of token reversal (benchmarks/reversal.py; trained by DG-K 10%). At each, batches are drawn, and
on every batch all gates take their gradient, through ``kondo.gated`` and the user's loss, as in training:

- cosine and norm ratio, batch by batch, to the full PG and the full DG gradient of the same batch;
- bias: the cosine and the norm of the gate's mean gradient against the mean PG gradient of other, many batches;
- noise: root mean square distance of a batch's gradient from the gate's mean, in norms of that mean;
- for gates that draw: on one batch, how far the mean over draws is from the batch's PG gradient, and how far it would
  be by chance were there no bias.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import record
import torch
from reversal import CONTROLS, RATES, Batch, Decoder, Loss, Method, answers_logp, dg_loss, learn, pg_loss, sample
from torch import Tensor

import kondo_hooks as kondo

CHECKPOINTS = (0, 50, 100, 200, 400)
PRIORITIES = {"delight": "delight", **CONTROLS}
DRAWN = {"deterministic": False, "rate": 0.1, "temperature": 1.0}
GATES: dict[str, dict[str, Any]] = {
    **{f"{name} {rate:.0%}": {"rate": rate, "priority": p} for name, p in PRIORITIES.items() for rate in RATES},
    "delight 10%, DG-weighted": {"rate": 0.1, "weight": "dg"},
    "delight tokens 10%": {"rate": 0.1, "unit": "token"},
    "delight price 0": {"price": 0.0},
    "random 10%, by kept": {"rate": 0.1, "priority": "uniform", "normalize": "kept"},
    "delight drawn": DRAWN,
    "delight drawn, unbiased": {**DRAWN, "unbiased": True},
}
DRAWING = ("random 10%, by kept", "delight drawn", "delight drawn, unbiased")


@dataclass(frozen=True)
class Task:
    """One run and its checkpoints."""

    seed: int
    steps: int = CHECKPOINTS[-1]
    batches: int = 12
    reference: int = 60
    draws: int = 30


def gradient(model: Decoder, batch: Batch, loss: Loss = pg_loss) -> Tensor:
    """All parameters' gradient, flat; gated if a gate is open around the model."""
    model.zero_grad()
    loss(answers_logp(model(batch.sequences), batch), batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gated(model: Decoder, batch: Batch, gate: dict[str, Any], seed: int) -> Tensor:
    with kondo.gated(model, **gate, seed=seed):
        return gradient(model, batch)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, 0).item()


def mean(gradients: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(gradients)).mean(0)


def look(model: Decoder, task: Task, step: int) -> record.Rows:
    """One row a gate."""
    generator = torch.Generator().manual_seed(10_000 * task.seed + step)

    def draw(number: int) -> list[Batch]:
        return [sample(model, 10, 2, generator) for _ in range(number)]

    wanted = mean(gradient(model, batch) for batch in draw(task.reference))
    batches = draw(task.batches)
    pg, dg = ([gradient(model, batch, loss) for batch in batches] for loss in (pg_loss, dg_loss))
    ways: dict[str, Callable[[int], Tensor]] = {"PG": lambda i: pg[i], "DG": lambda i: dg[i]}
    for name, gate in GATES.items():
        ways[name] = lambda i, gate=gate: gated(model, batches[i], gate, seed=i)
    rows = []
    for name, way in ways.items():
        own = torch.stack([way(i) for i in range(len(batches))])
        centre = own.mean(0)
        row: dict[str, Any] = {"step": step, "gate": name}
        for of, full in (("pg", pg), ("dg", dg)):
            row[f"cos_{of}"] = sum(map(cosine, own, full)) / len(own)
            row[f"norm_{of}"] = sum((a.norm() / b.norm()).item() for a, b in zip(own, full, strict=True)) / len(own)
        row["mean_cos"] = cosine(centre, wanted)
        row["mean_norm"] = (centre.norm() / wanted.norm()).item()
        row["noise"] = ((own - centre).square().sum() / (len(own) - 1)).sqrt().item() / centre.norm().item()
        if name in DRAWING:
            drawn = torch.stack([gated(model, batches[0], GATES[name], seed=i) for i in range(task.draws)])
            chance = ((drawn - drawn.mean(0)).square().sum() / (len(drawn) - 1) / len(drawn)).sqrt()
            row["draw_bias"] = ((drawn.mean(0) - pg[0]).norm() / pg[0].norm()).item()
            row["draw_chance"] = (chance / pg[0].norm()).item()
        rows.append({"draw_bias": float("nan"), "draw_chance": float("nan"), **row})
    return rows


def measure(task: Task) -> record.Rows:
    checkpoints: dict[int, tuple[float, dict[str, Tensor]]] = {}

    def probe(step: int, model: Decoder, batch: Batch) -> None:
        if step - 1 in CHECKPOINTS:
            weights = {name: weight.clone() for name, weight in model.state_dict().items()}
            checkpoints[step - 1] = 1 - batch.rewards.mean().item(), weights

    learn(Method({"rate": 0.1}), task.seed, steps=task.steps + 1, probe=probe)
    rows: record.Rows = []
    model = Decoder(2, 19)
    for step, (error, weights) in checkpoints.items():
        model.load_state_dict(weights)
        rows += ({"error": error, **row} for row in look(model, task, step))
    return rows


COLUMNS = {
    "cos_pg": "cosine to PG",
    "cos_dg": "to DG",
    "norm_pg": "norm / PG",
    "norm_dg": "/ DG",
    "mean_cos": "mean: cosine",
    "mean_norm": "norm",
    "noise": "noise",
}
COLORS = dict(zip(PRIORITIES, ("tab:red", "black", "tab:blue", "tab:cyan", "tab:green", "tab:purple"), strict=True))


def report(frame: pd.DataFrame) -> None:
    for step, own in frame.groupby("step"):
        at = own.groupby("gate", sort=False)
        table = {label: at[name].apply(record.spread, form="{:.2f}") for name, label in COLUMNS.items()}
        record.print_table(pd.DataFrame(table).reset_index(), f"after {step} steps (error {own.error.mean():.2f})")
    draws = frame.dropna(subset="draw_bias").assign(excess=lambda f: f.draw_bias / f.draw_chance).groupby("gate")
    table = {name: draws[name].apply(record.spread, form="{:.2f}") for name in ("draw_bias", "draw_chance", "excess")}
    record.print_table(pd.DataFrame(table).reset_index(), "gates that draw, over draws on one batch, all checkpoints")


def draw(frame: pd.DataFrame, folder: Path) -> None:
    steps = sorted(frame.step.unique())
    size = (3.4 * len(steps), 9)
    figure, axes = plt.subplots(3, len(steps), figsize=size, sharex=True, sharey="row", squeeze=False)
    named = frame.assign(
        priority=frame.gate.str.extract(r"^(\w+) \d+%$")[0], rate=frame.gate.str.extract(r"(\d+)%$")[0]
    )
    named = named.dropna(subset=["priority", "rate"]).astype({"rate": float})
    for column, step in zip(axes.T, steps, strict=True):
        for axis, value in zip(column, ("cos_pg", "cos_dg", "noise"), strict=True):
            for priority, color in COLORS.items():
                at = named[(named.step == step) & (named.priority == priority)].groupby("rate")[value]
                half = at.apply(record.interval)
                style = {"fmt": "o:" if priority == "random" else "o-", "color": color, "ms": 4, "lw": 1.2}
                axis.errorbar(at.mean().index, at.mean(), half, label=priority, **style)
            axis.grid(alpha=0.3)
            axis.set(xscale="log")
        column[0].axhline(0, color="black", lw=0.5)
        column[1].axhline(0, color="black", lw=0.5)
        column[2].set(xlabel="rate, %", yscale="log")
        column[0].set_title(f"after {step} steps (error {frame[frame.step == step].error.mean():.2f})", fontsize=10)
    for axis, label in zip(axes[:, 0], ("cosine to full PG", "cosine to full DG", "noise"), strict=True):
        axis.set_ylabel(label)
    axes[0, 0].legend(fontsize=7)
    record.save(figure, folder / "gradients.png")


def main() -> None:
    args = record.parser(__doc__).parse_args()
    path = args.out / "gradients.csv"
    tasks = [Task(0, 50, 2, 10, 8)] if args.quick else [Task(seed) for seed in range(args.seeds)]
    frame = record.read(path) if args.draw else record.collect(tasks, measure, path, args.workers)
    report(frame)
    draw(frame, args.out)


if __name__ == "__main__":
    main()
