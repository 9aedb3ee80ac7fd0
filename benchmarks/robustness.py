"""How wrong may delight be? Noise, cheap and stale screens, gambling arms, and vocabularies that grow.

    python benchmarks/robustness.py
    python benchmarks/robustness.py --only robustness_noise   # one of the files
    python benchmarks/robustness.py --quick

- noise: token reversal (H 10, M 2; benchmarks/reversal.py) with an answer's delight, for DG that of each of its tokens,
  times 1 + s * N(0, 1), s from 0 to 2.
- screens: the same, with delight from a cheaper or an older model, told by ``gate.preselect`` before the forward.
- gambling: a tabular bandit of 16 contexts and 10 arms; the best arm pays 1, the others 0 (the gap); noise of standard
  deviation s on one bad arm of each context, or on all arms. The baseline is the expected reward.
- vocabulary: token reversal with H 5 and M tokens, at fixed rates and with the adaptive gate (price 0).
"""

import copy
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import record
import style
import torch
from gradients import cosine, gradient
from matplotlib.axes import Axes
from reversal import (
    METHODS,
    RULES,
    SOLVED,
    Batch,
    Decoder,
    Loss,
    Method,
    Screen,
    Weights,
    answers_logp,
    dg_loss,
    learn,
    sampled,
    snapshot,
)
from torch import Tensor, nn

import kondo_hooks as kondo

STEPS = 300
NOISE = (0.0, 0.5, 1.0, 2.0)
NOISE_SEED = 10_000  # the sampler's generator has the run's seed


@dataclass(frozen=True)
class Noise:
    """Relative noise on the delight of one method."""

    method: str
    noise: float
    seed: int
    steps: int = STEPS


def delight(batch: Batch) -> Tensor:
    """(B,) advantage x surprisal of the whole answer."""
    return -batch.logp.sum(1) * batch.advantages


def noisy_dg(noise: float, seed: int) -> Loss:
    generator = torch.Generator().manual_seed(NOISE_SEED + seed)

    def loss(logp: Tensor, batch: Batch) -> Tensor:
        exact = -logp.detach() * batch.advantages.unsqueeze(1)
        seen = exact * (1 + noise * torch.randn((len(exact), 1), generator=generator))
        return -(seen.sigmoid() * logp * batch.advantages.unsqueeze(1)).mean()

    return loss


def noisy_screen(noise: float, seed: int) -> Callable[[Decoder], Screen]:
    generator = torch.Generator().manual_seed(NOISE_SEED + seed)

    def screen(batch: Batch) -> dict[str, Tensor]:
        exact = delight(batch)
        return {"delight": exact * (1 + noise * torch.randn(exact.shape, generator=generator))}

    return lambda model: screen


def run_noise(task: Noise) -> record.Rows:
    if task.method == "DG":
        method = Method(loss=noisy_dg(task.noise, task.seed))
    else:
        method = Method(METHODS[task.method].gate, screen=noisy_screen(task.noise, task.seed))
    return learn(method, task.seed, steps=task.steps)[-1:]


@torch.no_grad()
def seen_by(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"logp": answers_logp(model(batch.sequences).float(), batch), "advantages": batch.advantages}


def bf16(model: Decoder) -> Screen:
    return lambda batch: seen_by(copy.deepcopy(model).bfloat16(), batch)


def int8(model: Decoder) -> Screen:
    def screen(batch: Batch) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # eager-mode quantisation is deprecated in favour of a package of its own
            return seen_by(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8), batch)

    return screen


def draft(layers: int) -> Callable[[Decoder], Screen]:
    """The model's own first layers and its head."""

    def make(model: Decoder) -> Screen:
        short = Decoder(model.token.num_embeddings, model.position.num_embeddings, layers=layers)
        short.token, short.position, short.norm, short.head = model.token, model.position, model.norm, model.head
        short.blocks = model.blocks[:layers]
        return lambda batch: seen_by(short, batch)

    return make


