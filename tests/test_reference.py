"""``kondo.gated`` against the reference program of the docs, and that against the slow, obvious reference."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import kondo_hooks as kondo
from tests.reference import copies, grads, largest_relative_difference

PROGRAM = Path(__file__).parent.parent / "docs" / "reference.py"
_spec = importlib.util.spec_from_file_location("reference_program", PROGRAM)
reference_program = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference_program)

MODELS = {
    "linear": lambda: nn.Linear(6, 4),
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
    "deep": lambda: nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(4)), nn.Linear(6, 4)),
    "norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4)),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.Flatten(), nn.Linear(12, 4)),
}


def reinforce(logits, actions, u, old, w):
    return -(logits.log_softmax(-1).gather(1, actions[:, None])[:, 0] * u * w).mean()


def with_entropy(logits, actions, u, old, w):
    logp = logits.log_softmax(-1)
    return reinforce(logits, actions, u, old, w) + 0.01 * ((logp.exp() * logp).sum(1) * w).mean()


def clipped(logits, actions, u, old, w):
    ratio = (logits.log_softmax(-1).gather(1, actions[:, None])[:, 0] - old).exp()
    return -(torch.minimum(ratio * u, ratio.clamp(0.8, 1.2) * u) * w).mean()


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    x, u = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((24, 6), (24,)))
    return x, torch.randint(0, 4, (24,), generator=g), u


@pytest.mark.parametrize("rate", [0.01, 0.125, 0.5])
@pytest.mark.parametrize("loss", [reinforce, with_entropy, clipped])
@pytest.mark.parametrize("name", MODELS)
def test_the_gate_does_what_the_reference_program_does(name, loss, rate, batch):
    x, actions, u = batch
    torch.manual_seed(1)
    ours, program = copies(MODELS[name]().double())
    slow, _ = copies(ours)
    with torch.no_grad():
        old = ours(x).log_softmax(-1).gather(1, actions[:, None])[:, 0]
    ones = torch.ones(24, dtype=torch.float64)
    with kondo.gated(ours, rate=rate) as gate:
        loss(ours(x), actions, u, old, ones).backward()
    loss(reference_program.gated_call(program, x, u, actions, rate), actions, u, old, ones).backward()
    assert largest_relative_difference(grads(ours), grads(program)) < 1e-10
    loss(slow(x), actions, u, old, gate.last.factors()).backward()
    assert largest_relative_difference(grads(program), grads(slow)) < 1e-10


def test_the_program_is_as_short_as_it_says():
    code = [line for line in PROGRAM.read_text().split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) <= 30
