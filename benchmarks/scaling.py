"""A cost model of gated steps on N ranks: checked on 1, 2 and 3 ranks here, and what it says of 64 and 1,024 GPUs.

    python benchmarks/scaling.py --out benchmarks/results --figure docs/scaling.png     # about 5 minutes on 2 cores

A step of ``window`` micro-batches of B rows on an engine that shards parameters (FSDP2, ZeRO-3), with k kept rows on
the busiest rank, costs

    full    window * (forward(B) + backward(B) + 2 gather) + reduce + update
    gated   window * (forward(B) + loss(B) + gather) + forward(k) + backward(k) + 2 gather + reduce + update

``forward`` of a gated step builds no graph. The parts are measured alone, on as many ranks at once as the step runs on,
and the sum is held against the step itself. On GPUs an engine hides communication behind the compute of the same pass:
there a pass costs the larger of the two, and the parts come from sizes and the hardware's figures (``Cluster``).

The last table is of a whole training step (``Learner``): generation, old and reference log-probs and the update, rows
padded or packed, with a screen of the gate's own or one that is already paid. It needs no measurement: ``--ranks``
alone skips those.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from ranks import RATE, Bench, Decoder, Layer

SIZES = Namespace(width=256, depth=4, batch=8, length=64)


@dataclass
class Costs:
    """Seconds of each part of a step on one rank.

    Attributes:
        forward: no-grad forward of a micro-batch.
        full: forward and backward of a micro-batch, with the loss.
        loss: loss and its gradient at the outputs of a micro-batch.
        kept: forward and backward of one kept row, without the loss.
        gather: one all-gather of every parameter.
        reduce: one reduction of every gradient.
        update: optimizer.
        overlaps: whether communication runs while the same pass computes.
    """

    forward: float
    full: float
    loss: float
    kept: float
    gather: float
    reduce: float
    update: float
    overlaps: bool = False

    def _pass(self, compute: float, *communication: float) -> float:
        return max(compute, sum(communication)) if self.overlaps else compute + sum(communication)

    def full_step(self, window: int) -> float:
        """``window`` micro-batches with a graph; gradients are reduced in the last."""
        micro = self._pass(self.full, 2 * self.gather)
        return (window - 1) * micro + self._pass(self.full, 2 * self.gather, self.reduce) + self.update

    def gated_step(self, window: int, rows: int, backwards: int = 1) -> float:
        """``window`` screens, and ``rows`` kept rows replayed after every ``backwards`` of them."""
        screens = window * (self._pass(self.forward, self.gather) + self.loss)
        replays = window // backwards
        replay = self._pass(rows * self.kept, 2 * self.gather)
        last = self._pass(rows * self.kept, 2 * self.gather, self.reduce)
        return screens + (replays - 1) * replay + last + self.update


def kept_rows(rows: int) -> int:
    """At 3%, of this many."""
    return max(1, round(RATE * rows))


# Measured here.


def worker(rounds: int, out: Path) -> None:
    """One rank: the parts alone and the steps, in turns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    bench = Bench("fsdp2", SIZES)
    net = Decoder(SIZES.width, SIZES.depth)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    ids, actions, advantages = bench.data[0]
    full = next(v for v in bench.variants if v.kind == "full")
    ranks = dist.get_world_size()
    # As fully_shard groups them: each layer, and the rest.
    groups = [sum(p.numel() for p in m.parameters()) for m in net.modules() if isinstance(m, Layer)]
    groups.append(sum(p.numel() for p in net.parameters()) - sum(groups))
    shards = [torch.zeros(-(-n // ranks)) for n in groups]
    wholes = [torch.zeros(len(shard) * ranks) for shard in shards]

    def forward() -> None:
        with torch.no_grad():
            net(ids)

    def forward_backward() -> None:
        bench.loss(full, net(ids), actions, advantages).backward()

    logits = net(ids).detach()

    def loss() -> None:
        bench.loss(full, logits.requires_grad_(), actions, advantages).backward()

    def kept() -> None:
        net(ids[:2]).backward(logits[:2])

    def gather() -> None:
        for shard, whole in zip(shards, wholes, strict=True):
            dist.all_gather_into_tensor(whole, shard)
            whole.clone()  # out of the communication buffer, into the parameters

    def reduce() -> None:
        for shard, whole in zip(shards, wholes, strict=True):
            dist.reduce_scatter_tensor(shard, whole.clone())

    parts = {
        "forward": forward,
        "full": forward_backward,
        "loss": loss,
        "kept": kept,
        "gather": gather,
        "reduce": reduce,
        "update": optimizer.step,
    }
    named = {"full step": "full step", "gated, local": "gated step"}
    steps = {(named[v.name], v.window): v for v in bench.variants if v.name in named}
    times: dict[Any, list[float]] = {name: [] for name in (*parts, *steps)}
    for i in tqdm(range(rounds + 1), desc=f"{ranks} ranks", disable=dist.get_rank() > 0):
        for name, part in parts.items():
            dist.barrier()
            start = time.perf_counter()
            part()
            dist.barrier()
            if i:
                times[name].append(time.perf_counter() - start)
        for name, variant in steps.items():
            seconds = bench.timed(variant)
            if i:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    costs = Costs(**{name: medians[name] for name in parts})
    costs = replace(costs, kept=costs.kept / 2)
    rows = []
    for (name, window), _ in steps.items():
        k = kept_rows(window * SIZES.batch)
        predicted = costs.full_step(window) if name == "full step" else costs.gated_step(window, k, window)
        rows.append(
            {
                "ranks": ranks,
                "step": name,
                "window": window,
                "measured_ms": 1000 * medians[name, window],
                "predicted_ms": 1000 * predicted,
                "predicted_over_measured": predicted / medians[name, window],
                "gather_ms": 1000 * costs.gather,
                "reduce_ms": 1000 * costs.reduce,
            }
        )
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)


# Predicted.


@dataclass(frozen=True)
class Cluster:
    """Figures of a cluster, per GPU; the defaults are an H200 with one 400 Gb/s link each.

    Attributes:
        gpus: how many.
        flops: reached in training, not the data sheet's: 40% of 989 TFLOP/s in bfloat16.
        bandwidth: bytes a second that an all-gather reaches.
        latency: seconds a collective takes whatever its size, for each doubling of the ranks.
    """

    gpus: int
    flops: float = 4e14
    bandwidth: float = 4e10
    latency: float = 2e-5


def predicted(parameters: float, layers: int, tokens: int, row: int, cluster: Cluster) -> Costs:
    """Costs of a model on a cluster: 2 FLOPs a parameter and token forward, 4 backward; bfloat16 parameters and
    gradients, gathered and reduced layer by layer.

    Args:
        parameters: of the model.
        layers: gathered one by one.
        tokens: of a micro-batch on one GPU.
        row: tokens of a row.
        cluster: where it runs.
    """
    share = (cluster.gpus - 1) / cluster.gpus
    hops = (cluster.gpus - 1).bit_length()
    collective = 2 * parameters * share / cluster.bandwidth + layers * hops * cluster.latency
    forward = 2 * parameters * tokens / cluster.flops
    return Costs(
        forward=forward,
        full=3 * forward,
        loss=0.03 * forward,
        kept=3 * 2 * parameters * row / cluster.flops,
        gather=collective,
        reduce=collective,
        update=16 * parameters / cluster.gpus / 3e12,
        overlaps=True,
    )


MODELS = {"1B": (1e9, 16), "8B": (8e9, 32), "70B": (7e10, 80)}
WINDOWS = (1, 2, 4, 8, 16, 32)
ROW = 1024


def predictions() -> list[dict[str, Any]]:
    """Gated over full step at 3%, for an accumulation as long as the window and rows of 1,024 tokens."""
    rows = []
    for name, (parameters, layers) in MODELS.items():
        for gpus in (64, 1024):
            for tokens in (2048, 8192, 32768):
                costs = predicted(parameters, layers, tokens, ROW, Cluster(gpus))
                for window in WINDOWS:
                    k = kept_rows(window * tokens // ROW)
                    full = costs.full_step(window)
                    rows.append(
                        {
                            "model": name,
                            "gpus": gpus,
                            "tokens": tokens,
                            "window": window,
                            "kept_rows": k,
                            "of_full": costs.gated_step(window, k, window) / full,
                            "communication_bound": float(2 * costs.gather > costs.full),
                        }
                    )
    return rows


@dataclass(frozen=True)
class Learner:
    """A step of a trainer that generates, in units of one forward of all real tokens without a graph.

    Attributes:
        old: passes for the old log-probs of the whole batch.
        reference: passes for a reference model's.
        epochs: updates with all rows; forward and backward cost 3.
        padding: share of the tokens of padded rows that are padding.
    """

    old: int
    reference: int
    epochs: int
    padding: float

    @property
    def passes(self) -> int:
        """Forwards that are made whatever is kept."""
        return self.old + self.reference

    def full(self, packed: bool = True) -> float:
        """Without generation."""
        return (self.passes + 3 * self.epochs) * (1 if packed else 1 / (1 - self.padding))

    def gated(self, share: float, screens: bool, packed: bool = True) -> float:
        """Without generation, where a share of the tokens is kept; the gate screens in each epoch, or not at all."""
        update = self.epochs * (int(screens) + 3 * share)
        return (self.passes + update) * (1 if packed else 1 / (1 - self.padding))

    def step(self, learner: float, generation: float) -> float:
        """Of a whole step over the packed one without a gate, of which generation is this share."""
        return generation + (1 - generation) * learner / self.full()


LEARNERS = {
    "update alone": Learner(0, 0, 1, 0.48),
    "old log-probs": Learner(1, 0, 1, 0.48),
    "old and reference": Learner(1, 1, 1, 0.48),
    "old, 4 epochs": Learner(1, 0, 4, 0.48),
}
GENERATION = (0.0, 0.5, 0.63, 0.9)
"""Shares of a packed step: 63% is what is left of a published 8B run beside 26% of update and 11% of old log-probs."""


def learners() -> list[dict[str, Any]]:
    """Seconds of a step over the packed full one's, by route and by the share of generation."""
    rows = []
    for name, learner in LEARNERS.items():
        routes = {"full, padded": learner.full(False)}
        for share in (0.03, 0.25):
            told = f"{share:.0%}"
            if share < 0.1:
                routes[f"gated {told}, padded"] = learner.gated(share, True, False)
            routes |= {
                f"gated {told}, packed": learner.gated(share, True),
                f"gated {told}, packed, no screen": learner.gated(share, False),
            }
        for route, seconds in routes.items():
            of_full = {f"generation_{g:.2f}": learner.step(seconds, g) for g in GENERATION}
            rows.append({"step": name, "route": route, **of_full})
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import style

    style.use()
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(MODELS), figsize=(11, 3.6), sharey=True)
    for axis, model in zip(axes, MODELS, strict=True):
        for gpus, dashes in ((64, "-"), (1024, "--")):
            for tokens, colour in ((2048, "#9db8d9"), (8192, "#4c8fd6"), (32768, "#123e7c")):
                mine = [r for r in rows if (r["model"], r["gpus"], r["tokens"]) == (model, gpus, tokens)]
                label = f"{tokens // 1024}k tokens, {gpus} GPUs"
                axis.plot([r["window"] for r in mine], [r["of_full"] for r in mine], dashes, color=colour, label=label)
        axis.axhline(1, color=style.GRAY, lw=0.8)
        axis.set(title=f"{model} parameters", xlabel="window (backwards)", xscale="log", ylim=(0, 1.6))
        axis.set_xticks(WINDOWS, [str(w) for w in WINDOWS])
        axis.minorticks_off()
    axes[0].set_ylabel("gated / full step, predicted")
    style.label_ends(axes[-1], 7)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=100)


def write(path: Path, comment: str, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {comment}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, help="folder for scaling.csv, scaling_predicted.csv, scaling_learner.csv")
    parser.add_argument("--figure", type=Path, help="where to draw the prediction")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.rounds, args.worker)
        return
    measured: list[dict[str, Any]] = []
    for ranks in args.ranks:
        with TemporaryDirectory() as folder:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            command = [*launch, __file__, f"--rounds={args.rounds}", f"--worker={folder}/rows.json"]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            measured += json.loads(Path(f"{folder}/rows.json").read_text())
    if measured:
        print(f"{'ranks':>5} {'window':>6}  {'step':<12} {'measured ms':>11} {'model ms':>9} {'model/measured':>15}")
    for row in measured:
        print(
            f"{row['ranks']:>5} {row['window']:>6}  {row['step']:<12} {row['measured_ms']:>11.0f} "
            f"{row['predicted_ms']:>9.0f} {row['predicted_over_measured']:>15.2f}"
        )
    rows = predictions()
    print(
        f"\ngated / full step, predicted, 3%\n{'model':<6} {'GPUs':>5} {'tokens':>7}", *(f"w={w:<4}" for w in WINDOWS)
    )
    for i in range(0, len(rows), len(WINDOWS)):
        first = rows[i]
        ratios = " ".join(f"{r['of_full']:<6.2f}" for r in rows[i : i + len(WINDOWS)])
        print(f"{first['model']:<6} {first['gpus']:>5} {first['tokens']:>7} {ratios}")
    of_steps = learners()
    shares = " ".join(f"{f'g={g:.0%}':<6}" for g in GENERATION)
    print(f"\na step over the full, packed one, whose share of generation is g\n{'step':<18} {'route':<28} {shares}")
    for row in of_steps:
        ratios = " ".join(f"{value:<6.2f}" for name, value in row.items() if name.startswith("generation"))
        print(f"{row['step']:<18} {row['route']:<28} {ratios}")
    if args.out:
        command = (
            f"python benchmarks/scaling.py --rounds {args.rounds} | torch {torch.__version__} | {os.cpu_count()} cores"
        )
        if measured:
            write(args.out / "scaling.csv", command, measured)
        write(args.out / "scaling_learner.csv", "python benchmarks/scaling.py --ranks", of_steps)
        write(args.out / "scaling_predicted.csv", f"{command} | {Cluster(64)}", rows)
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