def stale(updates: int) -> Callable[[Decoder], Screen]:
    """The model as it was some updates ago. What it costs to keep the weights is in the time."""

    def make(model: Decoder) -> Screen:
        weights: deque[Weights] = deque(maxlen=updates + 1)
        old = copy.deepcopy(model)

        def screen(batch: Batch) -> dict[str, Tensor]:
            weights.append(snapshot(model))
            old.load_state_dict(weights[0])
            return seen_by(old, batch)

        return screen

    return make


SCREENS: dict[str, Method] = {
    "full DG": METHODS["DG"],
    "exact: the gate's own forward": METHODS["DG-K 10%"],
    "exact: the sampler's log-probs": Method({"rate": 0.1}, screen=sampled),
    "bf16 copy": Method({"rate": 0.1}, screen=bf16),
    "int8 dynamic quantisation": Method({"rate": 0.1}, screen=int8),
    "draft: first 2 of 3 layers": Method({"rate": 0.1}, screen=draft(2)),
    "draft: first 1 of 3 layers": Method({"rate": 0.1}, screen=draft(1)),
    **{f"{k} updates old": Method({"rate": 0.1}, screen=stale(k)) for k in (1, 5, 20)},
    "random rows": METHODS["random 10%"],
}


@dataclass(frozen=True)
class Screened:
    """Token reversal, with delight from this signal."""

    signal: str
    seed: int
    steps: int = STEPS


def run_screen(task: Screened) -> record.Rows:
    """The end of a run; from every 10th batch before it is learned, what was kept and the cosine to the full DG."""
    method = SCREENS[task.signal]
    looked_at: list[tuple[Weights, Batch]] = []
    told: list[dict[str, Tensor]] = []

    def probe(step: int, model: Decoder, batch: Batch) -> None:
        if step % 10 == 0 and batch.rewards.mean() < 1 - SOLVED:
            looked_at.append((snapshot(model), batch))

    def recording(model: Decoder) -> Screen:
        screen = method.screen(model)

        def seen(batch: Batch) -> dict[str, Tensor]:
            signal = screen(batch)
            if len(told) < len(looked_at):
                told.append(signal)
            return signal

        return seen

    learner = Method(method.gate, method.loss, recording if method.screen else None)
    row = learn(learner, task.seed, steps=task.steps, probe=probe)[-1]
    model, looks = Decoder(2, 19), []
    for i, (weights, batch) in enumerate(looked_at):
        model.load_state_dict(weights)
        gated = nullcontext() if method.gate is None else kondo.gated(model, **method.gate, seed=i)
        with gated as gate:
            if told:
                gate.preselect(**told[i])
            own = gradient(model, batch, method.loss)
        exact = delight(batch)
        kept = gate.last.kept if gate else torch.arange(len(exact))
        best = exact.topk(len(kept)).indices
        overlap = len({*kept.tolist()} & {*best.tolist()}) / len(kept)
        share = (exact[kept].sum() / exact[best].sum()).item()
        looks.append({"overlap": overlap, "share": share, "cosine": cosine(own, gradient(model, batch, dg_loss))})
    return [{**row, **pd.DataFrame(looks).mean()}]


CONTEXTS, ARMS, BATCH = 16, 10, 100
NOISY = ("one arm", "all arms")
GAMBLERS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "PG": (None, False),
    "DG": (None, True),
    "DG-K 3%": ({"rate": 0.03}, False),
    "DG-K 10%": ({"rate": 0.1}, False),
    "DG-K price 0": ({"price": 0.0}, False),
    "random 10%": ({"rate": 0.1, "priority": "uniform"}, False),
    "|advantage| 10%": ({"rate": 0.1, "priority": "abs_advantage"}, False),
    "noise 0.5": ({"noise": 0.5}, False),
    "noise 1": ({"noise": 1.0}, False),
    "lossless": ({"rate": "lossless"}, False),
    "auto": ({"rate": "auto"}, False),
}


@dataclass(frozen=True)
class Gamble:
    """A tabular bandit; ``noisy`` is "one arm" or "all arms"."""

    method: str
    noisy: str
    noise: float
    seed: int
    steps: int = 300


