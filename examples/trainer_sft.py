"""Supervised training with an unmodified transformers ``Trainer``: what loss-based selection costs and what it gives.

    python examples/trainer_sft.py           # about five minutes on one core
    python examples/trainer_sft.py --quick   # less than a minute

A small Llama learns CPython's documentation byte by byte: the topics of ``pydoc_data.topics``, which ship with Python
(PSF-2.0 licence); repeated paragraphs are left out, and whole topics are held out. For plain cross-entropy the
advantage is 1, so delight is a row's surprisal, and the gate is loss-based selection. *full* pays for every row;
*delight* keeps the rows of most surprisal; *random* keeps as many at random; *small batch* draws only as many rows as
these keep, screens nothing, and goes on until it has spent the seconds of the delight run of its seed.

Do not expect a win: where every row teaches something, a gate throws most of that away, and rows that no one asks for
are cheaper not to draw than to screen. In docs/trainer_sft.csv, at 10%, delight cannot be told from random rows step
for step; the full batch learns far more a step, and both it and the small batch learn more in the same seconds.
"""

import argparse
import contextlib
import csv
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import kondo_hooks as kondo

matplotlib.use("Agg")
import matplotlib.pyplot as plt

transformers.logging.set_verbosity_error()
WIDTH, DEPTH, LENGTH = 96, 3, 64  # of the model, and of a row in bytes
STEP, LOSS, ROWS, SECONDS = range(4)  # columns of what a run records at each evaluation


class Method(NamedTuple):
    """A line of the comparison: the gate's arguments if there is one, and the rows of a batch."""

    name: str
    color: str
    style: str
    batch: int
    gate: dict | None = None
    like: str | None = None  # goes on until it has spent the seconds of this method


def methods(rates: list[float], batch: int) -> list[Method]:
    chosen = [Method("full", "#222222", "-", batch)]
    colors = [("#dc6763", "#a9a9a9", "#a17cd3"), ("#d1342f", "#8c8c8c", "#8250c4")]
    colors += [("#e39490", "#c0c0c0", "#bda3e0"), ("#9d2723", "#696969", "#623c93")]
    for rate, (color, gray, purple) in zip(rates, colors, strict=False):
        # normalize="kept": a mean over the kept rows, as in a small batch, so that clipping treats all alike.
        gate, name = {"rate": rate, "normalize": "kept"}, f"delight {rate:.0%}"
        chosen.append(Method(name, color, "-", batch, gate))
        chosen.append(Method(f"random {rate:.0%}", gray, ":", batch, {**gate, "priority": "uniform"}))
        chosen.append(Method(f"small batch {rate:.0%}", purple, "--", max(1, round(rate * batch)), like=name))
    return chosen


