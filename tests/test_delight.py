"""Delight read off (outputs, gradient) alone, and what may be followed back through the loss's graph."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kondo_hooks as kondo
from kondo_hooks.delight.boundary import Boundary, DelightError, read_boundary, read_field
from kondo_hooks.delight.graph import find_sources
from tests.cases import FEATURES, K, Mlp, make_batch


def boundary(make_loss, y, path="", told=None):
    """The boundary of a loss of ``y``, whose log-prob is advantage-weighted and summed."""
    y = y.detach().requires_grad_()
    make_loss(y).backward()
    return Boundary(path, y.detach(), y.grad, told)


def one_hot_loss(actions, advantages, log):
    return lambda y: -(log(y) * F.one_hot(actions, y.shape[-1]) * advantages.unsqueeze(-1)).sum()


LOGS = {
    "logits": (lambda x: x, lambda y: y.log_softmax(-1)),
    "log_probs": (lambda x: x.log_softmax(-1), lambda y: y),
    "probs": (lambda x: x.softmax(-1), lambda y: y.log()),
    "renormalised_probs": (lambda x: x.softmax(-1), lambda y: (y / y.sum(-1, keepdim=True)).log()),
}


@pytest.mark.parametrize("kind", LOGS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), actions=st.integers(3, 12), spread=st.floats(0.1, 6.0), length=st.integers(1, 4))
def test_advantage_and_surprisal_from_the_boundary(kind, seed, actions, spread, length):
    g = torch.Generator().manual_seed(seed)
    make, log = LOGS[kind]
    y = make(spread * torch.randn(5, length, actions, generator=g, dtype=torch.float64))
    taken = torch.randint(0, actions, (5, length), generator=g)
    advantages = torch.randn(5, length, generator=g, dtype=torch.float64)
    (signal,), residual = read_boundary([boundary(one_hot_loss(taken, advantages, log), y)])
    logp = log(y).gather(-1, taken.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(signal.advantages, advantages, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(signal.surprisal, -logp, rtol=1e-6, atol=1e-8)
    assert residual < 1e-6


def test_selected_log_probs_and_their_negative_are_known_by_field_and_else_by_how_they_were_made():
    logp = -torch.rand(6, 4, dtype=torch.float64)
    advantages = torch.randn(6, 4, dtype=torch.float64)
    for path, y in (("['per_token_logps']", logp), (".nll", -logp)):
        sign = 1 if path.startswith("[") else -1
        out = boundary(lambda t, sign=sign: -(sign * advantages * t).sum(), y, path)
        (signal,) = read_field([out])
        torch.testing.assert_close(signal.delight, -advantages * logp)
        out.path = ""
        assert read_field([out]) == []
        with pytest.raises(DelightError, match="no policy was found"):
            read_boundary([out])
        (signal,), _ = read_boundary([out], lambda: True)
        torch.testing.assert_close(signal.delight, -advantages * logp)


def test_two_actions_are_never_guessed():
    y = torch.randn(6, 2, dtype=torch.float64)
    actions, advantages = torch.tensor([0, 1, 0, 1, 0, 1]), torch.randn(6, dtype=torch.float64)
    for kind in ("logits", "renormalised_probs"):
        make, log = LOGS[kind]
        with pytest.raises(DelightError, match="two actions"):
            read_boundary([boundary(one_hot_loss(actions, advantages, log), make(y))])
    for kind in ("log_probs", "probs"):
        make, log = LOGS[kind]
        (signal,), _ = read_boundary([boundary(one_hot_loss(actions, advantages, log), make(y))])
        torch.testing.assert_close(signal.advantages.flatten(), advantages)


def test_residual_is_the_share_that_is_no_policy_gradient():
    y = torch.randn(6, 5, dtype=torch.float64)
    pg = one_hot_loss(torch.randint(0, 5, (6,)), torch.ones(6, dtype=torch.float64), lambda t: t.log_softmax(-1))
    entropy = lambda t: (t.softmax(-1) * t.log_softmax(-1)).sum()  # noqa: E731
    small = read_boundary([boundary(lambda t: pg(t) + 0.01 * entropy(t), y)])[1]
    large = read_boundary([boundary(lambda t: pg(t) + 5.0 * entropy(t), y)])[1]
    assert 0 < small < 0.05 < 0.3 < large


FOLLOWED = {
    "log_softmax": lambda y: y.log_softmax(-1),
    "temperature_and_mask": lambda y: (y / 0.7).masked_fill(torch.zeros(K, dtype=torch.bool), -1e9).log_softmax(-1),
    "half_and_back": lambda y: y.bfloat16().float().softmax(-1).clamp(1e-6).log(),
    "reshaped": lambda y: y.unsqueeze(1).expand(-1, 3, -1).reshape(-1, K),
    "transposed": lambda y: y.T,
    "selective": lambda y: y - y.logsumexp(-1, keepdim=True),
}
NOT_FOLLOWED = {
    "permuted": lambda y: y[torch.randperm(len(y))],
    "boolean_mask": lambda y: y[torch.arange(len(y)) % 2 == 0],
    "flipped": lambda y: y.flip(0),
    "first_rows": lambda y: y[:4],
    "scalar": lambda y: y.sum(),
}


@pytest.mark.parametrize("name", [*FOLLOWED, *NOT_FOLLOWED])
def test_only_operations_that_keep_row_i_in_row_i_are_followed(name):
    model, x = Mlp(), torch.randn(12, FEATURES)
    with kondo.gated(model, rate=0.25):
        y = model(x)
        found = find_sources({**FOLLOWED, **NOT_FOLLOWED}[name](y))
    if name in FOLLOWED:
        assert [source.call.batch for source in found] == [12]
    else:
        assert found is None


@pytest.mark.parametrize("order", ["permuted", "masked"])
def test_rows_reordered_before_the_loss_are_still_scored_as_the_rows_they_are(order):
    """What cannot be followed is read off the boundary, whose rows are the model's."""
    model = Mlp().double()
    batch = make_batch(12, False, torch.float64)
    index = torch.randperm(12) if order == "permuted" else torch.arange(12)[torch.arange(12) % 3 > 0]
    with kondo.gated(model, rate=0.25) as gate:
        logits = model(batch.x)
        logp = logits[index].log_softmax(-1).gather(1, batch.actions[index, None]).squeeze(1)
        (-logp * batch.advantages[index]).sum().backward()
    expected = torch.zeros(12, dtype=torch.float64)
    expected[index] = (-logp * batch.advantages[index]).detach()
    ours = gate.last.delight
    torch.testing.assert_close(ours / ours.norm(), expected / expected.norm())


def test_time_slices_know_where_they_start():
    class PerToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(FEATURES, K)

        def forward(self, x):
            return self.head(x)

    model, x = PerToken(), torch.randn(4, 6, FEATURES)
    with kondo.gated(model, rate=0.5):
        y = model(x)
        offsets = [find_sources(t)[0].offset for t in (y[:, :-1], y[:, 2:], y[:, -1], y[:, 1:][:, 2:], y)]
    assert offsets == [0, 2, 5, 3, 0]
