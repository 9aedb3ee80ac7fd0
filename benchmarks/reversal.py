"""Token reversal: does a gated run learn, and what does it pay, in steps, rows and seconds?

    python benchmarks/reversal.py               # what is committed in benchmarks/results, into out/
    python benchmarks/reversal.py --seeds 10    # adds five seeds to it
    python benchmarks/reversal.py --quick       # DG-K and random rows, one seed

The experiment of arXiv 2603.20526: the answer to a prompt of H uniform tokens out of M is the prompt reversed; the
reward is the fraction of its tokens that are right; 10 prompts x 10 samples a step; the baseline is the mean of the
prompt's group. A decoder of 3 layers and width 64, Adam 3e-4, one update a batch. The error of a step is 1 - the mean
reward of its batch, which was sampled before the update. Each run has one thread, and seconds are those that it spent
on a CPU, so that what else the machine does is not in them.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import record
import style
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F

import kondo_hooks as kondo

PROMPTS, SAMPLES = 10, 10
PHASES = ("sampling", "screen", "loss", "replay", "optimizer")
SOLVED = 0.05

Cache = list[tuple[Tensor, Tensor]]
Weights = dict[str, Tensor]


class Block(nn.Module):
    """Pre-norm attention and MLP, no biases."""

    def __init__(self, width: int, heads: int, ff: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, ff, bias=False), nn.Linear(ff, width, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, D) -> (B, T, D) and the keys and values so far, (B, heads, T, D / heads) each."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(self.up(self.norm2(x)).relu()), (k, v)


class Decoder(nn.Module):
    """The paper's decoder: learned positions, ReLU, no biases."""

    def __init__(self, vocabulary: int, length: int, width: int = 64, layers: int = 3, heads: int = 4, ff: int = 128):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, ff) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, past: Cache | None = None) -> Tensor | tuple[Tensor, Cache]:
        """(B, T) tokens -> (B, T, M) logits of the next token; with the keys and values before them, also the new."""
        start = past[0][0].shape[2] if past else 0
        x = self.token(tokens) + self.position.weight[start : start + tokens.shape[1]]
        cache = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, past[i] if past else None)
            cache.append(kv)
        logits = self.head(self.norm(x))
        return logits if past is None else (logits, cache)


def snapshot(model: nn.Module) -> Weights:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@dataclass
class Batch:
    """Sampled answers.

    Attributes:
        sequences: (B, 2H - 1) prompt and answer without its last token.
        answers: (B, H) sampled tokens.
        logp: (B, H) log-probs of them as the sampler saw them.
        right: (B, H) whether they are those of the reversed prompt.
    """

    sequences: Tensor
    answers: Tensor
    logp: Tensor
    right: Tensor

    @property
    def rewards(self) -> Tensor:
        """(B,) fraction of right tokens."""
        return self.right.float().mean(1)

    @property
    def advantages(self) -> Tensor:
        """(B,) reward less the mean of the prompt's group."""
        groups = self.rewards.view(-1, SAMPLES)
        return (groups - groups.mean(1, keepdim=True)).flatten()


@torch.no_grad()
def sample(model: Decoder, horizon: int, tokens: int, generator: torch.Generator, number: int = PROMPTS) -> Batch:
    prompts = torch.randint(tokens, (number, horizon), generator=generator)
    logits, cache = model(prompts, [])
    cache = [(k.repeat_interleave(SAMPLES, 0), v.repeat_interleave(SAMPLES, 0)) for k, v in cache]
    logits = logits[:, -1].repeat_interleave(SAMPLES, 0)
    answers, logps = [], []
    for i in range(horizon):
        logp = logits.log_softmax(-1)
        taken = torch.multinomial(logp.exp(), 1, generator=generator)
        answers.append(taken)
        logps.append(logp.gather(1, taken))
        if i < horizon - 1:
            following, cache = model(taken, cache)
            logits = following[:, -1]
    answer = torch.cat(answers, 1)
    prompts = prompts.repeat_interleave(SAMPLES, 0)
    return Batch(torch.cat((prompts, answer[:, :-1]), 1), answer, torch.cat(logps, 1), answer == prompts.flip(1))


