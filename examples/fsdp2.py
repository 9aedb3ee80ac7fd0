"""A policy gradient on a model that ``fully_shard`` shards: the samples of all ranks are gated as one batch.

The task: name the pattern behind a noisy observation, from the reward alone. Two ranks, on the CPU or on two GPUs:

    torchrun --nproc_per_node 2 examples/fsdp2.py
"""

import os
import statistics
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import kondo_hooks as kondo

PATTERNS, SIZE, WIDTH, DEPTH = 16, 64, 384, 6  # enough work for a CPU core; give a GPU more
BATCH, UPDATES, RATE, ROUNDS = 2048, 40, 0.05, 7  # BATCH samples a rank


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
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same patterns and weights on every rank
    patterns = torch.randn(PATTERNS, SIZE).to(device)
    model = Policy().to(device)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    torch.manual_seed(1 + rank)  # other samples on every rank

    def update() -> float:
        loss, reward = policy_loss(model, patterns)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return reward.item()

    with kondo.gated(model, rate=RATE, scope="global", balance=True) as gate:
        for i in range(1, UPDATES + 1):
            reward = update()
            if rank == 0 and (i == 1 or i % 5 == 0):
                print(f"update {i:3}: reward {reward:.3f}", flush=True)
    stats = [(gate.stats.rows, gate.stats.kept, gate.stats.forwarded)] * ranks
    dist.all_gather_object(stats, stats[0])

    def seconds() -> float:
        dist.barrier()
        start = time.perf_counter()
        update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    full, gated = [], []
    for _ in range(ROUNDS):  # in turns, so that a busy machine slows both
        full.append(seconds())
        with gate:
            gated.append(seconds())

    if rank == 0:
        print(f"\n{'':12}{'ms an update':>14}{'x full':>9}")
        for name, times in (("full", full), (f"gated, {RATE:.0%}", gated)):
            median = statistics.median(times)
            print(f"{name:12}{1000 * median:14.1f}{median / statistics.median(full):9.2f}")
        print(f"\n{'rank':12}{'rows':>14}{'kept':>9}{'replayed':>10}")
        for r, (rows, kept, replayed) in enumerate(stats):
            print(f"{r:<12}{rows:14}{kept:9}{replayed:10}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
