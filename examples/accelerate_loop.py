"""A policy gradient in an accelerate loop: the micro-batches of an accumulation are gated as one batch.

The task: name the pattern behind a noisy observation, from the reward alone. Two ranks, on the CPU or on two GPUs:

    torchrun --nproc_per_node 2 examples/accelerate_loop.py
"""

import statistics
import time

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

import kondo_hooks as kondo

PATTERNS, SIZE, WIDTH, DEPTH = 16, 64, 384, 6  # enough work for a CPU core; give a GPU more
BATCH, MICRO_BATCHES, UPDATES, RATE, ROUNDS = 512, 4, 40, 0.05, 7  # BATCH samples a rank and micro-batch


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
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=MICRO_BATCHES)
    rank, device = accelerator.process_index, accelerator.device

    torch.manual_seed(0)  # the same patterns and weights on every rank
    patterns = torch.randn(PATTERNS, SIZE).to(device)
    net = Policy()
    model, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=3e-4))
    torch.manual_seed(1 + rank)  # other samples on every rank

    def update() -> float:
        for _ in range(MICRO_BATCHES):
            with accelerator.accumulate(model):
                loss, reward = policy_loss(model, patterns)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return reward.item()

    with kondo.gated(model, rate=RATE, window="auto") as gate:
        for i in range(1, UPDATES + 1):
            reward = update()
            if rank == 0 and (i == 1 or i % 5 == 0):
                print(f"update {i:3}: reward {reward:.3f}", flush=True)
    stats = gather_object([(gate.stats.rows, gate.stats.kept, gate.stats.forwarded)])

    def seconds() -> float:
        accelerator.wait_for_everyone()
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
    accelerator.end_training()


if __name__ == "__main__":
    main()
