"""A policy gradient under DeepSpeed ZeRO-3: the micro-batches of an accumulation are gated as one batch.

The task: name the pattern behind a noisy observation, from the reward alone. Two ranks, on the CPU or on two GPUs:

    torchrun --nproc_per_node 2 examples/deepspeed_zero.py
"""

import os
import statistics
import time
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

import kondo_hooks as kondo

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

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
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of DeepSpeed's own calls, by the thousand
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same patterns and weights on every rank
    patterns = torch.randn(PATTERNS, SIZE).to(device)
    net = Policy()
    config = {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": MICRO_BATCHES}
    config |= {"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}
    model, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.Adam(net.parameters(), lr=3e-4), config=config)
    torch.manual_seed(1 + rank)  # other samples on every rank

    def update() -> float:
        for _ in range(MICRO_BATCHES):
            loss, reward = policy_loss(model, patterns)
            model.backward(loss)
            model.step()
        return reward.item()

    with kondo.gated(model, rate=RATE, window="auto") as gate:
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
        torch.cuda.synchronize() if device.type == "cuda" else None
        return time.perf_counter() - start

    full, gated = [], []
    for _ in range(ROUNDS):  # in turns, so that a busy machine slows both
        full.append(seconds())
        with gate:
            gated.append(seconds())

    if rank == 0:
        print(f"\n{'':12}{'ms an update':>14}{'x full':>9}")
        full_ms, gated_ms = 1000 * statistics.median(full), 1000 * statistics.median(gated)
        print(f"{'full':12}{full_ms:14.1f}{1:9.2f}\ngated, {RATE:<5.0%}{gated_ms:14.1f}{gated_ms / full_ms:9.2f}")
        print(f"\n{'rank':12}{'rows':>14}{'kept':>9}{'replayed':>10}")
        for r, (rows, kept, replayed) in enumerate(stats):
            print(f"{r:<12}{rows:14}{kept:9}{replayed:10}")
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads let go of their last tensors, which they cannot do once Python shuts down


if __name__ == "__main__":
    main()
