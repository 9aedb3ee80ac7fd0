"""Random numbers that a model draws: a replay of some rows sees those that the screen drew for them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kondo_hooks as kondo

from .cases import FEATURES, K
from .reference import copies, grads, largest_relative_difference

B = 12


def own(seed=3):
    return torch.Generator().manual_seed(seed)


def _random_(x, g):
    return torch.empty(len(x), K, dtype=x.dtype).random_(1, 9, generator=g) / 9


def _permuted(x, g):
    order = torch.randperm(len(x), generator=g)
    return torch.sin(x[order].sum(-1, keepdim=True))[order.argsort()]


NOISE = {
    "rand": lambda x, g: torch.rand(len(x), K, dtype=x.dtype, generator=g),
    "randn_first": lambda x, g: torch.randn(K, len(x), dtype=x.dtype, generator=g).T,
    "normal_": lambda x, g: torch.empty(len(x), K, dtype=x.dtype).normal_(1, 2, generator=g),
    "normal": lambda x, g: torch.normal(x[:, :1].expand(-1, K), 0.5, generator=g),
    "random_": _random_,
    "bernoulli_": lambda x, g: torch.empty(len(x), K, dtype=x.dtype).bernoulli_(0.4, generator=g),
    "bernoulli": lambda x, g: torch.bernoulli(x.sigmoid()[:, :1].expand(-1, K), generator=g),
    "multinomial": lambda x, g: F.one_hot(torch.multinomial(x.exp(), 1, generator=g)[:, 0], K).to(x.dtype),
    "randint": lambda x, g: torch.randint(5, (len(x), 1), generator=g).to(x.dtype),
    "randperm_of_features": lambda x, g: torch.randperm(K, generator=g).to(x.dtype) / K,
    "randperm_of_rows": _permuted,
}


class Noisy(nn.Module):
    """Noise that scales the logits and so shows in values and gradients, from its own generator or the global one."""

    def __init__(self, noise, generator, twice=False):
        super().__init__()
        self.layer, self.noise, self.twice = nn.Linear(FEATURES, K), NOISE[noise], twice
        self.held = [generator]

    def forward(self, x):
        y = self.layer(x) * (1 + self.noise(x.detach(), self.held[0]))
        return y * (1 + self.noise(x.detach(), None)) if self.twice else y


def loss(model, x, actions, advantages, w=1.0):
    logp = model(x).log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return (-advantages * logp * w).mean()


def check(model, reference, own_generators=(), steps=3, forwarded=None):
    """Against the masked full backward with the same numbers; the gate must leave their streams where they are."""
    x, actions, advantages = torch.randn(B, FEATURES).double(), torch.randint(K, (B,)), torch.randn(B).double()
    state = torch.get_rng_state()
    masks = []
    with kondo.gated(model, rate=0.25) as gate:
        for _ in range(steps):
            loss(model, x, actions, advantages).backward()
            masks.append(gate.last.factors())
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    for w in masks:
        loss(reference, x, actions, advantages, w).backward()
    assert torch.equal(after, torch.get_rng_state())
    for mine, theirs in own_generators:
        assert torch.equal(mine.get_state(), theirs.get_state())
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    assert gate.stats.forwarded == (3 * steps if forwarded is None else forwarded)


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
@pytest.mark.parametrize("source", ["own", "global", "both"])
@pytest.mark.parametrize("noise", NOISE)
def test_noise_of_every_kind_is_the_screens(noise, source):
    model, reference = copies(Noisy(noise, None, source == "both").double())
    generators = []
    if source != "global":
        generators = [(own(), own())]
        model.held, reference.held = ([g] for g in generators[0])
    check(model, reference, generators, forwarded=3 * B if noise == "randperm_of_rows" else None)


def test_a_generator_that_the_model_has_but_uses_late():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls, self.generator = nn.Linear(FEATURES, K), 0, own()

        def forward(self, x):
            self.calls += torch.is_grad_enabled() is False
            y = self.layer(x)
            return y * (1 + torch.rand(y.shape, dtype=y.dtype, generator=self.generator)) if self.late else y

    model = Late().double()
    reference = Late().double()
    reference.load_state_dict(model.state_dict())
    x, actions, advantages = torch.randn(B, FEATURES).double(), torch.randint(K, (B,)), torch.randn(B).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with kondo.gated(model, rate=0.25) as gate:
            for late in (False, True, True):
                model.late = reference.late = late
                loss(model, x, actions, advantages).backward()
                loss(reference, x, actions, advantages, gate.last.factors()).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    assert gate.stats.forwarded == 3 + 3 + 3


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
@pytest.mark.parametrize("inner", [nn.Linear(FEATURES, FEATURES), nn.Dropout(0.3)], ids=["alone", "beside dropout"])
def test_slopes_drawn_by_value(inner):
    model, reference = copies(nn.Sequential(inner, nn.RReLU(), nn.Linear(FEATURES, K)).double())
    check(model, reference, forwarded=3 * B)


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax(hard):
    class Gumbel(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(FEATURES, 5), nn.Linear(5, K)

        def forward(self, x):
            return self.second(F.gumbel_softmax(self.first(x), hard=hard))

    check(*copies(Gumbel().double()))


# One row.


def told_of(shapes, calls=1, **options):
    model = nn.Sequential(nn.Embedding(K, 8), nn.Linear(8, K))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with kondo.gated(model, **{"rate": 0.25, **options}):
            for shape in shapes:
                ids = torch.randint(K, shape)
                logp = [model(ids).log_softmax(-1).gather(-1, ids[..., None]).sum() for _ in range(calls)]
                (-sum(logp)).backward()
    return [str(w.message) for w in seen if "of one row" in str(w.message)]


def test_a_batch_of_one_row_is_told_once():
    (message,) = told_of([(1, 40)] * 3)
    assert "(1, 40)" in message and "(B, T)" in message and "window=N" in message


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(1, 40)], {"rate": 1.0}),
        ([(1, 40)], {"calls": 5}),
        ([(1, 40)], {"unit": "token"}),
        ([(1, 40)], {"rate": None, "price": 0.0}),
        ([(1, 40)] * 2, {"window": 2}),
        ([(4, 10), (1, 10)], {}),
    ],
    ids=str,
)
def test_no_word_of_one_row_where_something_is_chosen(shapes, options):
    assert not told_of(shapes, **options)


class Roles(nn.Module):
    """A policy that draws beside a value, or a forward pass, that does not."""

    def __init__(self):
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(FEATURES, 8), nn.Linear(8, K), nn.Linear(8, 1)
        self.runs = 0

    def forward(self, x, draws):
        self.runs += len(x) * torch.is_grad_enabled()
        h = self.body(x).tanh()
        if not draws:
            return self.value(h).squeeze(-1)
        return self.policy(h * (1 + torch.rand_like(h)))


@pytest.mark.parametrize("order", ["policy first", "value first", "draws from the third step on"])
def test_calls_that_draw_between_calls_that_do_not_are_replayed_by_rows(order):
    torch.manual_seed(0)
    ours, theirs = copies(Roles().double())
    x, actions, advantages = torch.randn(B, FEATURES).double(), torch.randint(K, (B,)), torch.randn(B).double()
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randint(2**31, (), generator=generator).item() for _ in range(4)]

    def objective(model, step, w=1.0):
        torch.manual_seed(steps[step])
        draws = step > 1 or "third" not in order
        if order == "value first":
            value, logits = model(x, False), model(x, True)
        else:
            logits, value = model(x, True) if draws else None, model(x, False)
        terms = (value - 1).square()
        if logits is not None:
            terms = terms - advantages * logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return (terms * w).mean()

    with warnings.catch_warnings(), kondo.gated(ours, noise=0.5) as gate:
        warnings.simplefilter("error")
        for step in range(4):
            before = ours.runs
            ours.zero_grad()
            objective(ours, step).backward()
            after = torch.rand(())
            theirs.zero_grad()
            objective(theirs, step, gate.last.factors()).backward()
            assert torch.equal(after, torch.rand(()))
            assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
            assert step == 0 or ours.runs - before <= 2 * B - 2
    assert gate.stats.skipped > 0.1
