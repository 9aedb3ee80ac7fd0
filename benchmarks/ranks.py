"""What a gated step costs on several ranks: time, memory, collectives and bytes, engine by engine.

    python benchmarks/ranks.py                          # DDP, FSDP1, FSDP2, ZeRO-2, ZeRO-3 on 2 ranks, about 15 minutes
    python benchmarks/ranks.py --engines fsdp2 --ranks 3

For a Llama-like decoder, whose compute dominates: the full step and the peer package's (kondo-gate 0.1.0, a masked
loss) against ``kondo.gated`` at 3%, for one backward and for an accumulation of 8, which the gate takes as a window;
chosen by each rank or by all as one batch, random rows, and with every kept row on one rank, with and without balance.
"floor" is the no-grad forward of the same micro-batches through the engine. Variants take turns within a round, in one
random order on all ranks, each between barriers, and ratios are medians over rounds. Peak memory is that of the tensors
which a step allocates; collectives and received bytes, like it, are of one step on rank 0.
"""

import argparse
import contextlib
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__" and os.environ.get("CUDA_VISIBLE_DEVICES", "") == "" and not Path("/dev/nvidia0").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import kondo_gate
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import kondo_hooks as kondo

sys.path.insert(0, str(Path(__file__).parent))
from communication import Communication, recorded

ENGINES = ("ddp", "fsdp1", "fsdp2", "zero2", "zero3")
RATE, WINDOW = 0.03, 8
VOCABULARY = 1000


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // 32
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.silu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A small causal language model."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@dataclass
class Host:
    """An engine around the model: its backward, whether a micro-batch is its last, and its step."""

    model: nn.Module
    backward: Callable[[Tensor], Any]
    micro: Callable[[bool], Any]
    step: Callable[[], Any]