def load_corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on and held out (a tenth), (N, LENGTH) each."""
    order = np.random.default_rng(0).permutation(sorted(topics.topics)).tolist()
    seen, parts = set(), []
    for names in (order[:7], order[7:]):  # a paragraph of both goes to the held-out ones
        text = []
        for paragraph in (p for name in names for p in topics.topics[name].split("\n\n")):
            if " ".join(paragraph.split()) not in seen:
                seen.add(" ".join(paragraph.split()))
                text.append(paragraph)
        part = torch.tensor(list("\n\n".join(text).encode()))
        parts.append(part[: len(part) // LENGTH * LENGTH].view(-1, LENGTH))
    return parts[1], parts[0]


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Record(TrainerCallback):
    """Evaluates now and then, counts the seconds of everything else, and ends the training when they are spent."""

    def __init__(self, method: Method, seconds: float, test: Tensor, args: argparse.Namespace, bar: tqdm):
        self.method, self.at_least, self.test, self.args, self.bar = method, seconds, test, args, bar
        self.every = args.every * (4 if method.like else 1)
        self.gate: kondo.Gated | None = None
        self.points: list[tuple[int, float, int, float]] = []
        self.seconds = self.forward = self.backward = self.began = self.resumed = 0.0

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        self.evaluate(0, model)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.began = now()

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        self.seconds += now() - self.resumed
        step, steps = state.global_step, self.args.steps
        self.bar.update(step <= steps)
        if step % self.every == 0 or step == steps:
            self.evaluate(step, model)
            control.should_training_stop = step >= steps and self.seconds >= self.at_least
        self.resumed = now()

    @torch.no_grad()
    def evaluate(self, step: int, model: nn.Module) -> None:
        model.eval()
        parts = self.test.to(model.device).split(64)
        loss = sum(len(part) * model(input_ids=part, labels=part).loss.item() for part in parts) / len(self.test)
        model.train()
        rows = self.gate.stats.forwarded if self.gate else step * self.method.batch
        self.points.append((step, loss, rows, self.seconds))
        self.resumed = now()

    def watch(self, trainer: Trainer) -> None:
        """Put a stopwatch around the backward; what a step does before it counts as forward."""
        backward = trainer.accelerator.backward

        def timed(*args, **kwargs) -> None:
            start = now()
            backward(*args, **kwargs)
            self.forward += start - self.began
            self.backward += now() - start

        trainer.accelerator.backward = timed

    def at(self, x: float, along: int, what: int = LOSS) -> float:
        points = np.array(self.points)
        return float(np.interp(x, points[:, along], points[:, what]))

    def ms(self, what: str) -> float:
        return 1000 * getattr(self, what) / self.points[-1][STEP]


def train(method: Method, seed: int, seconds: float, data: tuple[Tensor, Tensor], args, bar: tqdm) -> Record:
    transformers.set_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, tie_word_embeddings=True, use_cache=False, **sizes)
    record = Record(method, seconds, data[1], args, bar)
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "report_to": []}
        warmup = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": args.steps // 10, "learning_rate": 2e-3}
        loader = {"dataloader_drop_last": True, "dataloader_pin_memory": torch.cuda.is_available(), "seed": seed}
        steps = args.steps * (100 if method.like else 1)  # small batches end by the clock
        sizes = {"per_device_train_batch_size": method.batch, "max_steps": steps}
        options = TrainingArguments(folder, **sizes, **warmup, **loader, **quiet)
        rows = [{"input_ids": row, "labels": row} for row in data[0]]
        trainer = Trainer(LlamaForCausalLM(config), options, train_dataset=rows, callbacks=[record])
        trainer.remove_callback(PrinterCallback)
        record.watch(trainer)
        if method.gate:
            record.gate = kondo.gated(trainer.model, seed=seed, **method.gate)
        with record.gate or contextlib.nullcontext():
            trainer.train()
    return record


def half_interval(values: list[float]) -> float:
    """Half of the 95% interval of the mean; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}.get(len(values), 2.26)
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def spread(values: list[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.3f} +- {half_interval(values):.3f}"


def table(runs: dict[str, list[Record]], steps: int) -> str:
    budget = min(statistics.mean(run.seconds for run in each) for each in runs.values())
    lines = [
        f"{'method':<16} {f'after {steps} steps:':<16} {'backward rows':>13} {'seconds':>8} | "
        f"{f'after {budget:.1f} s:':<16} | {'ms a step: forward':>18} {'backward':>8} {'all':>6} {'x full':>6}"
    ]
    for name, each in runs.items():
        after_steps, after_seconds = (
            spread([run.at(x, along) for run in each]) for x, along in ((steps, STEP), (budget, SECONDS))
        )
        rows, seconds = (statistics.mean(run.at(steps, STEP, what) for run in each) for what in (ROWS, SECONDS))
        ms = [statistics.median(run.ms(what) for run in each) for what in ("forward", "backward", "seconds")]
        pairs = zip(each, runs["full"], strict=True)
        of_full = statistics.median(run.ms("seconds") / full.ms("seconds") for run, full in pairs)
        lines.append(
            f"{name:<16} {after_steps:<16} {rows:>13,.0f} {seconds:>8.2f} | {after_seconds:<16} "
            f"| {ms[0]:>18.1f} {ms[1]:>8.1f} {ms[2]:>6.1f} {of_full:>6.2f}"
        )
    return "\n".join(lines)


def compare(runs: dict[str, list[Record]], one: str, other: str, along: int) -> str:
    """Held-out loss of one less that of the other within each seed, at the last step or second that both have."""
    differences = []
    for a, b in zip(runs[one], runs[other], strict=True):
        x = min(a.points[-1][along], b.points[-1][along])
        differences.append(a.at(x, along) - b.at(x, along))
    mean, half = statistics.mean(differences), half_interval(differences)
    verdict = "one seed tells nothing" if math.isnan(half) else ("worse" if mean > 0 else "better")
    if abs(mean) <= half:
        verdict = "no clear difference"
    where = "steps" if along == STEP else "seconds"
    return f"{f'{one} against {other}, same {where}:':<56} {spread(differences, '+'):<16} {verdict}"


def write_csv(path: Path, header: str, runs: dict[str, list[Record]]) -> None:
    with path.open("w", newline="") as file:
        file.write(f"# {header}\n")
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "step", "held_out_loss", "backward_rows", "seconds"])
        for name, each in runs.items():
            for seed, run in enumerate(each):
                for step, loss, rows, seconds in run.points:
                    writer.writerow([name, seed, step, f"{loss:.4f}", rows, f"{seconds:.3f}"])


