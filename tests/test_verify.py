"""A healthy kernel that sums in another order for fewer rows never raises; rows that are tied always do."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical

import kondo_hooks as kondo
from kondo_hooks import api
from kondo_hooks.ranks.agreement import Ranks
from kondo_hooks.ranks.engines import OnRanks
from tests.reference import grads, largest_relative_difference

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


# Where the loss picks log-probs from a log-softmax of the outputs, these stand for the logits.


class Words(nn.Module):
    """A language model; ``coupled`` ties each row to the mean of all."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6, dtype=dtype), nn.Linear(6, 11, dtype=dtype)
        self.coupled = 0.0

    def forward(self, ids):
        logits = self.head(self.embed(ids).tanh())
        return logits + self.coupled * logits.mean(0) * torch.arange(11, device=ids.device)


def gathered(logits, ids, u, w):
    return -(logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) * u * w).mean()


def shifted(logits, ids, u, w):
    return gathered(logits[:, :-1], ids[:, 1:], u, w)


def completions(logits, ids, u, w):
    return gathered(logits[:, 1:-1].float(), ids[:, 2:], u, w)


def with_entropy(logits, ids, u, w):
    logp = logits.log_softmax(-1)
    return -((logp.gather(-1, ids[..., None]).squeeze(-1) * u - 0.1 * (logp.exp() * logp).sum(-1)) * w).mean()


def several_entries(logits, ids, u, w):
    return -(
        logits.log_softmax(-1).gather(-1, torch.stack([ids, (ids + 1) % 11], -1)) * u[..., None] * w[..., None]
    ).mean()


def sub_vocabulary(logits, ids, u, w):
    return gathered(logits[..., :9], ids % 9, u, w)


def cooled(logits, ids, u, w):
    return gathered(logits / 0.7, ids, u, w)


PICKS = {f.__name__: f for f in (gathered, shifted, completions, with_entropy, several_entries, sub_vocabulary, cooled)}
STANDING_IN = {"gathered", "shifted", "completions", "several_entries"}


@pytest.fixture
def texts():
    g = torch.Generator().manual_seed(0)
    return torch.randint(11, (12, 5), generator=g), torch.randn(12, 1, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("name", PICKS)
def test_log_probs_stand_for_logits_and_every_step_is_exact(name, texts):
    ids, u = texts
    model = Words()
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25) as gate:
        for step in range(3):
            model.zero_grad()
            logits = model(ids)
            call = logits.grad_fn.kondo_call
            held = []
            call.receive = lambda *args, call=call, own=call.receive, held=held: (
                held.append(dict(call.picked)),
                own(*args),
            )[1]
            PICKS[name](logits, ids, u, torch.ones(12, 1)).backward()
            reference.zero_grad()
            PICKS[name](reference(ids), ids, u, gate.last.factors()[:, None]).backward()
            tolerance = 1e-5 if name == "completions" else 1e-10
            assert largest_relative_difference(grads(model), grads(reference)) < tolerance
            assert bool(held[0]) == (step > 0 and name in STANDING_IN)


@pytest.mark.parametrize("name", sorted(STANDING_IN))
def test_a_coupling_that_comes_later_is_seen_in_the_log_probs(name, texts):
    ids, u = texts
    model = Words()
    with kondo.gated(model, rate=0.25):
        for _ in range(2):
            PICKS[name](model(ids), ids, u, torch.ones(12, 1)).backward()
        before = grads(model)
        model.coupled = 0.01
        with pytest.raises(kondo.ReplayMismatchError, match="depends on the other rows"):
            PICKS[name](model(ids), ids, u, torch.ones(12, 1)).backward()
        assert largest_relative_difference(grads(model), before) == 0
        model.coupled = 0.0
        PICKS[name](model(ids), ids, u, torch.ones(12, 1)).backward()


def test_logits_that_were_written_into_do_not_go(texts):
    ids, u = texts
    model = Words()
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25) as gate:
        for _ in range(3):
            model.zero_grad()
            logits = model(ids)
            loss = gathered(logits, ids, u, torch.ones(12, 1))
            logits.detach().zero_()
            loss.backward()
    gathered(reference(ids), ids, u, gate.last.factors()[:, None]).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_a_second_backward_of_one_loss_has_its_log_probs(texts):
    ids, u = texts
    model = Words()
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25) as gate:
        for _ in range(2):
            model.zero_grad()
            loss = gathered(model(ids), ids, u, torch.ones(12, 1))
            loss.backward(retain_graph=True)
            loss.backward()
    (2 * gathered(reference(ids), ids, u, gate.last.factors()[:, None])).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