def make_host(engine: str, net: nn.Module, device: torch.device) -> Host:
    net = net.to(device)
    if engine.startswith("zero"):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0},
        }
        host, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.0), config=config)

        def boundary(last: bool) -> Any:
            host.set_gradient_accumulation_boundary(last)
            return contextlib.nullcontext()

        return Host(host, lambda loss: host.backward(loss), boundary, lambda: host.step())
    model: Any
    if engine == "ddp":
        model = DistributedDataParallel(net)
    elif engine == "fsdp1":
        model = FullyShardedDataParallel(net, auto_wrap_policy=ModuleWrapPolicy({Layer}), device_id=device)
    else:
        for layer in net.layers:
            fully_shard(layer)
        model = fully_shard(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def micro(last: bool) -> Any:
        if engine == "fsdp2":
            model.set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else model.no_sync()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Host(model, lambda loss: loss.backward(), micro, step)


@dataclass(eq=False)
class Variant:
    """A step: its accumulation, the gate's options (None: no gate), where the delight is, and what stands for it."""

    name: str
    window: int
    gate: dict[str, Any] | None = None
    one_rank: bool = False
    kind: str = "gated"


def variants() -> list[Variant]:
    found = []
    for window in (1, WINDOW):
        add = partial(Variant, window=window)
        gate = {"rate": RATE, "window": window}
        found += [
            add("full step", kind="full"),
            add("kondo-gate 0.1.0 (masked loss)", kind="peer"),
            add("floor: no-grad forward", kind="floor"),
            add("gated, local", gate=gate),
            add("gated, local, random rows", gate={**gate, "priority": "uniform"}),
            add("gated, global", gate={**gate, "scope": "global"}),
            add("gated, global, balanced", gate={**gate, "scope": "global", "balance": True}),
            add("gated, global, all kept on one rank", gate={**gate, "scope": "global"}, one_rank=True),
            add(
                "gated, global, all kept on one rank, balanced",
                gate={**gate, "scope": "global", "balance": True},
                one_rank=True,
            ),
        ]
    return found


class Bench:
    """One engine on this rank, and every variant of its step."""

    def __init__(self, engine: str, args: argparse.Namespace):
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        torch.manual_seed(0)
        self.host = make_host(engine, Decoder(args.width, args.depth), self.device)
        g = torch.Generator().manual_seed(dist.get_rank())
        shape = (args.batch, args.length)
        self.data = [
            tuple(
                t.to(self.device)
                for t in (
                    torch.randint(0, VOCABULARY, shape, generator=g),
                    torch.randint(0, VOCABULARY, shape, generator=g),
                    torch.randn(args.batch, 1, generator=g).expand(shape),
                )
            )
            for _ in range(WINDOW)
        ]
        self.peer = kondo_gate.KondoGate(kondo_gate.KondoGateConfig(gate_rate=RATE))
        self.variants = variants()
        self.gates = {v: kondo.gated(self.host.model, **v.gate) for v in self.variants if v.gate is not None}

    def loss(self, variant: Variant, logits: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
        if variant.one_rank:
            advantages = advantages.abs() if dist.get_rank() == 0 else -advantages.abs()
        if variant.kind == "peer":
            return self.peer(logits, actions, advantages, torch.ones_like(advantages)).gated_policy_loss
        logp = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return -(logp * advantages).mean()

    def step(self, variant: Variant) -> None:
        for i, (ids, actions, advantages) in enumerate(self.data[: variant.window]):
            if variant.kind == "floor":
                with torch.no_grad():
                    self.host.model(ids)
                continue
            with self.host.micro(i == variant.window - 1):
                self.host.backward(self.loss(variant, self.host.model(ids), actions, advantages) / variant.window)
        if variant.kind != "floor":
            self.host.step()

    def timed(self, variant: Variant) -> float:
        with self.gates.get(variant, contextlib.nullcontext()):
            self._meet()
            start = time.perf_counter()
            self.step(variant)
            self._meet()
            return time.perf_counter() - start

    def recorded(self, variant: Variant) -> Communication:
        """Collectives of one step, and its memory above what is held between steps."""
        with self.gates.get(variant, contextlib.nullcontext()):
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            with recorded() as found:
                self.step(variant)
        if self.device.type == "cuda":
            found.peak = torch.cuda.max_memory_allocated() - before
        return found

    def _meet(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


def measure(engine: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """On every rank; the rows are rank 0's."""
    bench = Bench(engine, args)
    every = bench.variants
    times: dict[Variant, list[float]] = {v: [] for v in every}
    shuffle = random.Random(0).shuffle
    with tqdm(total=(args.rounds + 2) * len(every), desc=engine, disable=dist.get_rank() > 0) as bar:
        for i in range(args.rounds + 1):
            order = list(every)
            shuffle(order)
            for variant in order:
                seconds = bench.timed(variant)
                if i:
                    times[variant].append(seconds)
                bar.update()
        rows = []
        for variant in every:
            full = next(v for v in every if v.kind == "full" and v.window == variant.window)
            found = bench.recorded(variant)
            bar.update()
            gate = bench.gates.get(variant)
            steps = args.rounds + 2
            replayed = torch.tensor([gate.stats.forwarded / steps if gate else variant.window * args.batch])
            each = [torch.empty_like(replayed) for _ in range(dist.get_world_size())]
            dist.all_gather(each, replayed)
            rows.append(
                {
                    "engine": engine,
                    "window": variant.window,
                    "step": variant.name,
                    "of_full": statistics.median(a / b for a, b in zip(times[variant], times[full], strict=True)),
                    "ms": 1000 * statistics.median(times[variant]),
                    "peak_mb": found.peak / 2**20,
                    "collectives": found.calls.total(),
                    "received_mb": found.received / 2**20,
                    "rows_a_rank": "/".join(f"{n.item():g}" for n in each),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for i, row in enumerate(rows):
        if i == 0 or (rows[i - 1]["engine"], rows[i - 1]["window"]) != (row["engine"], row["window"]):
            title = f"{row['engine']}, accumulation and window {row['window']}"
            heads = f"{'ms':>8} {'x full':>7} {'peak MB':>8} {'calls':>6} {'MB in':>7} {'rows':>8}"
            lines += ["", f"{title:<48} {heads}"]
        lines.append(
            f"  {row['step']:<46} {row['ms']:>8.1f} {row['of_full']:>7.3f} {row['peak_mb']:>8.1f} "
            f"{row['collectives']:>6} {row['received_mb']:>7.1f} {row['rows_a_rank']:>8}"
        )
    return "\n".join(lines)


def header(args: argparse.Namespace) -> str:
    cpu = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {args.threads} thread a rank"
    return (
        f"python benchmarks/ranks.py --ranks {args.ranks} --rounds {args.rounds} --width {args.width} --depth "
        f"{args.depth} --batch {args.batch} --length {args.length} | torch {torch.__version__} | {name}"
    )


def worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rows = measure(args.worker, args)
    if dist.get_rank() == 0:
        args.out.write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)  # engines leave communication threads behind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="rows of a micro-batch on each rank")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path, help="folder for ranks.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    rows = []
    for engine in args.engines:
        with TemporaryDirectory() as folder:
            options = [f"--{name}={getattr(args, name)}" for name in ("rounds", "threads", "width", "depth")]
            options += [f"--batch={args.batch}", f"--length={args.length}", f"--out={folder}/rows.json"]
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            command = [*launch, __file__, f"--worker={engine}", *options]
            subprocess.run(command, check=True, env=environment)
            rows += json.loads(Path(f"{folder}/rows.json").read_text())
    print(header(args))
    print(table(rows))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "ranks.csv").open("w", newline="") as file:
            file.write(f"# {header(args)}\n")
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
