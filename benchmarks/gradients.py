"""What the gated gradient is: how near to the full PG and DG gradients, how biased, how noisy.

    python benchmarks/gradients.py
    python benchmarks/gradients.py --quick

Checkpoints along a run of token reversal (benchmarks/reversal.py; trained by DG-K 10%). At each, batches are drawn, and
on every batch all gates take their gradient, through ``kondo.gated`` and the user's loss, as in training:

- cosine and norm ratio, batch by batch, to the full PG and the full DG gradient of the same batch;
- bias: cosine and norm ratio of the gate's expected gradient to that of PG, whose batches are others. A mean of n
  batches is longer than its expectation, by the variance over n, which is taken off;
- noise: standard deviation of a batch's gradient, in norms of the gate's expected gradient;
- right, likely: of the tokens that the gradient is made of, how many are right, and their mean probability;
- for gates that draw: how far the mean over draws on one batch is from the batch's PG gradient, over how far it would
  be by chance were there no bias.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import record
import style
import torch
from reversal import (
    CONTROLS,
    RATES,
    TOKEN_RATES,
    Batch,
    Decoder,
    Loss,
    Method,
    Weights,
    answers_logp,
    dg_loss,
    learn,
    pg_loss,
    sample,
    snapshot,
)
from torch import Tensor

import kondo_hooks as kondo

CHECKPOINTS = (0, 50, 100, 200, 400)
PRIORITIES = {"delight": "delight", **CONTROLS}
DRAWN = {"deterministic": False, "rate": 0.1, "temperature": 1.0}
GATES: dict[str, dict[str, Any]] = {
    **{f"{name} {rate:.0%}": {"rate": rate, "priority": p} for name, p in PRIORITIES.items() for rate in RATES},
    "delight 10%, DG-weighted": {"rate": 0.1, "weight": "dg"},
    **{f"delight tokens {rate:.0%}": {"rate": rate, "unit": "token"} for rate in TOKEN_RATES},
    "delight price 0": {"price": 0.0},
    "random 10%, by kept": {"rate": 0.1, "priority": "uniform", "normalize": "kept"},
    "delight drawn": DRAWN,
    "delight drawn, unbiased": {**DRAWN, "unbiased": True},
}
FULL: dict[str, Loss] = {"PG": pg_loss, "DG": dg_loss}
DRAWING = ("random 10%, by kept", "delight drawn", "delight drawn, unbiased")


@dataclass(frozen=True)
class Task:
    """One run and its checkpoints."""

    seed: int
    steps: int = CHECKPOINTS[-1]
    batches: int = 24
    reference: int = 100
    draws: int = 20


def gradient(model: Decoder, batch: Batch, loss: Loss = pg_loss) -> Tensor:
    """All parameters' gradient, flat; gated if a gate is open around the model."""
    model.zero_grad()
    loss(answers_logp(model(batch.sequences), batch), batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, 0).item()


class Sampled:
    """Independent gradients of one kind, (n, P), and what they tell of their expectation."""

    def __init__(self, gradients: Iterable[Tensor]):
        self.each = torch.stack(list(gradients))
        self.mean = self.each.mean(0)
        self.variance = ((self.each - self.mean).square().sum() / (len(self.each) - 1)).item()

    @property
    def square(self) -> float:
        """Squared norm of the expectation, without bias; below 0 where noise is all there is."""
        return self.mean.square().sum().item() - self.variance / len(self.each)


@dataclass
class Taken:
    """One gradient, and what it is made of.

    Attributes:
        gradient: (P,).
        rows: how many ran with a graph.
        right: fraction of right tokens among those kept.
        probability: mean probability of those kept, as sampled.
    """

    gradient: Tensor
    rows: int
    right: float
    probability: float


def take(model: Decoder, batch: Batch, name: str, seed: int = 0) -> Taken:
    """The gradient of a gate, or of the whole batch for a name in ``FULL``."""
    rows, kept = len(batch.right), torch.ones_like(batch.right)
    if name in FULL:
        own = gradient(model, batch, FULL[name])
    else:
        with kondo.gated(model, **GATES[name], seed=seed) as gate:
            own = gradient(model, batch)
        kept = (gate.last.factors() != 0).view(rows, -1).expand_as(kept)  # of rows or of tokens
        rows = gate.stats.forwarded
    return Taken(own, rows, batch.right[kept].float().mean().item(), batch.logp[kept].exp().mean().item())


def look(model: Decoder, task: Task, step: int) -> record.Rows:
    """One row a gate."""
    generator = torch.Generator().manual_seed(10_000 * task.seed + step)

    def draw(number: int) -> list[Batch]:
        return [sample(model, 10, 2, generator) for _ in range(number)]

    wanted = Sampled(gradient(model, batch) for batch in draw(task.reference))
    batches = draw(task.batches)
    full = {name: [take(model, batch, name) for batch in batches] for name in FULL}
    pg, dg = ([one.gradient for one in full[name]] for name in FULL)
    first = 1000 * (100 * task.seed + CHECKPOINTS.index(step))
    rows = []
    for name in (*FULL, *GATES):
        taken = full.get(name) or [take(model, batch, name, first + i) for i, batch in enumerate(batches)]
        own = Sampled(one.gradient for one in taken)
        looks = [
            {
                "kept": one.rows,
                "right": one.right,
                "probability": one.probability,
                "cos_pg": cosine(one.gradient, of_pg),
                "norm_pg": (one.gradient.norm() / of_pg.norm()).item(),
                "cos_dg": cosine(one.gradient, of_dg),
                "norm_dg": (one.gradient.norm() / of_dg.norm()).item(),
            }
            for one, of_pg, of_dg in zip(taken, pg, dg, strict=True)
            if of_pg.any()  # once the task is learned, some batches teach nothing
        ]
        row: dict[str, Any] = {"step": step, "gate": name, **pd.DataFrame(looks).mean()}
        row |= {"dot": (own.mean @ wanted.mean).item(), "square": own.square, "square_pg": wanted.square}
        row |= {"variance": own.variance, "draw_bias": float("nan"), "draw_chance": float("nan")}
        if name in DRAWING:
            drawn = Sampled(take(model, batches[0], name, first + 500 + i).gradient for i in range(task.draws))
            row["draw_bias"] = ((drawn.mean - pg[0]).norm() / pg[0].norm()).item()
            row["draw_chance"] = (drawn.variance / len(drawn.each)) ** 0.5 / pg[0].norm().item()
        rows.append(row)
    return rows