def run_gamble(task: Gamble) -> record.Rows:
    """The last regret (1 - expected reward) and how much the policy plays the gambling arm."""
    torch.manual_seed(task.seed)
    gate, weighted = GAMBLERS[task.method]
    policy = nn.Embedding(CONTEXTS, ARMS)
    nn.init.zeros_(policy.weight)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    best = torch.randint(ARMS, (CONTEXTS,))
    gambling = (best + 1) % ARMS
    with nullcontext() if gate is None else kondo.gated(policy, **gate, seed=task.seed):
        for _ in range(task.steps):
            context = torch.randint(CONTEXTS, (BATCH,))
            logits = policy(context)
            with torch.no_grad():
                probs = logits.softmax(1)
                arms = torch.multinomial(probs, 1).squeeze(1)
                noise = task.noise * torch.randn(BATCH)
                if task.noisy == "one arm":
                    noise *= arms == gambling[context]
                expected = probs.gather(1, best[context].unsqueeze(1)).squeeze(1)
                advantages = (arms == best[context]).float() + noise - expected
            loss = kondo.dg_loss(logits, arms, advantages)[0] if weighted else kondo.pg_loss(logits, arms, advantages)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    probs = policy.weight.detach().softmax(1)
    played, gambled = (probs.gather(1, arm.unsqueeze(1)).mean().item() for arm in (best, gambling))
    return [{"error": 1 - played, "gambles": gambled}]


@dataclass(frozen=True)
class Vocabulary:
    """Token reversal with H 5."""

    method: str
    tokens: int
    seed: int
    steps: int = 400


def run_vocabulary(task: Vocabulary) -> record.Rows:
    return learn((METHODS | RULES)[task.method], task.seed, 5, task.tokens, task.steps)[-1:]


def tasks(seeds: range) -> dict[str, tuple[Callable[[Any], record.Rows], list[Any]]]:
    noisy = ("DG", "DG-K 10%", "DG-K 3%")
    growing = ("PG", "DG", "DG-K 3%", "DG-K 10%", "DG-K price 0", "advantage 10%", "random 10%")
    growing += ("abs_advantage 10%", "noise 0.5", "noise 1", "lossless", "auto")
    sigmas = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
    return {
        "robustness_noise": (run_noise, [Noise(m, s, seed) for seed in seeds for s in NOISE for m in noisy]),
        "robustness_screens": (run_screen, [Screened(name, seed) for seed in seeds for name in SCREENS]),
        "robustness_gambling": (
            run_gamble,
            [Gamble(m, on, s, seed) for seed in seeds for on in NOISY for s in sigmas for m in GAMBLERS],
        ),
        "robustness_vocabulary": (
            run_vocabulary,
            [Vocabulary(m, n, seed) for seed in seeds for n in (2, 8, 32) for m in growing],
        ),
    }


def quick() -> dict[str, tuple[Callable[[Any], record.Rows], list[Any]]]:
    return {
        "robustness_noise": (run_noise, [Noise("DG-K 10%", s, 0, 300) for s in (0.0, 2.0)]),
        "robustness_screens": (
            run_screen,
            [Screened(n, 0, 100) for n in ("bf16 copy", "5 updates old", "random rows")],
        ),
        "robustness_gambling": (run_gamble, [Gamble("DG-K 3%", on, 10.0, 0, 300) for on in NOISY]),
        "robustness_vocabulary": (run_vocabulary, [Vocabulary(m, 8, 0, 200) for m in ("DG-K 3%", "DG-K price 0")]),
    }


def grid(frame: pd.DataFrame, across: list[str], value: str = "error") -> pd.DataFrame:
    """Methods down, settings across, percent with the 95% interval."""
    percent = frame.assign(percent=100 * frame[value])
    cells = percent.groupby(["method", *across], sort=False).percent.apply(record.spread)
    return cells.unstack(across).reset_index()