class Shifting(Words):
    """All logits move by a share of the batch's mean: log-probs stay as they are."""

    shift = 0.0

    def forward(self, ids):
        logits = super().forward(ids)
        return logits + self.shift * logits.mean()


TERMS = {"normaliser": lambda y: 0.3 * (y.logsumexp(-1) ** 2).mean(), "size": lambda y: 0.1 * y[:, :2].pow(2).mean()}


@pytest.mark.parametrize("name", TERMS)
def test_what_else_a_loss_takes_from_logits_is_compared_too(name, texts):
    ids, u = texts
    model = Shifting()

    def loss():
        logits = model(ids)
        return gathered(logits, ids, u, torch.ones(12, 1)) + TERMS[name](logits)

    with kondo.gated(model, rate=0.25):
        for _ in range(2):
            loss().backward()
        model.shift = 0.1
        with pytest.raises(kondo.ReplayMismatchError, match="depends on the other rows"):
            loss().backward()


def assert_third_step_is_exact(model, loss, rows=12):
    """``loss(model, w)`` with each row's terms times w, (rows, 1): from the second step on log-probs may stand in."""
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25) as gate:
        for _ in range(3):
            model.zero_grad()
            loss(model, torch.ones(rows, 1)).backward()
    loss(reference, gate.last.factors()[:, None]).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_log_probs_that_got_no_gradient_are_not_compared(texts):
    """Masked positions take the mean of the batch."""
    ids, u = texts
    mask = (torch.arange(5) < 3).expand(12, 5)

    class Padded(Words):
        def forward(self, ids):
            logits = super().forward(ids)
            return torch.where(mask[: len(ids), :, None], logits, logits.mean((0, 1)))

    assert_third_step_is_exact(Padded(), lambda m, w: gathered(m(ids), ids, u * mask, w))


def test_a_broadcast_index_is_left_alone(texts):
    ids, u = texts

    def loss(m, w):
        return -(torch.take_along_dim(m(ids).log_softmax(-1), ids[:, :1, None], -1).squeeze(-1) * u * w).mean()

    assert_third_step_is_exact(Words(), loss)


def test_another_backward_of_the_same_logits_reads_them_as_they_were(texts):
    ids, u = texts
    model = Words()
    with kondo.gated(model, rate=0.25) as gate:
        for _ in range(2):
            logits = model(ids)
            gathered(logits, ids, u, torch.ones(12, 1)).backward(retain_graph=True)
            first = gate.last.delight
            (-(logits.log_softmax(-1) * F.one_hot(ids, 11)).sum(-1) * u).mean().backward()
            torch.testing.assert_close(gate.last.delight, first)


def test_calls_of_one_backward_that_run_again_together_have_their_own_log_probs(texts):
    ids, u = texts
    others = (ids + 1) % 11

    def loss(m, w):
        return gathered(m(ids), ids, u, w[:12]) + gathered(m(others), ids, u, w[12:])

    assert_third_step_is_exact(Words(), loss, rows=24)


class Upcast(nn.Module):
    """Log-probs in float32 of a model of another type, whose last digits depend on the number of rows."""

    def __init__(self, dtype, noise):
        super().__init__()
        self.layer, self.noise = nn.Linear(4, 3, dtype=dtype), noise

    def forward(self, x):
        logits = self.layer(x.to(self.layer.weight.dtype)).float()
        return (logits * (1 + self.noise / len(x))).log_softmax(-1)


@pytest.mark.parametrize(
    ("dtype", "noise", "passes"),
    [
        (torch.bfloat16, 0.1, True),
        (torch.float16, 0.05, True),
        (torch.float32, 0.1, False),
        (torch.bfloat16, 40.0, False),
    ],
)
def test_where_no_control_can_run_the_models_own_type_says_what_rounding_is(dtype, noise, passes, monkeypatch):
    class Talks(OnRanks):
        communicates = True

    monkeypatch.setattr(api, "find_engine", lambda model, *_: Talks([model], Ranks()))
    torch.manual_seed(0)
    model, x, actions = Upcast(dtype, noise), torch.randn(16, 4), torch.randint(3, (16, 1))
    refused = contextlib.nullcontext() if passes else pytest.raises(kondo.ReplayMismatchError)
    with refused, kondo.gated(model, rate=0.25, audit=0) as gate:
        (-torch.randn(16, 1) * model(x).gather(1, actions)).mean().backward()
    assert gate.stats.steps == int(passes)
