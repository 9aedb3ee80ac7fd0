"""What a forward leaves in its modules: buffers and attributes change once a step, and what a loss takes from them is
an output like any other.
"""

import pytest
import torch
from torch import nn

import kondo_hooks as kondo
from tests.cases import FEATURES, K, Mlp, make_batch
from tests.reference import copies
from tests.test_context import check, reinforce


@pytest.fixture
def batch():
    return make_batch(12, False, torch.float64)


def train(model, batch, steps=5, **options):
    """Steps without an optimizer, gated or plain."""
    with kondo.gated(model, **options) as gate:
        for _ in range(steps):
            model.zero_grad()
            reinforce(model(batch.x), batch).backward()
    return gate


# Buffers.


class Statistics(Mlp):
    """Updates a buffer from call ``start`` on, in one of three ways."""

    def __init__(self, way, start):
        super().__init__()
        self.way, self.start = way, start
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", None if way == "made" else torch.zeros(FEATURES))

    def forward(self, x):
        result = super().forward(x if self.mean is None else x / (1 + self.mean.abs()))
        if self.calls >= self.start:
            if self.way == "in place":
                self.mean.lerp_(x.mean(0), 0.1)
            elif self.mean is None:
                self.mean = x.mean(0)
            else:
                self.mean = self.mean.lerp(x.mean(0), 0.1)
        self.calls += 1
        return result


@pytest.mark.parametrize("way, start", [("replaced", 0), ("replaced", 2), ("made", 0), ("made", 2), ("in place", 0)])
def test_a_buffer_is_updated_once_a_step_whatever_call_it_first_changes_in(way, start, batch):
    model, reference = copies(Statistics(way, start).double())
    gate = train(model, batch, rate=0.25)
    train(reference, batch, steps=4, rate=1.0)
    reference.zero_grad()
    check(model, reference, batch, gate)
    torch.testing.assert_close(model.mean, reference.mean)
    assert model.calls == reference.calls == 5


def test_a_value_that_is_lost_is_told_and_not_guessed(batch):
    model, reference = copies(Statistics("in place", 2).double())
    with pytest.raises(kondo.ReplayMismatchError):
        train(model, batch, rate=0.25)
    train(reference, batch, steps=3, rate=1.0)
    torch.testing.assert_close(model.mean, reference.mean)


def test_a_buffer_that_the_first_call_registers(batch):
    class Lazy(Mlp):
        def forward(self, x):
            if not hasattr(self, "shift"):
                self.register_buffer("shift", torch.ones(FEATURES).to(x))
            result = super().forward(x - self.shift)
            self.shift = self.shift + 0.1
            return result

    model, reference = copies(Lazy().double())
    gate = train(model, batch, 1, rate=0.25)
    check(model, reference, batch, gate)
    torch.testing.assert_close(model.shift, reference.shift)


@pytest.mark.parametrize("kind", ["sparse", "csr", "inference", "meta", "quantised"])
@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|quantize|deprecat).*")
def test_buffers_of_every_kind(kind, batch):
    class Graph(Mlp):
        def __init__(self):
            super().__init__()
            self.register_buffer("adjacency", (torch.eye(FEATURES) + torch.eye(FEATURES).roll(1, 0)).double())
            if kind == "sparse":
                self.adjacency = self.adjacency.to_sparse()
            elif kind == "csr":
                self.adjacency = self.adjacency.to_sparse_csr()
            elif kind == "inference":
                with torch.inference_mode():
                    self.adjacency = self.adjacency * 1
            elif kind == "meta":
                self.register_buffer("unused", torch.empty(3, device="meta"))
            else:
                self.register_buffer("unused", torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8))

        def forward(self, x):
            return super().forward((self.adjacency @ x.mT).mT)

    model, reference = Graph().double(), Graph().double()
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if "body" in k}, strict=False)
    gate = train(model, batch, 1, rate=0.25)
    check(model, reference, batch, gate)


@pytest.mark.parametrize("updates", [False, True])
def test_a_scripted_submodule_with_a_buffer(updates, batch):
    class Norm(nn.Module):
        updates: torch.jit.Final[bool]

        def __init__(self):
            super().__init__()
            self.updates = updates
            self.register_buffer("mean", torch.zeros(FEATURES).double())

        def forward(self, x):
            result = x - self.mean
            if self.updates:
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
                self.mean += 0.01
            return result

    plain = nn.Sequential(Norm(), nn.Linear(FEATURES, K)).double()
    model = nn.Sequential(torch.jit.script(Norm()), nn.Linear(FEATURES, K)).double()
    model.load_state_dict(plain.state_dict())
    gate = train(model, batch, 1, rate=0.25)
    check(model, plain, batch, gate)
    torch.testing.assert_close(model[0].mean, plain[0].mean)
