"""GRPO on a pre-trained policy: which rows may be left out, by each rule, and what that saves at what cost of sampling.

    python benchmarks/pretrained.py            # what is committed in benchmarks/results, into out/: two hours of 1 core
    python benchmarks/pretrained.py --quick    # sorting by four rules, one seed, 300 steps

Two tasks of digits: the sum of two numbers of three digits, and six digits in order. A decoder of 2 layers and width 64
learns each from examples until 28% of its sampled answers are right, and then from the reward alone: 1 if the whole
answer is right, 8 prompts x 8 answers a step, advantages normalised within the prompt's group, one update a batch,
Adam 1e-4. Every 50 steps 16 answers to each of 256 new prompts tell the share that is right, pass@4 and pass@16 (Chen
et al. 2021, arXiv 2107.03374) and the entropy of a token. Seconds are of a CPU, one thread a run, without these looks.
"""

import copy
import functools
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import record
import style
import torch
from reversal import Decoder
from torch import Tensor, nn
from torch.nn import functional as F

import kondo_hooks as kondo

VOCABULARY, PLUS, EQUALS = 12, 10, 11
PROMPTS, ANSWERS = 8, 8
START = 0.28
EVERY, LOOKED_AT, LOOKS = 50, 256, 16
SHORT, LONG = 300, 1000
FORWARD = 1 / 3  # of a step's forward and backward
GENERATION = (0, 1, 3)  # seconds of sampling a batch, in steps of all rows


def digits(numbers: Tensor, places: int) -> Tensor:
    """(N,) -> (N, places), the highest first."""
    return numbers[:, None] // 10 ** torch.arange(places - 1, -1, -1) % 10


