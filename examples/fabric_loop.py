"""A policy gradient in a Lightning Fabric loop: gate what ``fabric.setup`` returned.

The task: name the pattern behind a noisy observation, from the reward alone. On one CPU or GPU, or on several ranks:

    python examples/fabric_loop.py
    torchrun --standalone --nproc_per_node 2 examples/fabric_loop.py
"""

import os
import statistics
import time

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

import kondo_hooks as kondo

PATTERNS, SIZE, WIDTH, DEPTH = 16, 64, 384, 6  # enough work for a CPU core; give a GPU more
BATCH, UPDATES, RATE, ROUNDS = 512, 40, 0.05, 7  # BATCH samples a rank


class Layer(nn.Sequential):
    """A residual MLP."""

    def __init__(self):
        super().__init__(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Policy(nn.Module):
    """Logits (B, PATTERNS) of observations (B, SIZE)."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(SIZE, WIDTH), nn.Linear(WIDTH, PATTERNS)
        self.layers = nn.Sequential(*(Layer() for _ in range(DEPTH)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)))


def policy_loss(model: nn.Module, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a new batch, and its mean reward: the fraction of patterns that were named right."""
    labels = torch.randint(PATTERNS, (BATCH,), device=patterns.device)
    noise = 2.5 * torch.randn(BATCH, SIZE, device=patterns.device)
    policy = torch.distributions.Categorical(logits=model(patterns[labels] + noise))
    actions = policy.sample()
    rewards = (actions == labels).float()
    baseline = policy.probs.detach().square().sum(-1)
    return -((rewards - baseline) * policy.log_prob(actions)).mean(), rewards.mean()


def main() -> None:
    ranks, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))  # as torchrun says
    fabric = Fabric(strategy="ddp" if ranks > 1 else "auto", devices=here, num_nodes=ranks // here)
    fabric.launch()

    torch.manual_seed(0)  # the same patterns and weights on every rank
    patterns = torch.randn(PATTERNS, SIZE).to(fabric.device)
    model = Policy()
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=3e-4))
    torch.manual_seed(1 + fabric.global_rank)  # other samples on every rank

    def update() -> float:
        loss, reward = policy_loss(model, patterns)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return reward.item()

    with kondo.gated(model, rate=RATE) as gate:
        for i in range(1, UPDATES + 1):
            reward = update()
            if i == 1 or i % 5 == 0:
                fabric.print(f"update {i:3}: reward {reward:.3f}", flush=True)
    mine = torch.tensor([gate.stats.rows, gate.stats.kept, gate.stats.forwarded], device=fabric.device)
    stats = fabric.all_gather(mine).reshape(ranks, 3).tolist()

    def seconds() -> float:
        fabric.barrier()
        start = time.perf_counter()
        update()
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    full, gated = [], []
    for _ in range(ROUNDS):  # in turns, so that a busy machine slows both
        full.append(seconds())
        with gate:
            gated.append(seconds())

    fabric.print(f"\n{'':12}{'ms an update':>14}{'x full':>9}")
    for name, times in (("full", full), (f"gated, {RATE:.0%}", gated)):
        median = statistics.median(times)
        fabric.print(f"{name:12}{1000 * median:14.1f}{median / statistics.median(full):9.2f}")
    fabric.print(f"\n{'rank':12}{'rows':>14}{'kept':>9}{'replayed':>10}")
    for r, (rows, kept, replayed) in enumerate(stats):
        fabric.print(f"{r:<12}{rows:14}{kept:9}{replayed:10}")


if __name__ == "__main__":
    main()
