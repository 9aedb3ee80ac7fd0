"""``window="step"``: micro-batches whose number nobody knows wait until their gradient is wanted."""

import pytest
import torch
from torch import nn

import kondo_hooks as kondo
from tests.reference import copies, grads, largest_relative_difference


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batches(number, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 6, (number,), generator=g).tolist()
    return [
        (
            torch.randn(n, 6, generator=g, dtype=torch.float64),
            torch.randint(4, (n,), generator=g),
            torch.randn(n, generator=g, dtype=torch.float64),
        )
        for n in sizes
    ]


def loss_of(model, given, factors=1.0):
    x, a, u = given
    return -(u * model(x).log_softmax(-1).gather(1, a[:, None])[:, 0] * factors).sum() / 10


def clip(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 1e6)


def read(model, optimizer):
    assert model[0].weight.grad is not None


def unscale(model, optimizer):
    torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])


@pytest.mark.parametrize("wanted", [None, clip, read, unscale])
@pytest.mark.parametrize("rule", [{"rate": 0.3}, {"noise": 0.5}, {"rate": 0.2, "micro_batch_size": 2}], ids=str)
@pytest.mark.parametrize("number", [1, 3, 40])
def test_the_gradient_is_there_when_it_is_wanted(number, rule, wanted):
    ours, theirs = copies(made())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1)
    with kondo.gated(ours, window="step", **rule) as gate:
        for step in range(3):
            every = batches(number + step, step)
            optimizer.zero_grad()
            for given in every:
                loss_of(ours, given).backward()
            assert gate.stats.steps == step
            if wanted is not None:
                wanted(ours, optimizer)
                assert gate.stats.steps == step + 1
            optimizer.step()
            reference.zero_grad()
            factors = gate.last.factors().split([len(given[2]) for given in every])
            for given, mine in zip(every, factors, strict=True):
                loss_of(theirs, given, mine).backward()
            assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
            reference.step()
    assert gate.stats.steps == 3 and gate.stats.kept < gate.stats.rows
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-10)


def test_nothing_is_lost_where_the_loop_ends():
    ours, theirs = copies(made())
    with kondo.gated(ours, window="step", rate=0.5) as gate:
        for given in batches(3):
            loss_of(ours, given).backward()
    factors = gate.last.factors().split([len(given[2]) for given in batches(3)])
    for given, mine in zip(batches(3), factors, strict=True):
        loss_of(theirs, given, mine).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_the_gradient_of_something_else_brings_nothing():
    model, other = made(), nn.Linear(2, 2)
    with kondo.gated(model, window="step", rate=0.5) as gate:
        loss_of(model, batches(1)[0]).backward()
        assert other.weight.grad is None and gate.stats.steps == 0
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        assert gate.stats.steps == 0


def test_an_error_in_the_loop_leaves_nothing_waiting():
    model = made()
    with pytest.raises(ZeroDivisionError), kondo.gated(model, window="step", rate=0.5):
        loss_of(model, batches(1)[0]).backward()
        raise ZeroDivisionError
    assert all(p.grad is None for p in model.parameters())


def test_a_grad_scaler_finds_its_gradients():
    model = made().float()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    with kondo.gated(model, window="step", rate=0.5) as gate:
        for x, a, u in batches(4):
            scaler.scale(loss_of(model, (x.float(), a, u.float()))).backward()
        scaler.unscale_(optimizer)
        assert gate.stats.steps == 1
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 8.0


def test_an_optimizer_with_a_closure():
    model = made()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    every = batches(3)

    def closure():
        optimizer.zero_grad()
        losses = [loss_of(model, given) for given in every]
        for loss in losses:
            loss.backward()
        return sum(loss.detach() for loss in losses)

    with kondo.gated(model, window="step", rate="lossless") as gate:
        optimizer.step(closure)
    assert gate.stats.steps >= 3 and gate.stats.rows == sum(len(given[2]) for given in every) * gate.stats.steps


def test_other_windows_are_named():
    with pytest.raises(ValueError, match="'auto' or 'step'"):
        kondo.gated(made(), window="steps")
