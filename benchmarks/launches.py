"""What a gated step costs a GPU beside arithmetic: waits, kernels of the gate's own, and bytes while logits are held.

    python benchmarks/launches.py                 # the table, about a minute
    python benchmarks/launches.py --where mlp     # the lines that make the device wait in one case

Runs on the emulated device of the tests (``tests/device``, which needs a C++ compiler): it runs on the CPU, and counts
each kernel and each time that the host waits. A wait stalls a GPU's queue; a small kernel costs it 5 to 10
microseconds. "own kernels" are those of the gated step less those of its parts by hand: a forward without a graph, the
loss, and forward and backward of the kept rows. "peak" is the most bytes in use beyond those before the step, in units
of the logits, for a model that is nearly all logits; the plain loop's beside it.
"""

import argparse
import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import kondo_hooks as kondo
from tests.device import emu
from tests.device.counting import Counted, counted

ROOT = Path(__file__).parent.parent
DEVICE = "emu:0"
ROWS, TOKENS, WORDS = 64, 16, 512
LOGITS = ROWS * TOKENS * WORDS * 4  # bytes


class Language(nn.Module):
    """A language model that is nearly all logits; with labels it returns its loss, too, as transformers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = self.head(self.embed(ids).tanh())
        if labels is None:
            return (logits,)
        nll = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        return nll.view_as(labels).mean(), logits


def halved(rows: kondo.Rows) -> Tensor:
    """A rule of a user's own."""
    return (torch.arange(len(rows), device="cpu") % 2) * 2.0


def nothing(gate: Any) -> None:
    """Before a call that is not decided on first."""


