"""A healthy kernel that sums in another order for fewer rows never raises; rows that are tied always do."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical

import kondo_hooks as kondo

ROWS, WIDTH, ACTIONS = 64, 48, 8


class OtherOrder(nn.Linear):
    """A product whose terms are summed in another order where the batch is small, as a GPU's kernels do."""

    low = torch.bfloat16

    def forward(self, x):
        parts = 4 if x.shape[0] <= ROWS // 2 else 1
        weight, x = self.weight.to(self.low).float(), x.to(self.low).float()
        y = sum(a @ b.t() for a, b in zip(x.chunk(parts, -1), weight.chunk(parts, -1), strict=True))
        return y.to(self.low) + self.bias.to(self.low)


class OtherOrder32(OtherOrder):
    low = torch.float32


class Agent(nn.Module):
    """A residual network with log-probs and a value; ``sharp`` gives its largest logit about that size."""

    def __init__(self, linear, depth, sharp):
        super().__init__()
        self.first = linear(16, WIDTH)
        self.blocks = nn.ModuleList(linear(WIDTH, WIDTH) for _ in range(depth))
        self.policy, self.value = linear(WIDTH, ACTIONS), linear(WIDTH, 1)
        with torch.no_grad():
            self.policy.weight.mul_(sharp)
        self.couple = lambda h: h

    def forward(self, x, actions):
        h = self.first(x)
        for block in self.blocks:
            h = h + F.gelu(block(F.layer_norm(h.float(), h.shape[-1:])))
        h = self.couple(F.layer_norm(h.float(), h.shape[-1:]))
        policy = Categorical(logits=self.policy(h).float())
        return policy.log_prob(actions), self.value(h)[:, 0].float()


def step(model, low, seed, kept=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 16, generator=generator)
    actions = torch.randint(ACTIONS, (ROWS,), generator=generator)
    returns = torch.randn(ROWS, generator=generator)
    gate = kondo.gated(model, rate=kept / ROWS, priority="abs_advantage", logp=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=low == torch.bfloat16), gate:
        logp, value = model(x, actions)
        (-(logp * returns).mean() + (value - returns).pow(2).mean()).backward()


@pytest.mark.parametrize("sharp", [1, 30], ids=["flat", "sharp"])
@pytest.mark.parametrize("depth", [4, 32])
@pytest.mark.parametrize("linear", [OtherOrder, OtherOrder32], ids=["bf16", "fp32"])
@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
def test_healthy_rounding_never_raises(linear, depth, sharp):
    model = Agent(linear, depth, sharp)
    for seed in range(30):
        step(model, linear.low, seed, kept=1 + seed % 3)


COUPLINGS = {
    "mean": lambda h, strength: h + strength * h.mean(0),
    "neighbour": lambda h, strength: h + strength * h.roll(1, 0),
    "size": lambda h, strength: h * (1 + strength * len(h)),
}


@pytest.mark.parametrize("strength", [0.01, 0.1])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("depth", [4, 32])
def test_tied_rows_always_raise(depth, coupling, strength):
    model = Agent(OtherOrder32, depth, 30)
    model.couple = lambda h: COUPLINGS[coupling](h, strength)
    for seed in range(5):
        with pytest.raises(kondo.ReplayMismatchError, match="depends on the other rows"):
            step(model, torch.float32, seed, kept=4)
        assert all(p.grad is None for p in model.parameters())


def batch_norm_of_ones_own(mask):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 7)

        def forward(self, x):
            h = self.a(x).tanh()
            return mask(self.b((h - h.mean(0)) / (h.std(0) + 1e-5)))

    return Masked()


MASKS = {
    "columns": lambda y: y.masked_fill(torch.arange(7) > 4, -1e4),
    "most columns": lambda y: y.masked_fill(torch.arange(7) > 1, -1e9),
    "rows of their own": lambda y: y.masked_fill((torch.arange(len(y))[:, None] + torch.arange(7)) % 3 == 0, -1e4),
    "infinite": lambda y: y.masked_fill(torch.arange(7) > 4, -torch.inf),
    "one large column": lambda y: y * torch.tensor([1.0, 1, 1, 1, 1, 1, 1e6]),
}


@pytest.mark.parametrize("mask", MASKS)
def test_large_values_do_not_hide_tied_rows(mask):
    model = batch_norm_of_ones_own(MASKS[mask])
    x, weights = torch.randn(16, 6), torch.randn(16, 7)
    with pytest.raises(kondo.ReplayMismatchError), kondo.gated(model, rate=0.25, priority="uniform"):
        (model(x) * weights).mean().backward()


def test_what_the_loss_does_not_use_is_not_compared():
    class Leaky(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return torch.cat([y[:, :-1], y[:, -1:] + y.mean(0)[-1]], 1)

    model = Leaky(6, 7)
    with kondo.gated(model, rate=0.25, priority="uniform") as gate:
        model(torch.randn(16, 6))[:, :-1].pow(2).mean().backward()
    assert gate.stats.forwarded == 4


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_what_depends_on_the_batch_size_alone_is_no_rounding_of_autocast(share):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x):
            return self.layer(x) * (1 + share / len(x))

    torch.manual_seed(0)
    model, x, actions = Sized(), 1 + 0.1 * torch.randn(4, 6), torch.randint(5, (4,))
    with torch.autocast("cpu", torch.bfloat16), kondo.gated(model, rate=0.5):
        loss = F.cross_entropy(model(x).float(), actions)
        with pytest.raises(kondo.ReplayMismatchError) if share else contextlib.nullcontext():
            loss.backward()