def addition(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``a + b =`` (N, 8), and the four digits of the sum (N, 4)."""
    a, b = torch.randint(1000, (2, number), generator=generator)
    plus, equals = torch.full((number, 1), PLUS), torch.full((number, 1), EQUALS)
    return torch.cat([digits(a, 3), plus, digits(b, 3), equals], 1), digits(a + b, 4)


def sorting(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Six digits and ``=`` (N, 7), and the same in order (N, 6)."""
    drawn = torch.randint(10, (number, 6), generator=generator)
    return torch.cat([drawn, torch.full((number, 1), EQUALS)], 1), drawn.sort(1).values


TASKS = {"addition": addition, "sorting": sorting}


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        gate: what ``kondo.gated`` is given, or None for a loop without a gate.
        prompts: in a batch.
        dg: weight each token's loss by sigmoid(delight).
    """

    gate: dict[str, Any] | None = None
    prompts: int = PROMPTS
    dg: bool = False


METHODS = {
    "all rows": Method(),
    "quarter of the batch": Method(prompts=PROMPTS // 4),
    "DG, all rows": Method(dg=True),
    "random 30%": Method({"rate": 0.3, "priority": "uniform"}),
    "delight 3%": Method({"rate": 0.03}),
    "delight 10%": Method({"rate": 0.1}),
    "delight 30%": Method({"rate": 0.3}),
    "|advantage| 30%": Method({"rate": 0.3, "priority": "abs_advantage"}),
    "CPPO 25%": Method({"rule": kondo.rules.cppo(0.25), "groups": ANSWERS}),
    "PODS 25%": Method({"rule": kondo.rules.pods(0.25), "groups": ANSWERS}),
    "positive rows, noise 0.5": Method({"rule": kondo.rules.positive(0.5)}),
    "norm 30%, drawn": Method({"rate": 0.3, "priority": "norm", "unbiased": True}),
    "noise 0.25": Method({"noise": 0.25}),
    "noise 0.5": Method({"noise": 0.5}),
    "noise 1": Method({"noise": 1.0}),
    "lossless": Method({"rate": "lossless"}),
    "auto": Method({"rate": "auto"}),
}


@dataclass(frozen=True)
class Task:
    """One run."""

    task: str
    method: str
    seed: int
    steps: int = LONG


def spread_out(prompts: Tensor, answers: int) -> Tensor:
    return prompts.repeat_interleave(answers, 0)


@torch.no_grad()
def sample(model: Decoder, prompts: Tensor, length: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Answers (B, length) to prompts (B, P), and the mean entropy of the policy at their tokens, in nats."""
    logits, cache = model(prompts, [])
    logits, answers, entropy = logits[:, -1], list[Tensor](), 0.0
    for place in range(length):
        policy = logits.softmax(-1)
        entropy += float(torch.special.entr(policy).sum(-1).mean()) / length
        answers.append(torch.multinomial(policy, 1, generator=generator))
        if place + 1 < length:
            logits, cache = model(answers[-1], cache)
            logits = logits[:, -1]
    return torch.cat(answers, 1), entropy


def answers_logp(logits: Tensor, answers: Tensor) -> Tensor:
    """(B, L) log-probs of the last L tokens, from the logits of whole sequences without their last token."""
    logp = logits[:, -answers.shape[1] :].log_softmax(-1)
    return logp.gather(-1, answers[..., None]).squeeze(-1)


def look(model: Decoder, task: str, seed: int) -> dict[str, float]:
    """What the policy does on prompts that it was not trained on, the same at every look."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    prompts, truth = TASKS[task](LOOKED_AT, generator)
    answers, entropy = sample(model, spread_out(prompts, LOOKS), truth.shape[1], generator)
    right = (answers == spread_out(truth, LOOKS)).all(1).view(LOOKED_AT, LOOKS).sum(1).numpy()
    return {
        "right": float(right.mean()) / LOOKS,
        **{f"pass@{k}": pass_at(right, k) for k in (4, 16)},
        "entropy": entropy,
    }


def pass_at(right: np.ndarray, k: int) -> float:
    """Share of prompts of which at least one of ``k`` answers is right, from how many of ``LOOKS`` were."""
    wrong = np.stack([(LOOKS - right - i).clip(0) / (LOOKS - i) for i in range(k)])
    return float(1 - wrong.prod(0).mean())


@functools.cache
def pretrained(task: str, seed: int) -> Decoder:
    """A decoder that has learned from examples until ``START`` of its answers are right."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    prompts, truth = TASKS[task](1, generator)
    model = Decoder(VOCABULARY, prompts.shape[1] + truth.shape[1] - 1, layers=2)
    for embedding in (model.token, model.position):
        nn.init.normal_(embedding.weight, std=0.02)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    while (right := look(model, task, seed)["right"]) < START:
        for _ in range(2 if right > START / 2 else 20):  # it rises fast in the end
            prompts, truth = TASKS[task](256, generator)
            sequences = torch.cat([prompts, truth], 1)
            logits = model(sequences[:, :-1])
            F.cross_entropy(logits[:, -truth.shape[1] :].flatten(0, 1), truth.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def train(task: Task) -> record.Rows:
    """Points of a learning curve: looks at the policy, rows with a graph and seconds so far."""
    method, prompts_of = METHODS[task.method], TASKS[task.task]
    model = copy.deepcopy(pretrained(task.task, task.seed))
    generator = torch.Generator().manual_seed(task.seed)
    torch.manual_seed(task.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    spent = {"learner": 0.0, "all": 0.0}
    rows: record.Rows = []
    gated = nullcontext() if method.gate is None else kondo.gated(model, **method.gate, seed=task.seed)
    with gated as gate:
        for step in range(task.steps + 1):
            if step % EVERY == 0:
                seen = look(model, task.task, task.seed)
                trained = step * method.prompts * ANSWERS if gate is None else gate.stats.forwarded
                rows.append(
                    {
                        "step": step,
                        **seen,
                        "rows": trained,
                        "learner_seconds": spent["learner"],
                        "seconds": spent["all"],
                    }
                )
            start = time.process_time()
            prompts, truth = prompts_of(method.prompts, generator)
            prompts = spread_out(prompts, ANSWERS)
            answers, _ = sample(model, prompts, truth.shape[1], generator)
            rewards = (answers == spread_out(truth, ANSWERS)).all(1).float().view(-1, ANSWERS)
            u = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)
            learning = time.process_time()
            logp = answers_logp(model(torch.cat([prompts, answers], 1)[:, :-1]), answers)
            loss = -u * logp
            if method.dg:
                loss = loss * (-u * logp).detach().sigmoid()
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            spent["learner"] += time.process_time() - learning
            spent["all"] += time.process_time() - start
    return rows


def paired(runs: pd.DataFrame) -> pd.DataFrame:
    """For each method, task and seed: steps and share of rows with a graph until half of what all rows gain is gained.

    The gain is that of the mean over seeds at the end, and a curve counts by the mean of three looks. A run that never
    gets there has NaN.
    """
    runs = runs.sort_values(["task", "method", "seed", "step"])
    runs = runs.assign(
        smooth=runs.groupby(["task", "method", "seed"]).right.transform(lambda r: r.rolling(3, 1).mean())
    )
    base = runs[runs.method == "all rows"].groupby(["task", "step"]).smooth.mean().unstack()
    half = (base[0] + base[LONG]) / 2
    there = runs[runs.smooth >= runs.task.map(half)]
    key = ["method", "task", "seed"]
    first = there.groupby(key)[["step", "rows"]].first()
    found = first.reindex(pd.MultiIndex.from_frame(runs[key].drop_duplicates()))
    ended = runs[runs.step == LONG].set_index(key).rows / (LONG * PROMPTS * ANSWERS)
    return found.assign(
        kept=ended, times=found.step / found.xs("all rows").step.reindex(found.index.droplevel(0)).to_numpy()
    )


def costs(method: str, kept: float, times: float) -> dict[str, str]:
    """What it takes to get there against all rows, by how dear sampling is: with the gate's screen, and without it."""
    cells = {}
    share = METHODS[method].prompts / PROMPTS
    for generation in GENERATION:
        learners = [kept] if METHODS[method].gate is None else [FORWARD + kept, kept]
        values = [times * (share * generation + learner) / (generation + 1) for learner in learners]
        cells[f"cost at {generation}"] = " / ".join(f"{value:.2f}" for value in values)
    return cells


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a method: what is right after a short and a long run, what its answers are like, and what it cost."""
    pairs, found = paired(runs), []
    of_all = runs[(runs.method == "all rows") & (runs.step == LONG)].learner_seconds.mean()
    for method, own in runs.groupby("method", sort=False):
        mine = pairs.loc[method]
        missed, kept, times = int(mine.times.isna().sum()), mine.kept.mean(), mine.times.mean()
        row = {"method": method, "kept": f"{kept:.0%}"}
        for task, of_task in own.groupby("task", sort=False):
            for step in (SHORT, LONG):
                row[f"{task} {step}"] = record.spread(100 * of_task[of_task.step == step].right, "{:.0f}")
        last = own[own.step == LONG]
        row |= {"pass@16": f"{100 * last['pass@16'].mean():.0f}", "entropy": f"{last.entropy.mean():.2f}"}
        row["steps to half"] = f"misses {missed} of {len(mine)}" if missed else f"{times:.2f} ({mine.times.max():.2f})"
        row |= {name: "-" if missed else cell for name, cell in costs(method, kept, times).items()}
        found.append(row | {"learner s": f"{last.learner_seconds.mean() / of_all:.2f}"})
    return pd.DataFrame(found)


SHOWN = ("quarter of the batch", "random 30%", "delight 10%", "delight 30%", "noise 0.5", "lossless", "auto")


TITLES = {
    "addition": ("sums: delight 10% and random rows fall behind", "sums: a third of the rows is enough"),
    "sorting": ("sorting: the same, less", "sorting: a third of the rows is enough"),
}


def draw(runs: pd.DataFrame) -> plt.Figure:
    """What is right against steps and against rows with a graph; a row of pictures a task."""
    figure, axes = plt.subplots(len(TASKS), 2, figsize=(12, 8), squeeze=False)
    for row, task in zip(axes, TASKS, strict=True):
        for method in ("all rows", *SHOWN):
            own = runs[(runs.task == task) & (runs.method == method)]
            if own.empty:
                continue
            mean = own.groupby("step").mean(numeric_only=True)
            look = {"label": method, "color": style.color(method)}
            row[0].plot(mean.index, 100 * mean.right, **look)
            row[1].plot(mean.rows, 100 * mean.right, **look)
        for axis, title, x in zip(row, TITLES[task], ("steps", "rows with a graph"), strict=True):
            axis.set(title=title, xlabel=x, ylabel="right, %")
            style.label_ends(axis)
    return figure


def main() -> None:
    args = record.parser(__doc__).parse_args()
    if args.quick:
        tasks = [Task("sorting", m, 0, 300) for m in ("all rows", "random 30%", "delight 10%", "noise 0.5")]
    else:
        tasks = [Task(task, m, seed) for seed in range(args.seeds) for task in TASKS for m in METHODS]
    path = args.out / "pretrained.csv"
    runs = record.read(path) if args.draw else record.collect(tasks, train, path, args.workers)
    if args.quick:
        return record.print_table(runs[runs.step == SHORT], "sorting, one seed")
    record.print_table(table(runs), f"GRPO on a pre-trained policy, {runs.seed.nunique()} seeds: % right, cost")
    record.save(draw(runs), args.out / "pretrained.png")


if __name__ == "__main__":
    main()