Loss = Callable[[Tensor, Batch], Tensor]


def pg_loss(logp: Tensor, batch: Batch) -> Tensor:
    return -(logp * batch.advantages.unsqueeze(1)).mean()


def ppo_loss(logp: Tensor, batch: Batch) -> Tensor:
    advantages, ratio = batch.advantages.unsqueeze(1), (logp - batch.logp).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def dg_loss(logp: Tensor, batch: Batch) -> Tensor:
    advantages = batch.advantages.unsqueeze(1)
    return -(torch.sigmoid(-logp.detach() * advantages) * logp * advantages).mean()


Screen = Callable[[Batch], dict[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        gate: what ``kondo.gated`` is given, or None for a loop without a gate.
        loss: of the answers' log-probs and their batch.
        screen: made for the model of a run, gives from a batch what ``gate.preselect`` is told before the forward.
        epochs: updates a batch.
        prompts: in a batch, with ten answers each.
    """

    gate: dict[str, Any] | None = None
    loss: Loss = pg_loss
    screen: Callable[[Decoder], Screen] | None = None
    epochs: int = 1
    prompts: int = PROMPTS


def sampled(model: Decoder) -> Screen:
    """Screen by the sampler's own log-probs, which cost nothing."""
    return lambda batch: {"logp": batch.logp, "advantages": batch.advantages}


def positive(model: Decoder) -> Screen:
    """Rows of positive advantage, at random: what is left of delight when it does not rank."""
    return lambda batch: {"delight": torch.rand(len(batch.advantages)) * (batch.advantages > 0)}


RATES = (0.01, 0.03, 0.1, 0.3)
TOKEN_RATES = (0.03, 0.1, 0.3)
CONTROLS = {"random": "uniform", **{p: p for p in ("advantage", "abs_advantage", "surprisal", "additive")}}
METHODS: dict[str, Method] = {
    "PG": Method(),
    "PPO": Method(loss=ppo_loss, epochs=4),  # with one update a batch the ratio is 1 and PPO is PG
    "DG": Method(loss=dg_loss),
    **{f"DG-K {rate:.0%}": Method({"rate": rate}) for rate in RATES},
    **{f"DG-K tokens {rate:.0%}": Method({"rate": rate, "unit": "token"}) for rate in TOKEN_RATES},
    "DG-K price 0": Method({"price": 0.0}),
    "DG-K 10%, DG-weighted": Method({"rate": 0.1, "weight": "dg"}),
    "DG-K 10%, screen-first": Method({"rate": 0.1}, screen=sampled),
    **{
        f"{name} {rate:.0%}": Method({"rate": rate, "priority": priority})
        for name, priority in CONTROLS.items()
        for rate in RATES
    },
    "advantage 10%, screen-first": Method({"rate": 0.1, "priority": "advantage"}, screen=sampled),
    "random positive 10%, screen-first": Method({"rate": 0.1}, screen=positive),
    "DG, random 10%": Method({"rate": 0.1, "priority": "uniform"}, loss=dg_loss),
    "DG, small batch 10%": Method(loss=dg_loss, prompts=PROMPTS // 10),
}
STEPS = dict.fromkeys(METHODS, 600)
STEPS |= dict.fromkeys(("PG", "DG-K 10%", "random 10%", "DG, random 10%", "DG, small batch 10%"), 3000)
RULES: dict[str, Method] = {
    **{name: METHODS[name] for name in ("PG", "DG", "DG-K 10%", "random 10%", "abs_advantage 10%")},
    **{f"noise {noise:g}": Method({"noise": noise}) for noise in (0.5, 1.0)},
    "lossless": Method({"rate": "lossless"}),
    "auto": Method({"rate": "auto"}),
}
RULES_TITLE = "token reversal by rules that weigh"
RULE_STEPS = dict.fromkeys(RULES, 600) | dict.fromkeys(("PG", "random 10%", "noise 0.5", "auto"), 2000)
INIT = ("PG", "DG", "DG-K 10%", "random 10%")
HORIZONS, VOCABULARIES = (5, 10, 15, 20, 25), (2, 4, 8)


@dataclass(frozen=True)
class Task:
    """One run of H 10 and M 2."""

    method: str
    seed: int
    steps: int = 600


@dataclass(frozen=True)
class InitTask(Task):
    """The same from other weights."""

    init: str = "unit embeddings"


@dataclass(frozen=True)
class ClimbTask:
    """Runs of other H and M, each until it is solved or its seconds are spent."""

    method: str
    seed: int
    budget: float


def small_embeddings(model: Decoder) -> None:
    for embedding in (model.token, model.position):
        nn.init.normal_(embedding.weight, std=0.02)


def unit_embeddings(model: Decoder) -> None:
    for embedding in (model.token, model.position):
        nn.init.normal_(embedding.weight)


def all_small(model: Decoder) -> None:
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.02)


INITS = {"unit embeddings": unit_embeddings, "all weights 0.02": all_small}
INIT_STEPS = {"unit embeddings": 1000, "all weights 0.02": 3000}


@dataclass
class Clock:
    """Seconds spent in each phase."""

    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    last: float = 0.0

    def start(self) -> None:
        self.last = time.process_time()

    def stop(self, phase: str) -> None:
        now = time.process_time()
        self.spent[phase] += now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return sum(self.spent.values())


EVERY = 20


def answers_logp(logits: Tensor, batch: Batch) -> Tensor:
    """(B, H) log-probs of the answers, from the logits of whole sequences."""
    answers = batch.answers.unsqueeze(-1)
    return logits[:, -answers.shape[1] :].log_softmax(-1).gather(-1, answers).squeeze(-1)


def train(task: Task) -> record.Rows:
    init = INITS[task.init] if isinstance(task, InitTask) else small_embeddings
    return learn((METHODS | RULES)[task.method], task.seed, steps=task.steps, init=init)


def climb(task: ClimbTask) -> record.Rows:
    """Look for the longest H and the largest M that a method solves within its seconds.

    From H 10 and M 2 up in H and then up in M, each until one is not solved; down to H 5 if H 10 is not.
    """
    rows: record.Rows = []

    def solved(horizon: int, tokens: int) -> bool:
        last = learn(METHODS[task.method], task.seed, horizon, tokens, steps=10**6, budget=task.budget)[-1]
        in_time = last["error"] <= SOLVED and sum(last[phase] for phase in PHASES) <= task.budget
        rows.append({"horizon": horizon, "tokens": tokens, "solved": in_time, **last})
        return in_time

    shorter, start, *longer = HORIZONS
    few, *more = VOCABULARIES
    if solved(start, few):
        all(solved(horizon, few) for horizon in longer)  # ends at the first that is not
    else:
        solved(shorter, few)
    all(solved(start, tokens) for tokens in more)
    return rows


def learn(
    method: Method,
    seed: int,
    horizon: int = 10,
    tokens: int = 2,
    steps: int = 1000,
    budget: float = 0.0,
    init: Callable[[Decoder], None] = small_embeddings,
    probe: Callable[[int, Decoder, Batch], None] = lambda step, model, batch: None,
) -> record.Rows:
    """Train from scratch; ``probe`` sees each step's batch before the update, while the clock is off.

    Returns:
        A row every 20 steps: the mean error of their batches, rows with a backward and seconds so far.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(tokens, 2 * horizon - 1)
    init(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    screen = method.screen(model) if method.screen else None
    clock, errors, rows, backward_rows = Clock(), [], [], 0
    gated = nullcontext() if method.gate is None else kondo.gated(model, **method.gate, seed=seed)
    with gated as gate:
        for step in range(1, steps + 1):
            clock.start()
            batch = sample(model, horizon, tokens, generator, method.prompts)
            clock.stop("sampling")
            probe(step, model, batch)
            for _ in range(method.epochs):
                clock.start()
                if screen is not None:
                    gate.preselect(**screen(batch))
                logits = model(batch.sequences)
                clock.stop("screen")
                loss = method.loss(answers_logp(logits, batch), batch)
                clock.stop("loss")
                loss.backward()
                clock.stop("replay")
                optimizer.step()
                optimizer.zero_grad()
                clock.stop("optimizer")
                backward_rows += len(batch.rewards)
            errors.append(1 - batch.rewards.mean().item())
            if step % EVERY == 0 or step == steps:
                latest = errors[-EVERY:]
                error = sum(latest) / len(latest)
                backward_rows = gate.stats.forwarded if gate else backward_rows
                spent = {phase: round(seconds, 3) for phase, seconds in clock.spent.items()}
                rows.append({"step": step, "error": round(error, 4), "backward_rows": backward_rows, **spent})
                if budget and (clock.total > budget or error <= SOLVED):
                    break
    return rows


def tasks(args: Any) -> dict[str, tuple[Callable[[Any], record.Rows], list[Any]]]:
    """The runs of each file: the curves, the same from other weights, and the table of difficulty."""
    if args.quick:
        # From these weights random rows stay on their plateau for thousands of steps, whatever the seed.
        return {"reversal_init": (train, [InitTask(m, 0, init="all weights 0.02") for m in ("DG-K 10%", "random 10%")])}
    seeds = range(args.seeds)
    return {
        "reversal": (train, [Task(m, seed, steps=args.steps or STEPS[m]) for seed in seeds for m in METHODS]),
        "reversal_init": (
            train,
            [InitTask(m, seed, steps=INIT_STEPS[init], init=init) for seed in seeds for init in INITS for m in INIT],
        ),
        "reversal_rules": (train, [Task(m, seed, steps=RULE_STEPS[m]) for seed in seeds for m in RULES]),
        "reversal_difficulty": (climb, [ClimbTask(m, seed, args.budget) for seed in seeds for m in METHODS]),
    }


def timed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(seconds=frame[[*PHASES]].sum(axis=1))


def report(frame: pd.DataFrame, title: str = "token reversal, H 10, M 2") -> None:
    early = frame.steps.min()
    table, phases = [], []
    for method, own in frame.groupby("method", sort=False):
        at, last = own[own.step == early], own[own.step == own.steps]
        table.append(
            {
                "method": method,
                f"error %, {early} steps": record.spread(100 * at.error),
                "at the end": f"{record.spread(100 * last.error)} ({last.step.max()})",
                **record.cost(own, SOLVED),
                **record.cost(own, 0.01),
            }
        )
        ms = 1000 * last[[*PHASES, "seconds"]].div(last.step, axis=0).median()
        phases.append({"method": method, **{name: f"{value:.1f}" for name, value in ms.items()}})
    record.print_table(table, f"{title}, {frame.seed.nunique()} seeds")
    if title == RULES_TITLE:
        return
    record.print_table(phases, "milliseconds a step; without a gate, screen and replay are its forward and backward")


def longest(runs: pd.DataFrame) -> "pd.Series[float]":
    """The largest H that each seed solved with two tokens, 0 if none."""
    solved = runs[runs.solved & (runs.tokens == 2)].groupby("seed").horizon.max()
    return solved.reindex(runs.seed.unique(), fill_value=0)


def report_difficulty(frame: pd.DataFrame) -> None:
    table = []
    shapes = sorted({*zip(frame.tokens, frame.horizon, strict=True)})
    for method, own in frame.groupby("method", sort=False):
        row = {"method": method, "longest H": record.spread(longest(own))}
        for tokens, horizon in shapes:
            at = own[(own.tokens == tokens) & (own.horizon == horizon)]
            took = f"{at[at.solved].seconds.median():.0f} s" if at.solved.any() else f"{100 * at.error.mean():.0f}%"
            row[f"H {horizon}, M {tokens}"] = f"{at.solved.sum()}/{len(at)}, {took}" if len(at) else "-"
        table.append(row)
    record.print_table(
        table,
        f"seeds that reached {SOLVED:.0%} in {frame.budget.max():.0f} s / that tried, and their median seconds "
        "(if none: the mean error)",
    )


def report_init(frame: pd.DataFrame) -> None:
    for init, runs in frame.groupby("init", sort=False):
        table = []
        for method, own in runs.groupby("method", sort=False):
            error = record.spread(100 * own[own.step == own.steps].error)
            table.append({"method": method, "error %": error, **record.cost(own, SOLVED)})
        record.print_table(table, f"from other weights: {init}, {runs.steps.max()} steps")


REPORTS = {"reversal": report, "reversal_init": report_init, "reversal_difficulty": report_difficulty}
DRAWN = tuple(REPORTS)
REPORTS |= {"reversal_rules": lambda frame: report(frame, RULES_TITLE)}
SHOWN = ("PG", "PPO", "DG", "DG-K 3%", "DG-K 10%", "DG-K 10%, screen-first", "DG, small batch 10%", "random 10%")
BY_RATE = ("DG-K", "random", "advantage", "abs_advantage", "surprisal", "additive", "DG-K tokens")


def draw(frames: dict[str, pd.DataFrame], folder: Path) -> None:
    frame, _, difficulty = (frames[name] for name in DRAWN)
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5))
    titles = (
        "few rows are enough, if they are well chosen",
        "in seconds too, most of all before the forward",
    )
    for axis, x, title in zip(axes[0], ("backward_rows", "seconds"), titles, strict=True):
        for method in SHOWN:
            record.curve(axis, frame[frame.method == method], x, color=style.color(method), label=method)
        label = {"backward_rows": "rows with a backward", "seconds": "CPU seconds, sampling included"}[x]
        axis.set(xlabel=label, ylabel="error", xscale="log", ylim=(0, 0.6), title=title)
        axis.set_yscale("symlog", linthresh=0.01)
        style.label_ends(axis)
    draw_rates(axes[1, 0], frame)
    draw_longest(axes[1, 1], difficulty)
    record.save(figure, folder / "reversal.png")


def draw_rates(axis: Axes, frame: pd.DataFrame) -> None:
    early = frame.steps.min()
    at = frame[frame.step == early]
    by_rate(axis, 100 * at.set_index(["method", "seed"]).error)
    axis.set(ylabel=f"error after {early} steps, %", ylim=(-2, 60), title="what is kept matters more than how much")
    style.label_ends(axis)


def draw_longest(axis: Axes, frame: pd.DataFrame) -> None:
    by_rate(axis, pd.concat({method: longest(own) for method, own in frame.groupby("method")}, names=["method"]))
    for method in ("PG", "DG", "DG-K 10%, screen-first"):
        mean = longest(frame[frame.method == method]).mean()
        axis.plot([1, 30], [mean, mean], color=style.color(method), ls=(0, (3, 5)), lw=1.2, label=method)
    seconds = frame.budget.max()
    axis.set(ylabel=f"longest H solved in {seconds:.0f} s", ylim=(-1, 26), yticks=(0, *HORIZONS))
    axis.set_title("with more to reverse in the same seconds")
    style.label_ends(axis)


def by_rate(axis: Axes, values: "pd.Series[float]") -> None:
    """``values`` by method and seed: a line for each kind of gate, and the interval over seeds."""
    frame = values.rename("value").reset_index()
    found = frame.join(frame.method.str.extract(r"^(?P<kind>.+) (?P<rate>\d+)%$"))
    for i, kind in enumerate(BY_RATE):
        own = found[found.kind == kind]
        record.points(axis, own.value, own.rate.astype(float), kind, 1.03 ** (i - 3))
    axis.set(xlabel="rate, %", xscale="log", xticks=[100 * rate for rate in RATES])
    axis.minorticks_off()
    axis.xaxis.set_major_formatter("{x:.0f}")


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--steps", type=int, help="of every run of the curves; by default 600 or 3,000, see STEPS")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds for each run of the table of difficulty")
    parser.add_argument("--only", choices=tuple(REPORTS), help="one of the files")
    args = parser.parse_args()
    frames = {}
    for name, frame in record.collect_each(tasks(args), args):
        frames[name] = timed(frame)
        REPORTS[name](frames[name])
    if frames.keys() >= {*DRAWN}:
        draw(frames, args.out)


if __name__ == "__main__":
    main()