@dataclass
class Case:
    """A model, one batch of it, and its loss as a user writes it: of the model's outputs and of some rows.

    ``end`` is what is left of a loss inside the model, once it has been computed without a graph.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    loss: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    backwards: int = 1
    before: Callable[[Any], None] = nothing
    autocast: torch.dtype | None = None
    end: Callable[[], None] = lambda: None

    def run(self, rows: Any = slice(None)) -> Tensor:
        """The loss of some rows."""
        with torch.autocast("emu", self.autocast, enabled=self.autocast is not None):
            return self.loss(self.model(*(leaf[rows] for leaf in self.inputs)), rows)


def cases() -> dict[str, Case]:
    """Every case of the table."""
    torch.manual_seed(0)
    x, actions, u = torch.randn(ROWS, 16), torch.randint(0, 4, (ROWS,)), torch.randn(ROWS)
    ids, words = torch.randint(0, WORDS, (ROWS, TOKENS)), torch.randint(0, WORDS, (ROWS, TOKENS))
    x, actions, u, ids, words = (leaf.to(DEVICE) for leaf in (x, actions, u, ids, words))

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(DEVICE)

    def of_actions(logits: Tensor, rows: Any) -> Tensor:
        logp = logits.log_softmax(-1).gather(1, actions[rows].unsqueeze(1)).squeeze(1)
        return -(logp * u[rows]).mean()

    def of_words(out: tuple[Tensor, ...], rows: Any) -> Tensor:
        logp = out[0].log_softmax(-1).gather(-1, words[rows].unsqueeze(-1)).squeeze(-1)
        return -(logp * u[rows, None]).mean()

    def inside(out: tuple[Tensor, ...], rows: Any) -> Tensor:
        return out[0]

    def reduced() -> None:
        torch.zeros(words.shape, device=DEVICE, requires_grad=True).mean().backward()

    def language() -> nn.Module:
        return Language().to(DEVICE)

    def first(gate: Any) -> None:
        gate.preselect(delight=u)

    return {
        "mlp": Case(mlp(), (x,), of_actions),
        "mlp, price": Case(mlp(), (x,), of_actions, {"rate": None, "price": 0.5}),
        "mlp, drawn": Case(mlp(), (x,), of_actions, {"deterministic": False}),
        "mlp, random rows": Case(mlp(), (x,), of_actions, {"priority": "uniform"}),
        "mlp, lossless": Case(mlp(), (x,), of_actions, {"rate": "lossless"}),
        "mlp, noise": Case(mlp(), (x,), of_actions, {"rate": None, "noise": 0.5}),
        "mlp, function": Case(mlp(), (x,), of_actions, {"rate": None, "rule": halved}),
        "language model": Case(language(), (ids,), of_words),
        "loss inside": Case(language(), (ids, words), inside, end=reduced),
        "loss inside, bfloat16": Case(language(), (ids, words), inside, autocast=torch.bfloat16, end=reduced),
        "language model, noise": Case(language(), (ids,), of_words, {"rate": None, "noise": 0.5}),
        "screen first": Case(language(), (ids,), of_words, before=first),
        "window 8": Case(mlp(), (x,), of_actions, {"window": 8}, 8),
        "window 64": Case(mlp(), (x,), of_actions, {"window": 64}, 64),
        "noise, window 8": Case(mlp(), (x,), of_actions, {"rate": None, "noise": 0.5, "window": 8}, 8),
        "noise, window 64": Case(mlp(), (x,), of_actions, {"rate": None, "noise": 0.5, "window": 64}, 64),
        "language model, window 8": Case(language(), (ids,), of_words, {"window": 8}, 8),
    }


def options_of(case: Case) -> dict[str, Any]:
    """Of the gate."""
    return {"rate": 0.125, **case.options}


def gated_step(case: Case, looks: "Looks | None" = None) -> Counted:
    """The third decision of a gate: what it finds out once is known by then."""
    with kondo.gated(case.model, **options_of(case)) as gate:
        for step in range(3):
            case.model.zero_grad()
            with counted() as found, looks if looks is not None and step == 2 else contextlib.nullcontext():
                for _ in range(case.backwards):
                    case.before(gate)
                    case.run().backward()
    return found


def plain_step(case: Case) -> Counted:
    """The same without a gate."""
    for _ in range(2):
        case.model.zero_grad()
        with counted() as found:
            for _ in range(case.backwards):
                case.run().backward()
    return found


def own_kernels(case: Case, ours: Counted) -> int:
    """Kernels of a gated step beside those of its parts by hand: screen, loss, kept rows with a graph."""
    options = options_of(case)
    rate = options["rate"] if isinstance(options["rate"], float) else 0.3
    rows = torch.arange(round(rate * ROWS * case.backwards), device=DEVICE) % ROWS
    screens_first = case.before is not nothing
    with counted() as parts:
        for _ in range(0 if screens_first else case.backwards):
            with torch.no_grad(), torch.autocast("emu", case.autocast, enabled=case.autocast is not None):
                out = case.model(*case.inputs)
            case.end()
            if isinstance(out, Tensor) or out[0].dim():
                outs = [leaf.detach().requires_grad_() for leaf in (out if isinstance(out, tuple) else (out,))]
                case.loss(tuple(outs) if isinstance(out, tuple) else outs[0], slice(None)).backward()
        case.run(rows).backward()
    return ours.launches - parts.launches


class Looks(TorchDispatchMode):
    """Counts the lines of the project under which the device was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and see whether that waited."""
        before, launched = emu.synchronisations(), emu.launches()
        result = func(*args, **(kwargs or {}))
        n, kernels = emu.synchronisations() - before, emu.launches() - launched
        if n or kernels:
            frames = [f for f in traceback.extract_stack() if "kondo_hooks" in f.filename]
            line = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[:-4:-1]) or "(loop)"
            self.lines[f"{line}: {func}"] += n
            self.kernels[f"{line}: {func}"] += kernels
        return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", help="a case, of which the lines that wait and launch are listed")
    parser.add_argument("--kernels", action="store_true", help="with --where: list kernels, not waits")
    options = parser.parse_args()
    every = cases()
    if options.where:
        looks = Looks()
        gated_step(every[options.where], looks)
        for line, n in (looks.kernels if options.kernels else looks.lines).most_common():
            if n:
                print(f"{n:5d}  {line}")
        return
    print(f"{'':28s} {'waits':>6s} {'plain':>6s} {'own kernels':>12s} {'peak':>6s} {'plain':>6s}")
    for name, case in every.items():
        case.run().backward()
        plain, ours = plain_step(case), gated_step(case)
        counts = f"{ours.synchronisations:6d} {plain.synchronisations:6d} {own_kernels(case, ours):12d}"
        peaks = "".join(f" {c.peak_bytes / LOGITS:6.2f}" for c in (ours, plain) if case.inputs[0].dtype == torch.int64)
        print(f"{name:28s} {counts}{peaks}", flush=True)


if __name__ == "__main__":
    main()
