"""What a gated step costs, against the full step and against the physical floor.

    python benchmarks/step.py                 # three models, about two minutes on 2 cores
    python benchmarks/step.py --profile       # and where the gated step of the largest goes

For an MLP, a CNN and a 6-layer Llama-like model: the full step, the step of the PyPI package kondo-gate 0.1.0,
``kondo.gated`` at 3, 10 and 30%, random rows and screen-first at 3%, and the floor at 3%: a no-grad forward, the
loss on its outputs, and a forward and backward of the kept rows, timed apart with nothing of ours in them. All take
turns within a round, in random order, and medians are over rounds, so a slow minute falls on all. "saved" is what
autograd saves for the backward (``torch.autograd.graph.saved_tensors_hooks``), each storage once, without parameters.
"""

import argparse
import contextlib
import csv
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kondo_gate
import torch
from torch import Tensor, nn
from tqdm import tqdm

import kondo_hooks as kondo

RATES = (0.03, 0.1, 0.3)
FLOOR = "floor, 3%: the three below"
PARTS = ("- no-grad forward", "- loss on its outputs", "- kept rows, forward and backward")


@dataclass
class Workload:
    """A model, its inputs, and the policy-gradient loss of its logits, as a user would write it."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    actions: Tensor
    advantages: Tensor

    def logits(self, rows: slice | Tensor = slice(None)) -> Tensor:
        out = self.model(*(leaf[rows] for leaf in self.inputs))
        return out if isinstance(out, Tensor) else out.logits

    def logp(self, logits: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
        return logits.log_softmax(-1).gather(-1, self.actions[rows].unsqueeze(-1)).squeeze(-1)

    def loss(self, logits: Tensor) -> Tensor:
        return -(self.logp(logits) * self.advantages).mean()


class Llama(nn.Module):
    """``LlamaForCausalLM`` without its KV cache."""

    def __init__(self, **sizes: int):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def workloads(device: torch.device) -> list[Workload]:
    g = torch.Generator().manual_seed(0)

    def make(name: str, model: nn.Module, inputs: Tensor, actions: int, *shape: int) -> Workload:
        taken = torch.randint(0, actions, shape, generator=g)
        advantages = torch.randn(shape[0], generator=g)
        if len(shape) == 2:
            advantages = advantages.unsqueeze(1).expand(shape)
        return Workload(name, model.to(device), (inputs.to(device),), taken.to(device), advantages.to(device))

    mlp = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    cnn = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 49, 10)),
    )
    llama = Llama(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    return [
        make("MLP 784-512-512-10, B=256", mlp, torch.randn(256, 784, generator=g), 10, 256),
        make("CNN 28x28, B=128", cnn, torch.randn(128, 1, 28, 28, generator=g), 10, 128),
        make(
            "Llama-like, 6 layers, B=64 T=64 d=256 V=2000",
            llama,
            torch.randint(0, 2000, (64, 64), generator=g),
            2000,
            64,
            64,
        ),
    ]


Variant = tuple[contextlib.AbstractContextManager, Callable[[], None]]


def steps(work: Workload) -> dict[str, Variant]:
    """Every variant: a context that a loop would hold open, and a step that leaves gradients in the parameters."""

    def full() -> None:
        work.loss(work.logits()).backward()

    peer_gate = kondo_gate.KondoGate(kondo_gate.KondoGateConfig(gate_rate=0.03))
    mask = torch.ones_like(work.advantages) if work.advantages.dim() == 2 else None

    def peer() -> None:
        peer_gate(work.logits(), work.actions, work.advantages, mask).gated_policy_loss.backward()

    with torch.no_grad():
        sampler = work.logp(work.logits())
    kept = first_kept(work, sampler, max(1, round(0.03 * len(work.actions))))
    first = kondo.gated(work.model, rate=0.03)

    def screen_first() -> None:
        first.preselect(logp=sampler, advantages=work.advantages)
        full()

    outputs, grad = sampler, sampler

    def forward() -> None:
        nonlocal outputs
        with torch.no_grad():
            outputs = work.logits()

    def loss() -> None:
        nonlocal grad
        leaf = outputs.detach().requires_grad_()
        work.loss(leaf).backward()
        grad = leaf.grad[kept]

    def kept_rows() -> None:
        work.logits(kept).backward(grad)

    def floor() -> None:
        forward()
        loss()
        kept_rows()

    floor()
    plain = contextlib.nullcontext()
    return {
        "full step": (plain, full),
        "kondo-gate 0.1.0, 3%": (plain, peer),
        FLOOR: (plain, floor),
        PARTS[0]: (plain, forward),
        PARTS[1]: (plain, loss),
        PARTS[2]: (plain, kept_rows),
        **{f"gated, {rate:.0%}": (kondo.gated(work.model, rate=rate), full) for rate in RATES},
        "gated random rows, 3%": (kondo.gated(work.model, rate=0.03, priority="uniform"), full),
        "gated screen-first, 3%": (first, screen_first),
    }


def first_kept(work: Workload, logp: Tensor, k: int) -> Tensor:
    delight = -logp * work.advantages
    return (delight.sum(1) if delight.dim() == 2 else delight).topk(k).indices.sort().values


def saved_bytes(step: Callable[[], None], parameters: set[int]) -> int:
    """The most bytes that autograd held for backwards at any time of a step, and that is not a parameter."""
    held: dict[int, int] = {}
    references: dict[int, int] = {}
    peak = 0

    class Held:
        def __init__(self, tensor: Tensor):
            nonlocal peak
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            if self.key not in parameters:
                references[self.key] = references.get(self.key, 0) + 1
                held[self.key] = tensor.untyped_storage().nbytes()
                peak = max(peak, sum(held.values()))

        def __del__(self):
            if self.key in references:
                references[self.key] -= 1
                if not references[self.key]:
                    del references[self.key], held[self.key]

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.tensor):
        step()
    return peak


def measure(work: Workload, rounds: int, bar: tqdm) -> list[dict[str, str | float]]:
    variants = steps(work)
    times: dict[str, list[float]] = {name: [] for name in variants}
    cuda = next(work.model.parameters()).is_cuda
    shuffle = random.Random(0).shuffle
    for i in range(rounds + 1):
        order = [item for item in variants.items() if item[0] != FLOOR]
        shuffle(order)  # what ran before leaves its mark on the allocator and the caches
        for name, (context, step) in order:
            work.model.zero_grad()
            with context:
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                if cuda:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            if i:
                times[name].append(seconds)
            bar.update()
    times[FLOOR] = [sum(parts) for parts in zip(*(times[part] for part in PARTS), strict=True)]
    parameters = {p.untyped_storage().data_ptr() for p in work.model.parameters()}
    rows = []
    for name, (context, step) in variants.items():

        def ratio(of: str, name: str = name) -> float:
            return statistics.median(a / b for a, b in zip(times[name], times[of], strict=True))

        with context:
            saved = saved_bytes(step, parameters)
        rows.append(
            {
                "model": work.name,
                "step": name,
                "ms": 1000 * statistics.median(times[name]),
                "of_full": ratio("full step"),
                "of_floor": ratio(FLOOR),
                "saved_mb": saved / 2**20,
            }
        )
    return rows


def table(rows: list[dict[str, str | float]]) -> str:
    lines = []
    for i, row in enumerate(rows):
        if i == 0 or rows[i - 1]["model"] != row["model"]:
            lines += ["", f"{row['model']:<46} {'ms':>8} {'x full':>7} {'x floor':>8} {'saved MB':>9}"]
        lines.append(
            f"  {row['step']:<44} {row['ms']:>8.2f} {row['of_full']:>7.3f} {row['of_floor']:>8.3f} "
            f"{row['saved_mb']:>9.2f}"
        )
    return "\n".join(lines)


def header(args: argparse.Namespace, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return (
        f"python benchmarks/step.py --rounds {args.rounds} --threads {args.threads} | torch {torch.__version__} | "
        f"{name}, {args.threads} threads | medians of {args.rounds} interleaved rounds"
    )


def profile(work: Workload) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    variants = steps(work)
    for name in ("gated, 3%", FLOOR):
        context, step = variants[name]
        with context:
            step()
            with torch_profile(activities=[ProfilerActivity.CPU]) as prof:
                for _ in range(3):
                    step()
        print(f"\n{work.name}: {name}\n{prof.key_averages().table(sort_by='self_cpu_time_total', row_limit=14)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="only the workload whose name starts so, e.g. Llama")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for step.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [w for w in workloads(device) if w.name.startswith(args.model or "")]
    rows = []
    with tqdm(total=len(chosen) * (args.rounds + 1) * 10, unit="step") as bar:
        for work in chosen:
            bar.set_description(work.name.split(",")[0])
            rows += measure(work, args.rounds, bar)
    print(header(args, device))
    print(table(rows))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "step.csv").open("w", newline="") as file:
            file.write(f"# {header(args, device)}\n")
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    if args.profile:
        profile(chosen[-1])


if __name__ == "__main__":
    main()