def draw(path: Path, runs: dict[str, list[Record]], chosen: list[Method]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    labels = {STEP: "steps", ROWS: "rows with a backward", SECONDS: "measured seconds"}
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        for method in chosen:
            shared = min(len(run.points) for run in runs[method.name])  # of seeds that end by the clock
            points = np.stack([np.array(run.points[1:shared]) for run in runs[method.name]])
            across, losses = points[:, :, column].mean(0), points[:, :, LOSS]
            axis.plot(across, losses.mean(0), method.style, color=method.color, label=method.name)
            axis.fill_between(across, losses.min(0), losses.max(0), color=method.color, alpha=0.12, lw=0)
        axis.set(xlabel=label, xscale="log" if column == ROWS else "linear")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("held-out loss, nats a byte (mean; band: all seeds)", fontsize=8)
    axes[0].legend(fontsize=8)
    figure.suptitle("A small Llama on CPython's documentation, transformers Trainer")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1], help="at most four")
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations; small batches: four times")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for trainer_sft.csv and .png")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help="one seed, one rate, 20 steps: shows that it runs")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds, args.rates, args.every = 20, 1, args.rates[:1], 5

    torch.set_num_threads(args.threads)
    data = load_corpus()
    chosen = methods(args.rates, args.batch)
    runs: dict[str, list[Record]] = {method.name: [] for method in chosen}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    options = f"--steps {args.steps} --seeds {args.seeds} --batch {args.batch} --every {args.every} --rates"
    header = (
        f"python examples/trainer_sft.py {options} {' '.join(map(str, args.rates))} | torch {torch.__version__} | "
        f"transformers {transformers.__version__} | {device}, {args.threads} thread{'s' if args.threads > 1 else ''}"
    )
    print(f"{header}\n{len(data[0])} rows to train on and {len(data[1])} held out, of {LENGTH} bytes")
    with tqdm(total=args.seeds * len(chosen) * args.steps, unit="step", smoothing=0.05) as bar:
        for seed in range(args.seeds):  # methods take turns, so that a slow minute of the machine falls on all of them
            for method in chosen:
                bar.set_description(f"seed {seed} {method.name:<15}")
                seconds = runs[method.like][seed].seconds if method.like else 0.0
                runs[method.name].append(train(method, seed, seconds, data, args, bar))
    print("\nheld-out loss, nats a byte; mean and 95% interval over seeds\n" + table(runs, args.steps))
    print("\nloss-based selection, as a difference in held-out loss within seeds (+: more loss):")
    for rate in args.rates:
        delight, random, small = (f"{kind} {rate:.0%}" for kind in ("delight", "random", "small batch"))
        for other, along in ((random, STEP), ("full", STEP), ("full", SECONDS), (small, SECONDS)):
            print(compare(runs, delight, other, along))
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "trainer_sft.csv", header, runs)
    draw(args.out / "trainer_sft.png", runs, chosen)
    print(f"wrote {args.out / 'trainer_sft.csv'} and {args.out / 'trainer_sft.png'}")


if __name__ == "__main__":
    main()