def report(name: str, frame: pd.DataFrame) -> None:
    if name == "robustness_noise":
        record.print_table(grid(frame, ["noise"]), f"error, %, after {frame.steps.max()} steps, by noise on delight")
    elif name == "robustness_gambling":
        for noisy, own in frame.groupby("noisy", sort=False):
            record.print_table(grid(own, ["noise"]), f"regret, % of the gap, by sigma / gap on {noisy}")
        one = frame[frame.noisy == "one arm"]
        record.print_table(grid(one, ["noise"], "gambles"), "how often the gambling arm is played, %")
    elif name == "robustness_vocabulary":
        record.print_table(grid(frame, ["tokens"]), f"error, %, after {frame.steps.max()} steps of H 5, by tokens")
        kept = frame.assign(kept=frame.backward_rows / frame.steps / 100)
        record.print_table(grid(kept, ["tokens"], "kept"), "rows with a backward, %")
    else:
        learner = frame[["screen", "loss", "replay", "optimizer"]].sum(axis=1)
        frame = frame.assign(ms=1000 * learner / frame.steps, screen_ms=1000 * frame.screen / frame.steps)
        base = frame[frame.signal == "full DG"].ms.median()
        table = [
            {
                "delight from": signal,
                "overlap %": record.spread(100 * own.overlap),
                "of its delight %": record.spread(100 * own.share) if (own.share > 0).all() else "-",
                "cosine to DG": record.spread(own.cosine, "{:.2f}"),
                "error %": record.spread(100 * own.error),
                "ms: screen, kept forward": f"{own.screen_ms.median():.1f}",
                "learner": f"{own.ms.median():.1f}",
                "of full DG": f"{own.ms.median() / base:.2f}",
            }
            for signal, own in frame.groupby("signal", sort=False)
        ]
        record.print_table(table, f"what delight is read from: {frame.steps.max()} steps at 10%")


SHOWN = ("PG", "DG", "DG-K 3%", "DG-K 10%", "DG-K price 0", "advantage 10%", "random 10%", "noise 0.5", "auto")


def draw(frames: dict[str, pd.DataFrame], folder: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5))

    def lines(axis: Axes, frame: pd.DataFrame, x: str, label: str, title: str) -> None:
        for method, own in frame[frame.method.isin(SHOWN)].groupby("method", sort=False):
            record.points(axis, 100 * own.error, own[x], str(method))
        axis.set(xlabel=label, ylabel="error, %", ylim=(0, None), title=title)

    noise, gambling, vocabulary = axes[0, 0], axes[0, 1], axes[1, 0]
    lines(
        noise, frames["robustness_noise"], "noise", "relative noise on delight", "delight may be wrong by half and more"
    )
    own = frames["robustness_gambling"][frames["robustness_gambling"].noisy == NOISY[0]]
    lines(
        gambling,
        own,
        "noise",
        "sigma / gap of the reward's noise on one arm",
        "a noisy bad arm: delight takes the gamble",
    )
    gambling.set_xscale("symlog", linthresh=0.1)
    gambling.set_xlim(-0.01, 12)
    frame = frames["robustness_vocabulary"]
    lines(vocabulary, frame, "tokens", "tokens M (reversal, H 5)", "many tokens: fixed rates fall behind")
    vocabulary.set_xscale("log", base=2)
    for axis in (noise, gambling, vocabulary):
        style.label_ends(axis)
    frame = frames["robustness_screens"]
    screens = frame[frame.signal != "full DG"].groupby("signal", sort=False).overlap
    mean, half = screens.mean(), screens.apply(record.interval)
    screen = axes[1, 1]
    screen.barh(mean.index, 100 * mean, xerr=100 * half, color=style.color("DG-K 10%"))
    screen.invert_yaxis()
    screen.set(
        xlabel="% of the rows that exact delight would keep", xlim=(0, None), title="a cheap or old screen will do"
    )
    record.save(figure, folder / "robustness.png")


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--only", choices=tuple(tasks(range(0))), help="one of the files")
    args = parser.parse_args()
    frames = {}
    for name, frame in record.collect_each(quick() if args.quick else tasks(range(args.seeds)), args):
        frames[name] = frame
        report(name, frame)
    if len(frames) == len(quick()):
        draw(frames, args.out)


if __name__ == "__main__":
    main()