def measure(task: Task) -> record.Rows:
    checkpoints: dict[int, tuple[float, Weights]] = {}

    def probe(step: int, model: Decoder, batch: Batch) -> None:
        if step - 1 in CHECKPOINTS:
            checkpoints[step - 1] = 1 - batch.rewards.mean().item(), snapshot(model)

    learn(Method({"rate": 0.1}), task.seed, steps=task.steps + 1, probe=probe)
    rows: record.Rows = []
    model = Decoder(2, 19)
    for step, (error, weights) in checkpoints.items():
        model.load_state_dict(weights)
        rows += ({"error": error, **row} for row in look(model, task, step))
    return rows


COLUMNS = {"cos_pg": "cosine to PG", "cos_dg": "to DG", "norm_pg": "norm / PG", "norm_dg": "/ DG"}


def expectation(frame: pd.DataFrame) -> pd.DataFrame:
    """Bias and noise of each gate at each checkpoint, pooled over seeds; NaN where noise is all there is, as an
    impossible cosine tells, too."""
    means = frame.groupby(["step", "gate"], sort=False)[["dot", "square", "square_pg", "variance"]].mean()
    length, wanted = means["square"].clip(lower=0).pow(0.5), means.square_pg.clip(lower=0).pow(0.5)
    cosine = means["dot"] / (length * wanted)
    told = means[[]].assign(cosine=cosine.where(cosine.abs() < 1.1), norm=length / wanted)
    return told.assign(noise=means.variance.pow(0.5) / length).replace([float("inf"), -float("inf")], float("nan"))


DRAWN = 100  # steps: on the plateau, where the rules differ


def report(frame: pd.DataFrame) -> None:
    pooled = expectation(frame)
    for step, own in frame.groupby("step"):
        at = own.groupby("gate", sort=False)
        made_of = {"kept": at.kept.mean(), "right %": 100 * at.right.mean(), "likely %": 100 * at.probability.mean()}
        table = pd.DataFrame(made_of).map("{:.0f}".format)
        for name, label in COLUMNS.items():
            table[label] = at[name].apply(record.spread, form="{:.2f}")
        told = pooled.loc[step].round({"cosine": 2, "norm": 2, "noise": 1})
        table = table.join(told.rename(columns={"cosine": "expected: cosine", "norm": "norm / PG's"}))
        record.print_table(table.reset_index(), f"after {step} steps (error {own.error.mean():.2f})")
    drawn = frame.dropna(subset="draw_bias").assign(excess=lambda f: f.draw_bias / f.draw_chance)
    runs = drawn.groupby(["gate", "seed"])[["kept", "draw_bias", "draw_chance", "excess"]].mean().groupby("gate")
    table = runs.agg(lambda values: record.spread(values, "{:.2f}"))
    record.print_table(table.reset_index(), "gates that draw, over draws on one batch, all checkpoints")


def draw(frame: pd.DataFrame, folder: Path) -> None:
    step = min(frame.step.unique(), key=lambda step: abs(step - DRAWN))
    own, pooled = frame[frame.step == step], expectation(frame).loc[step]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True)
    panels = {
        "cos_pg": "batch by batch, |advantage| is nearest to PG",
        "cos_dg": "and to DG",
        "cosine": "on average random rows are PG, and delight is not",
        "noise": "random rows are the noisiest",
    }
    labels = ("cosine to full PG", "cosine to full DG", "expected gradient: cosine to PG's", "noise, in its own norms")
    for axis, (name, title), label in zip(axes.flat, panels.items(), labels, strict=True):
        for priority in PRIORITIES:
            at = own[own.gate.isin([f"{priority} {rate:.0%}" for rate in RATES])]
            if name in pooled:
                values = pd.Series([pooled[name][f"{priority} {rate:.0%}"] for rate in RATES])
                record.points(axis, values, pd.Series([100 * rate for rate in RATES]), priority)
            else:
                record.points(axis, at[name], at.gate.str.extract(r"(\d+)%")[0].astype(float), priority)
        axis.set(title=title, ylabel=label, xscale="log", xticks=[100 * rate for rate in RATES])
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        if name == "noise":
            axis.set_yscale("log")
        else:
            axis.axhline(0, color=style.INK, lw=0.5)
        style.label_ends(axis)
    for axis in axes[1]:
        axis.set_xlabel("rate, %")
    figure.suptitle(f"Gradients of the gate after {step} steps of reversal, error {own.error.mean():.2f}", fontsize=11)
    record.save(figure, folder / "gradients.png")


def main() -> None:
    args = record.parser(__doc__).parse_args()
    path = args.out / "gradients.csv"
    tasks = [Task(0, 50, 2, 10, 30)] if args.quick else [Task(seed) for seed in range(args.seeds)]
    frame = record.read(path) if args.draw else record.collect(tasks, measure, path, args.workers)
    report(frame)
    draw(frame, args.out)


if __name__ == "__main__":
    main()
