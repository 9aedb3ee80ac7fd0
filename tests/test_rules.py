"""Rules that give each sample a factor: their mathematics by brute force, their gradients by the masked loss."""

import copy
import itertools
import math
import statistics
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Categorical, Normal

import kondo_hooks as kondo
from kondo_hooks.core.engine import Alone
from kondo_hooks.core.pace import Pace, _Spans
from kondo_hooks.rules import draw
from kondo_hooks.rules.config import SelectionConfig
from kondo_hooks.rules.samples import Signal
from kondo_hooks.rules.selection import Selector
from kondo_hooks.rules.weigh import Costs
from tests.reference import copies, grads, largest_relative_difference, told

magnitudes = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=30).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


# The mathematics.


def moment(n, p):
    return sum(float(a**2 / b) for a, b in zip(n, p, strict=True) if b > 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(n=magnitudes, noise=st.floats(0.0, 5.0))
def test_the_noise_is_bounded_and_fewer_rows_would_exceed_it(n, noise):
    c = draw.bounded_noise(n, noise)
    allowed = (1 + noise) * float(n.square().sum())
    assert moment(n, draw.inclusion(n, c)) <= allowed * (1 + 1e-9)
    assert torch.equal(draw.inclusion(n, c) > 0, n > 0)
    if math.isfinite(c) and n.any():
        assert moment(n, draw.inclusion(n, c * 0.999)) > allowed * (1 - 1e-9)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(n=magnitudes, share=st.floats(0.01, 1.0))
def test_a_share_is_the_sum_of_the_probabilities(n, share):
    rows = share * len(n)
    p = draw.inclusion(n, draw.fixed_share(n, rows))
    assert float(p.sum()) == pytest.approx(min(rows, int((n > 0).sum())), rel=1e-9)
    unclipped = p < 1
    if unclipped.any() and n[unclipped].any():
        ratio = (p / n)[unclipped & (n > 0)]
        assert ratio.max() == pytest.approx(float(ratio.min()))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(n=magnitudes, fixed=st.floats(1e-3, 1e3), row=st.floats(1e-3, 1e1))
def test_no_other_slope_is_cheaper(n, fixed, row):
    if not n.any():
        return
    c, cost = draw.cheapest(n, fixed, row)
    total = float(n.square().sum())

    def product(c):
        p = draw.inclusion(n, c)
        return (fixed + row * float(p.sum())) * moment(n, p) / total

    assert product(c) == pytest.approx(cost, rel=1e-6)
    grid = [product(float(10**e / n.max())) for e in torch.linspace(-3, 7, 200)] + [product(math.inf)]
    assert cost <= min(grid) * (1 + 1e-6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    p=st.lists(st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)), min_size=1, max_size=30),
    start=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 10),
)
def test_a_systematic_draw_keeps_what_is_certain_and_as_many_as_the_sum(p, start, seed):
    p = torch.tensor(p, dtype=torch.float64)
    order = torch.randn(len(p), generator=torch.Generator().manual_seed(seed))
    kept = draw.systematic(p, order, start)
    assert kept[p == 1].all() and not kept[p == 0].any()
    assert abs(int(kept.sum()) - float(p.sum())) < 1 + 1e-9


def test_a_systematic_draw_keeps_each_row_with_its_probability_and_neighbours_in_each_others_place():
    p = torch.tensor([0.5, 0.25, 0.25, 0.7, 0.3, 1.0], dtype=torch.float64)
    order = torch.tensor([0.0, 1.0, 2.0, 5.0, 6.0, 3.0])
    starts = [(i + 0.5) / 1000 for i in range(1000)]
    kept = torch.stack([draw.systematic(p, order, start) for start in starts]).double()
    torch.testing.assert_close(kept.mean(0), p, atol=2e-3, rtol=0)
    assert (kept[:, :3].sum(1) == 1).all() and (kept[:, 3:5].sum(1) == 1).all()


# Decisions.


def signals_of(n=12, seed=0, norm=None):
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(n, generator=g, dtype=torch.float64)
    u[::3] = 0
    signal = Signal(u, torch.rand(n, generator=g, dtype=torch.float64), torch.ones(n, dtype=torch.bool))
    signal.norm = u.abs() if norm is None else norm
    return signal


def choose(selector, signal, forced=None):
    return selector.choose(selector.samples([signal]), forced)


FAIR = [{"noise": 0.5}, {"rate": 0.3, "priority": "norm", "unbiased": True}, {"rate": "auto"}]


@pytest.mark.parametrize("options", FAIR, ids=told)
def test_factors_are_one_on_average_where_there_is_a_gradient(options):
    selector, signal, n = Selector(SelectionConfig(**options)), signals_of(), 3000
    factors = torch.stack([choose(selector, signal).factors() for _ in range(n)])
    error = (factors.var(0) / n).sqrt().clamp_min(1e-9)
    live = signal.norm > 0
    assert ((factors.mean(0) - 1)[live].abs() < 4.5 * error[live] + 1e-9).all()
    assert not factors[:, ~live].any()


def test_the_noise_that_is_told_is_that_of_the_draw():
    selector, signal = Selector(SelectionConfig(noise=0.7)), signals_of(40)
    decision = choose(selector, signal)
    assert decision.noise == pytest.approx(0.7)
    assert decision.without_gradient == pytest.approx(14 / 40)
    assert decision.largest_factor == pytest.approx(float(decision.weights.max()))
    assert torch.equal(decision.norm, signal.norm)
    assert torch.equal(decision.advantage, torch.empty(0)) or len(decision.advantage) in (0, 40)


def test_a_share_draws_that_many():
    selector, signal = Selector(SelectionConfig(rate=0.25, priority="norm", unbiased=True)), signals_of(40)
    assert {len(choose(selector, signal).kept) for _ in range(50)} == {10}


def test_random_rows_that_are_weighed_all_weigh_the_same():
    decision = choose(Selector(SelectionConfig(rate=0.25, priority="uniform", unbiased=True)), signals_of(40))
    assert len(decision.kept) == 10 and decision.weights.tolist() == pytest.approx([4.0] * 10)


def test_lossless_keeps_what_has_a_gradient():
    decision = choose(Selector(SelectionConfig(rate="lossless")), signals_of())
    assert decision.kept.tolist() == [1, 2, 4, 5, 7, 8, 10, 11] and decision.weights is None
    assert decision.noise == 0


@pytest.mark.parametrize("options", [{"rate": "lossless"}, *FAIR], ids=told)
def test_nothing_is_kept_where_nothing_has_a_gradient(options):
    decision = choose(Selector(SelectionConfig(**options)), signals_of(norm=torch.zeros(12, dtype=torch.float64)))
    assert len(decision.kept) == 0 and decision.without_gradient == 1


@pytest.mark.parametrize("options", [{"rate": "lossless"}, *FAIR], ids=told)
def test_one_row_is_kept_unless_noise_is_asked_for(options):
    signal = Signal(torch.ones(1), torch.ones(1), torch.ones(1, dtype=torch.bool), norm=torch.tensor([1e-30]))
    decision = choose(Selector(SelectionConfig(**options)), signal)
    if "noise" in options:  # of one row as of many: two in three times, at one and a half of its weight
        assert (decision.kept.tolist(), decision.weights) in (([], None), ([0], pytest.approx([1.5])))
    else:
        assert decision.kept.tolist() == [0] and decision.weights is None


@pytest.mark.parametrize("options", [{"rate": "lossless"}, *FAIR, {"rule": lambda rows: rows.norm > 0}], ids=told)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_refused_and_leaves_no_trace(options, bad):
    selector, signal = Selector(SelectionConfig(**options)), signals_of()
    signal.norm[3] = bad
    before = selector.state_dict()
    with pytest.raises(ValueError, match="NaN or infinite in 1 of 12"):
        choose(selector, signal)
    assert selector.step == before["step"]


@pytest.mark.parametrize("options", [{"rate": "lossless"}, *FAIR, {"rule": lambda rows: rows.norm * 0}], ids=told)
def test_forced_rows_are_kept_as_they_are(options):
    signal = signals_of()
    signal.norm[3] = math.inf  # as a gradient that left the range of float16
    forced = torch.zeros(12, dtype=torch.bool)
    forced[[0, 3]] = True
    if "rule" in options:
        signal.norm[3] = 1.0
    decision = choose(Selector(SelectionConfig(**options)), signal, forced)
    assert {0, 3} <= set(decision.kept.tolist())
    assert decision.factors()[[0, 3]].tolist() == [1, 1]


@pytest.mark.parametrize("options", [*FAIR, {"rate": 0.3, "priority": "abs_advantage", "unbiased": True}], ids=told)
def test_resuming_draws_the_same_rows(options):
    selector, signal = Selector(SelectionConfig(**options)), signals_of(40)
    choose(selector, signal)
    state = selector.state_dict()
    expected = [choose(selector, signal).kept.tolist() for _ in range(5)]
    resumed = Selector(SelectionConfig(**options, seed=3))
    resumed.load_state_dict(state)
    assert [choose(resumed, signal).kept.tolist() for _ in range(5)] == expected
    assert any(kept != expected[0] for kept in expected)


def test_a_dg_weight_multiplies_the_factors():
    signal = signals_of()
    plain, weighed = (choose(Selector(SelectionConfig(noise=0.0, weight=w)), signal) for w in ("pg", "dg"))
    assert torch.equal(plain.kept, weighed.kept) and plain.weights is None
    torch.testing.assert_close(weighed.weights, torch.sigmoid(signal.delight[weighed.kept]))


# Functions of the user's.


def test_a_function_that_scores_is_what_a_fair_draw_goes_by():
    def score(rows):
        return torch.arange(12.0) * (torch.arange(12) > 6)

    selector = Selector(SelectionConfig(rate=0.25, priority=score, unbiased=True))
    factors = torch.stack([choose(selector, signals_of()).factors() for _ in range(2000)])
    assert not factors[:, :7].any() and (factors.count_nonzero(1) == 3).all()
    chance = (factors != 0).double().mean(0)[7:]
    torch.testing.assert_close(chance, 3 * torch.arange(7.0, 12.0).double() / 45, atol=0.05, rtol=0)
    assert ((factors.mean(0)[7:] - 1).abs() < 4.5 * (factors.var(0)[7:] / 2000).sqrt()).all()


def test_a_function_sees_the_rows_and_their_factors_are_used():
    seen = []

    def rule(rows):
        seen.append(rows)
        return torch.tensor([0.0, 2.0, 0.5] * 4)

    selector = Selector(SelectionConfig(rule=rule, groups=4))
    signal = signals_of()
    decision = choose(selector, signal)
    assert decision.kept.tolist() == [1, 2, 4, 5, 7, 8, 10, 11]
    assert decision.weights.tolist() == [2.0, 0.5] * 4
    (rows,) = seen
    assert len(rows) == 12 and rows.advantages.shape == rows.surprisal.shape == rows.valid.shape == (12, 1)
    assert torch.equal(rows.advantage, signal.advantages) and torch.equal(rows.norm, signal.norm)
    torch.testing.assert_close(rows.delight, signal.delight)
    assert rows.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and rows.step == 0


def test_rows_of_calls_of_several_lengths_are_padded():
    shapes, seen = [(2, 3), (3, 5)], []
    signals = [
        Signal(torch.ones(s), torch.full(s, 2.0), torch.ones(s, dtype=torch.bool), norm=torch.ones(s[0]))
        for s in shapes
    ]
    selector = Selector(SelectionConfig(priority=lambda rows: seen.append(rows) or rows.delight, rate=0.4))
    decision = selector.choose(selector.samples(signals))
    (rows,) = seen
    assert rows.valid.sum(1).tolist() == [3, 3, 5, 5, 5] and rows.advantage.tolist() == [1.0] * 5
    assert decision.kept.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.ones(3), r"returned shape \(3,\) for 12 samples"),
        ("no", "returned str, not a number"),
        (torch.full((12,), math.nan), "returned NaN or infinity for 12 samples"),
    ],
)
@pytest.mark.parametrize("name", ["rule", "priority"])
def test_what_a_function_returns_is_looked_at(name, result, message):
    def mine(rows):
        return result

    options = {"rule": mine} if name == "rule" else {"priority": mine, "rate": 0.5}
    with pytest.raises(ValueError, match=f"{name}=mine: {message}"):
        choose(Selector(SelectionConfig(**options)), signals_of())


def test_groups_that_do_not_fit_are_refused():
    selector = Selector(SelectionConfig(rule=lambda rows: rows.norm, groups=5))
    with pytest.raises(ValueError, match="groups=5: 12 samples are no whole number of groups"):
        choose(selector, signals_of())
    selector.groups = torch.zeros(7, dtype=torch.long)
    with pytest.raises(ValueError, match="groups: told for 7 samples, and the population has 12"):
        choose(selector, signals_of())


# Through the gate: the gradient is that of the loss with each row's terms times its factor.


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.head, self.value = nn.Linear(16, 4), nn.Linear(16, 1)
        self.log_std = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        hidden = self.body(x)
        return self.head(hidden), self.value(hidden).squeeze(-1)


def batch(seed=0, n=24, zeros=True):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    u = torch.randn(n, generator=g, dtype=torch.float64)
    if zeros:
        u[::2] = 0
    return x, torch.randint(0, 4, (n,), generator=g), u


def pg(out, data, factors):
    logp = out[0].log_softmax(-1).gather(-1, data[1][:, None]).squeeze(-1)
    return -(logp * data[2] * factors).mean()


def clipped(out, data, factors):
    dist = Categorical(logits=out[0])
    logp = dist.log_prob(data[1])
    ratio = (logp - (logp.detach() + 0.3 * torch.sin(7.0 * torch.arange(len(logp))))).exp()
    terms = torch.min(ratio * data[2], ratio.clamp(0.8, 1.2) * data[2])
    return -(terms * factors).mean()


def actor_critic(out, data, factors):
    dist = Categorical(logits=out[0])
    value = (out[1] - data[2]).square()
    return ((0.5 * value - dist.log_prob(data[1]) * data[2] - 0.01 * dist.entropy()) * factors).mean()


def regression(out, data, factors):
    return ((out[1] - data[2]).square() * factors).mean()


LOSSES = [pg, clipped, actor_critic, regression]
RULES = [
    {"rate": "lossless"},
    {"noise": 0.0},
    {"noise": 0.7},
    {"rate": 0.25, "priority": "norm", "unbiased": True},
    {"rate": 0.25, "priority": "norm"},
    {"rule": lambda rows: rows.norm.gt(rows.norm.median()) * 1.5},
    {"priority": lambda rows: rows.norm, "rate": 0.25},
]


def check(model, loss, data, tolerance=1e-10, **options):
    ours, theirs = copies(model)
    with kondo.gated(ours, **options) as gate:
        loss(ours(data[0]), data, 1.0).backward()
    loss(theirs(data[0]), data, gate.last.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < tolerance
    return gate


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
@pytest.mark.parametrize("options", RULES, ids=told)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_the_weighted_losss(loss, options):
    torch.manual_seed(1)
    if loss is regression and any(map(callable, options.values())):
        pytest.skip("a function of the rows is given their delight, and here is no policy")
    gate = check(Policy().double(), loss, batch(), **options)
    if options.get("noise"):
        assert 0 < len(gate.last.kept) < 24
    assert gate.stats.forwarded == len(gate.last.kept)


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
@pytest.mark.parametrize("loss", LOSSES)
def test_lossless_gives_the_gradient_of_all_rows(loss):
    torch.manual_seed(1)
    model = Policy().double()
    gate = check(model, loss, batch(), rate="lossless")
    full = copy.deepcopy(model)
    loss(full(batch()[0]), batch(), 1.0).backward()
    ours = copy.deepcopy(model)
    with kondo.gated(ours, rate="lossless"):
        loss(ours(batch()[0]), batch(), 1.0).backward()
    assert largest_relative_difference(grads(ours), grads(full)) < 1e-10
    if loss in (pg, clipped):
        assert gate.stats.forwarded < 13 and gate.stats.without_gradient >= 0.5
    else:
        assert gate.stats.forwarded == 24  # a value or an entropy has a gradient everywhere


def test_lossless_leaves_a_parameter_in_the_loss_code_its_share_of_every_row():
    torch.manual_seed(1)
    model = Policy().double()
    x, _, u = batch(zeros=False)
    with torch.no_grad():
        action = model(x)[0].clone()
        action[::2] += 1.0  # the others stand at the mean, where only the scale has a gradient

    def loss(m):
        return -(Normal(m(x)[0], m.log_std.exp()).log_prob(action).sum(-1) * u).mean()

    ours, theirs = copies(model)
    with kondo.gated(ours, rate="lossless") as gate:
        loss(ours).backward()
    loss(theirs).backward()
    assert gate.stats.forwarded == 12
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_a_gradient_that_is_zero_everywhere_leaves_zeros():
    model = Policy().double()
    data = batch()
    data[2].zero_()
    with kondo.gated(model, noise=0.5) as gate:
        pg(model(data[0]), data, 1.0).backward()
    assert len(gate.last.kept) == 0 and gate.stats.without_gradient == 1
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradients_whose_squares_leave_the_range_of_their_type_are_drawn_as_they_are(scale):
    torch.manual_seed(1)
    model, data = Policy(), batch()
    data = (data[0].float(), data[1], data[2].float())
    for options in ({"noise": 0.0}, {"rate": "lossless"}):
        with kondo.gated(model, **options) as gate:
            (pg(model(data[0]), data, 1.0) * scale).backward()
        assert len(gate.last.kept) == 12, options


def test_what_overflows_in_half_precision_is_kept_for_the_scaler_to_see():
    torch.manual_seed(1)
    model = nn.Linear(6, 4)
    x, a, u = (t.float() if t.is_floating_point() else t for t in batch())
    for options in ({"noise": 0.5}, {"rate": "lossless"}):
        model.zero_grad()
        with kondo.gated(model, **options) as gate, torch.autocast("cpu", torch.float16):
            logits = model(x)
            logp = logits.log_softmax(-1).gather(-1, a[:, None]).squeeze(-1)
            weights = u.clone()
            weights[2] = 1e9
            (-(logp.to(torch.float16) * weights.to(torch.float16)).sum()).backward()
        assert 2 in gate.last.kept.tolist() and not model.weight.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"noise": 0.5}, {"rate": "lossless"}], ids=told)
def test_two_outputs_count_by_their_share_and_calls_on_the_same_rows_are_one(options):
    torch.manual_seed(1)
    actor, critic = nn.Linear(6, 4).double(), nn.Linear(6, 1).double()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.actor, self.critic = copy.deepcopy(actor), copy.deepcopy(critic)

        def forward(self, x, value=False):
            return self.critic(x).squeeze(-1) if value else self.actor(x)

    x, a, u = batch()

    def loss(m, factors=1.0):
        logp = m(x).log_softmax(-1).gather(-1, a[:, None]).squeeze(-1)
        error = (m(x, value=True) - 100.0 * u).square()
        return ((error - logp * u) * factors).mean()

    ours, theirs = copies(Both())
    with kondo.gated(ours, **options) as gate:
        loss(ours).backward()
    loss(theirs, gate.last.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    # What is 0.02% of the squares is still half of the measure.
    logits, values = torch.zeros(24), torch.zeros(24)
    out = actor(x).detach().requires_grad_()
    (-(out.log_softmax(-1).gather(-1, a[:, None]).squeeze(-1) * u).mean()).backward()
    logits = out.grad.norm(dim=1)
    values = (2 * (critic(x).squeeze(-1).detach() - 100.0 * u) / 24).abs()
    shares = logits**2 / (logits**2).sum() + values**2 / (values**2).sum()
    norm = gate.last.norm
    torch.testing.assert_close(norm**2 / (norm**2).sum(), shares / 2)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize(
    "options", [{"noise": 0.5}, {"rate": "lossless"}, {"rate": 0.2, "priority": "norm", "unbiased": True}], ids=told
)
def test_tokens_are_drawn_by_their_own_norm(options):
    torch.manual_seed(1)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (8, 5), generator=g)
    u = torch.randn(8, 5, generator=g, dtype=torch.float64) * (torch.rand(8, 5, generator=g) < 0.5)

    def loss(m, factors=1.0):
        logp = m(ids).log_softmax(-1).gather(-1, ids.roll(1)[..., None]).squeeze(-1)
        return -(logp * u * factors).mean()

    ours, theirs = copies(Tokens().double())
    with kondo.gated(ours, **options, unit="token") as gate:
        loss(ours).backward()
    factors = gate.last.factors().view(8, 5)
    loss(theirs, factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert torch.equal(gate.last.norm.view(8, 5) > 0, u != 0)
    if options.get("rate") == "lossless":
        assert torch.equal(factors != 0, u != 0)


# Windows.


@pytest.mark.parametrize("options", [{"noise": 0.6}, {"rate": 0.25, "priority": "norm", "unbiased": True}], ids=told)
def test_a_window_draws_as_it_goes_and_holds_what_it_drew(options):
    torch.manual_seed(1)
    ours, theirs = copies(Policy().double())
    data = [batch(seed) for seed in range(4)]
    held = []
    with kondo.gated(ours, **options, window=4) as gate:
        for one in data:
            pg(ours(one[0]), one, 1.0).backward()
            held.append(sum(len(a.held.rows) for a in gate._step.window.arrivals if a.held is not None))
    factors = gate.last.factors().split(24)
    for one, mine in zip(data, factors, strict=True):
        pg(theirs(one[0]), one, mine).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    kept = [int((mine != 0).sum()) for mine in factors]
    assert held[:3] == [sum(kept[: i + 1]) for i in range(3)]
    assert sum(kept) == gate.stats.kept and gate.stats.noise > 0


def test_a_lossless_window_is_the_accumulated_gradient():
    torch.manual_seed(1)
    ours, theirs = copies(Policy().double())
    with kondo.gated(ours, rate="lossless", window=3) as gate:
        for seed in range(3):
            clipped(ours(batch(seed)[0]), batch(seed), 1.0).backward()
    for seed in range(3):
        clipped(theirs(batch(seed)[0]), batch(seed), 1.0).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert gate.stats.forwarded < 36


def test_a_function_decides_on_the_whole_window():
    torch.manual_seed(1)
    ours, theirs = copies(Policy().double())
    seen = []

    def best(rows):
        seen.append(len(rows))
        return (rows.norm >= rows.norm.topk(5).values[-1]) * 2.0

    with kondo.gated(ours, rule=best, window=3) as gate:
        for seed in range(3):
            pg(ours(batch(seed)[0]), batch(seed), 1.0).backward()
    assert seen == [72] and gate.stats.kept == 5
    for seed, mine in enumerate(gate.last.factors().split(24)):
        pg(theirs(batch(seed)[0]), batch(seed), mine).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_a_window_with_a_gradient_that_is_no_number_says_so_once_and_goes_on():
    torch.manual_seed(1)
    model = Policy().double()
    with kondo.gated(model, noise=0.5, window=2) as gate:
        bad = batch()
        bad[2][1] = math.nan
        pg(model(bad[0]), bad, 1.0).backward()
        with pytest.raises(ValueError, match="NaN or infinite"):
            pg(model(batch()[0]), batch(), 1.0).backward()
        for seed in range(2):
            pg(model(batch(seed)[0]), batch(seed), 1.0).backward()
    assert gate.stats.steps == 1


# Before the forward.


def test_log_probs_tell_the_norm_before_the_forward():
    torch.manual_seed(1)
    model, data = Policy().double(), batch()
    with torch.no_grad():
        logp = model(data[0])[0].log_softmax(-1).gather(-1, data[1][:, None]).squeeze(-1)
    ours, theirs = copies(model)
    with kondo.gated(ours, noise=0.5) as gate:
        decision = gate.preselect(logp=logp, advantages=data[2])
        pg(ours(data[0]), data, 1.0).backward()
    torch.testing.assert_close(decision.norm, data[2].abs() * (1 - logp.exp()))
    assert torch.equal(gate.last.advantage, data[2])
    pg(theirs(data[0]), data, decision.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert gate.stats.forwarded == len(decision.kept) < 12


@pytest.mark.parametrize("options", [{"noise": 0.5}, {"rate": "lossless"}, {"rate": 0.3, "priority": "norm"}], ids=told)
def test_a_norm_of_ones_own_decides(options):
    torch.manual_seed(1)
    model, data = Policy().double(), batch()
    ours, theirs = copies(model)
    with kondo.gated(ours, **options) as gate:
        decision = gate.preselect(norm=data[2].abs())
        pg(ours(data[0]), data, 1.0).backward()
    pg(theirs(data[0]), data, decision.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_what_cannot_be_known_before_the_forward_is_refused():
    model, data = Policy().double(), batch()
    norm = data[2].abs()
    for options, known, message in (
        ({"rate": "lossless"}, {"logp": -norm, "advantages": norm}, "lossless.*give norm="),
        ({"rate": "auto"}, {"norm": norm}, "rate='auto' weighs the kept rows against"),
        ({"noise": 0.5}, {"delight": norm}, "needs logp and advantages"),
        ({"rule": len}, {"norm": norm}, "needs logp and advantages"),
        ({"rate": 0.3}, {"norm": norm}, "this priority needs logp and advantages, not norm alone"),
        ({"noise": 0.5}, {"norm": norm, "delight": norm}, "give logp and advantages .* or delight or norm alone"),
        ({"noise": 0.5}, {"norm": norm[:, None]}, r"one value a row, \(B,\)"),
    ):
        with kondo.gated(model, **options) as gate, pytest.raises(ValueError, match=message):
            gate.preselect(**known)


# What is said.


def test_a_fair_rule_tells_no_critic_and_an_unfair_one_does():
    torch.manual_seed(1)
    for options, fair in (
        ({"noise": 0.5}, True),
        ({"rate": "lossless"}, True),
        ({"rate": 0.5, "priority": "norm", "unbiased": True}, True),
        ({"rate": 0.5}, False),
        ({"rate": 0.5, "priority": "norm"}, False),
        ({"rule": lambda rows: rows.norm > 0}, False),
    ):
        model = Policy().double()
        with kondo.gated(model, **options) as gate:
            if fair:
                actor_critic(model(batch()[0]), batch(), 1.0).backward()
                assert gate._warn.is_new("critic")
            else:
                with pytest.warns(kondo.KondoWarning, match="holds no policy"):
                    actor_critic(model(batch()[0]), batch(), 1.0).backward()


def test_what_was_measured_reaches_the_metrics():
    model = Policy().double()
    before = kondo.Stats()
    with kondo.gated(model, noise=0.5) as gate:
        for seed in range(5):
            pg(model(batch(seed)[0]), batch(seed), 1.0).backward()
    metrics = gate.stats.metrics(before)
    assert metrics["kondo/noise"] == pytest.approx(0.5) and metrics["kondo/largest_factor"] > 1
    assert metrics["kondo/without_gradient"] == pytest.approx(0.5)
    assert metrics["kondo/seconds_screen"] > 0 and metrics["kondo/seconds_replay"] > 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_last_decision_says_why_each_row_was_dropped():
    model, data = Policy().double(), batch()
    with kondo.gated(model, noise=0.5) as gate:
        pg(model(data[0]), data, 1.0).backward()
    last = gate.last
    torch.testing.assert_close(last.advantage[1::2], data[2][1::2])
    assert last.surprisal.shape == last.norm.shape == last.factors().shape == (24,)
    assert not last.norm[::2].any() and not last.factors()[::2].any()


# By seconds.


def step_of(pace, seconds, rows, replayed=0, replay=0.0):
    replays = [(0.0, replay)] if replayed else []
    spans = _Spans(rows, replayed, replayed > 0, steps=[(0.0, seconds)], replays=replays)
    pace._closed.append(spans)


class Decided:
    def __init__(self, cost):
        self.cost = cost


def test_steps_pass_through_for_longer_and_longer_while_the_gate_does_not_pay():
    pace = Pace(True, lambda: torch.device("cpu"))
    alone = Alone()
    assert pace.passes()
    pace._ungated = 0
    for _ in range(2):
        step_of(pace, 1.0, 10)
    for _ in range(4):
        step_of(pace, 3.0, 10, 5, 1.0)
    pauses = []
    costs = None
    for _ in range(9):
        costs = pace.settle(Decided(0.25), alone) or costs
        pauses.append(pace._ungated)
        pace._ungated = 0
    assert costs == Costs(pytest.approx(0.2), pytest.approx(0.2))
    assert pauses == [100, 200, 400, 800, 1600, 2048, 2048, 2048, 2048]  # a try costs 1% of the first
    assert pace.settle(Decided(0.05), alone) and pace._ungated == 0
    assert [pace.settle(Decided(0.05), alone) for _ in range(5)].count(None) == 5


def test_a_gate_that_never_pays_is_left_after_a_few_steps_and_its_gradient_is_all_rows():
    torch.manual_seed(1)
    ours, theirs = copies(Policy().double())
    with kondo.gated(ours, rate="auto") as gate:
        for seed in range(40):
            ours.zero_grad()
            pg(ours(batch(seed)[0]), batch(seed), 1.0).backward()
            if gate._step.shared.watcher.asleep:
                break
        assert gate._step.shared.watcher.asleep  # a model this small is always faster without
        decided = gate.stats.decided
        for seed in range(5):
            ours.zero_grad(), theirs.zero_grad()
            pg(ours(batch(seed)[0]), batch(seed), 1.0).backward()
            pg(theirs(batch(seed)[0]), batch(seed), 1.0).backward()
            assert largest_relative_difference(grads(ours), grads(theirs)) == 0
        assert gate.stats.decided == decided
        gate._step.shared.pace._ungated = 1  # and when it is to be measured again, it is all there
        with torch.device("cpu"):
            for seed in range(2):
                pg(ours(batch(seed)[0]), batch(seed), 1.0).backward()
        assert gate.stats.decided == decided + 24
    assert torch.overrides._get_current_function_mode_stack() == []


def test_auto_is_refused_for_tokens():
    with pytest.raises(ValueError, match="rate='auto' weighs the seconds of rows"):
        kondo.gated(Policy(), rate="auto", unit="token")


# What others have published.


def rows_of(advantages, groups=None, norm=None, surprisal=None):
    u = torch.as_tensor(advantages, dtype=torch.float64)
    n = len(u)
    ell = torch.ones(n, 1, dtype=torch.float64) if surprisal is None else torch.as_tensor(surprisal)[:, None]
    return kondo.Rows(
        u[:, None],
        ell,
        torch.ones(n, 1, dtype=torch.bool),
        u,
        u.abs() if norm is None else norm,
        None if groups is None else torch.as_tensor(groups),
        0,
        torch.Generator().manual_seed(0),
    )


group_values = st.lists(st.floats(-10, 10).map(lambda v: round(v, 2)), min_size=4, max_size=7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(a=group_values, b=group_values, rate=st.floats(0.05, 1.0))
def test_cppo_keeps_the_largest_advantages_of_each_group(a, b, rate):
    factors = kondo.rules.cppo(rate)(rows_of(a + b, [0] * len(a) + [1] * len(b)))
    for values, mine in ((a, factors[: len(a)]), (b, factors[len(a) :])):
        k = max(1, round(rate * len(values)))
        assert mine.sum() == k and set(mine.tolist()) <= {0.0, 1.0}
        kept = sorted((abs(v) for v, f in zip(values, mine, strict=True) if f), reverse=True)
        assert kept == sorted(map(abs, values), reverse=True)[:k]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(a=group_values, b=group_values, rate=st.floats(0.05, 1.0))
def test_pods_keeps_the_rewards_of_the_greatest_variance(a, b, rate):
    mixed = [v for pair in itertools.zip_longest(a, b) for v in pair if v is not None]
    groups = [g for pair in itertools.zip_longest([0] * len(a), [1] * len(b)) for g in pair if g is not None]
    factors = kondo.rules.pods(rate)(rows_of(mixed, groups))
    for g in (0, 1):
        values = [v for v, group in zip(mixed, groups, strict=True) if group == g]
        mine = [v for v, group, f in zip(mixed, groups, factors.tolist(), strict=True) if group == g and f]
        k = max(1, round(rate * len(values)))
        best = max(statistics.pvariance(chosen) for chosen in itertools.combinations(values, k))
        assert len(mine) == k and statistics.pvariance(mine) == pytest.approx(best, abs=1e-9)


def test_positive_rows_are_drawn_with_bounded_noise_and_are_fair_among_themselves():
    rule, rows = kondo.rules.positive(0.5), rows_of([-1.0, 2.0, 0.0, 0.5, 0.1, -3.0, 1.0])
    factors = torch.stack([rule(rows) for _ in range(3000)])
    assert not factors[:, [0, 2, 5]].any()
    live = factors[:, [1, 3, 4, 6]]
    assert ((live.mean(0) - 1).abs() < 4.5 * (live.var(0) / 3000).sqrt() + 1e-9).all()
    with pytest.raises(ValueError, match="noise must be"):
        kondo.rules.positive(-1)


def test_random_rows_are_as_many_and_fair():
    rule, rows = kondo.rules.random(0.3), rows_of(range(10))
    factors = torch.stack([rule(rows) for _ in range(3000)])
    assert (factors.count_nonzero(1) == 3).all() and (factors.sum(1) - 10).abs().max() < 1e-9
    assert ((factors.mean(0) - 1).abs() < 4.5 * (factors.var(0) / 3000).sqrt()).all()
    assert SelectionConfig(rule=rule).is_fair and not SelectionConfig(rule=kondo.rules.cppo(0.5)).is_fair


def test_the_most_surprising_are_kept():
    factors = kondo.rules.surprising(0.4)(rows_of([1.0] * 5, surprisal=[0.1, 3.0, 0.2, 2.0, 1.0]))
    assert factors.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("name", ["cppo", "pods"])
def test_a_rule_of_groups_needs_them(name):
    with pytest.raises(ValueError, match=f"kondo.rules.{name} compares the answers to one prompt"):
        getattr(kondo.rules, name)(0.5)(rows_of([1.0, 2.0]))
    with pytest.raises(ValueError, match="rate must be"):
        getattr(kondo.rules, name)(0)


def test_groups_are_told_for_each_batch():
    torch.manual_seed(1)
    model, data = Policy().double(), batch(zeros=False)
    ids = torch.arange(24) % 3
    with kondo.gated(model, rule=kondo.rules.cppo(0.25)) as gate:
        gate.groups(ids)
        pg(model(data[0]), data, 1.0).backward()
        factors = gate.last.factors()
        with pytest.raises(ValueError, match="compares the answers to one prompt"):
            pg(model(data[0]), data, 1.0).backward()  # they were told for one population
    assert [int(factors[ids == g].sum()) for g in range(3)] == [2, 2, 2]
    for bad in (torch.ones(3), [1, 2], torch.ones(2, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="groups: give one integer a row"):
            gate.groups(bad)


@pytest.mark.parametrize(
    "rule", [kondo.rules.cppo(0.25), kondo.rules.pods(0.25), kondo.rules.positive(), kondo.rules.random(0.3)]
)
def test_published_rules_through_the_gate(rule):
    torch.manual_seed(1)
    check(Policy().double(), pg, batch(zeros=False), rule=rule, groups=8)


# The report.


def test_the_report_says_what_was_saved_and_what_would_have_been_cheaper(capsys):
    torch.manual_seed(1)
    model = Policy().double()
    gate = kondo.gated(model, noise=0.5, warmup_steps=3)
    gate.report()
    assert "noise=0.5: 0 steps" in capsys.readouterr().out
    with gate:
        for seed in range(8):
            pg(model(batch(seed)[0]), batch(seed), 1.0).backward()
    gate.report()
    told = capsys.readouterr().out
    for part in (
        "kondo.gated, noise=0.5: 8 steps, 192 samples",
        "72 samples passed straight through",
        "50.0% of the last samples had no gradient",
        "noise of the last draw: 0.50",
        "a step of all rows took",
        "least: no gate at all",
    ):
        assert part in told, told
    assert "rate=0.1, priority='delight'" in repr(kondo.gated(model, rate=0.1).discard())
    assert "rule=cppo.<locals>.keep" in repr(kondo.gated(model, rule=kondo.rules.cppo(0.1)).discard())


# What a reader of the change has found.


def rank_of_batch(rows):
    return rows.delight.argsort().argsort().double()


def drawn_scores(rows):
    return torch.rand(len(rows), generator=rows.generator, dtype=torch.float64)


def by_norm(rows):
    return rows.norm


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("priority", [rank_of_batch, drawn_scores, by_norm])
def test_a_function_that_scores_is_asked_about_the_whole_window(priority, unbiased):
    seen = []

    def score(rows):
        seen.append(len(rows))
        return priority(rows)

    for seed in range(5):
        torch.manual_seed(seed)
        ours, theirs = copies(Policy().double())
        with kondo.gated(ours, rate=0.2, priority=score, unbiased=unbiased, window=3, groups=36, seed=seed) as gate:
            for i in range(3):
                one = batch(10 * seed + i, zeros=False)
                pg(ours(one[0]), one, 1.0).backward()
        for i, mine in enumerate(gate.last.factors().split(24)):
            one = batch(10 * seed + i, zeros=False)
            pg(theirs(one[0]), one, mine).backward()
        assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert seen == [72] * 5


def test_the_first_steps_that_pass_through_are_whole_windows():
    torch.manual_seed(1)
    model = Policy().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with kondo.gated(model, rate="auto", window=4) as gate:
        for step in range(6):
            for i in range(4):
                pg(model(batch(4 * step + i)[0]), batch(4 * step + i), 1.0).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert gate.stats.decided in (24 * 4 * n for n in range(1, 5))


def test_a_window_that_an_error_ended_leaves_nothing_to_the_next():
    torch.manual_seed(1)
    model, data = Policy().double(), batch()
    gate = kondo.gated(model, noise=0.5, window=2)
    with pytest.raises(KeyError), gate:
        (1000 * pg(model(data[0]), data, 1.0)).backward()
        raise KeyError
    again = kondo.gated(copy.deepcopy(model), noise=0.5, window=2)
    kept = []
    for each in (gate, again):
        with each:
            for _ in range(2):
                pg(each.model(data[0]), data, 1.0).backward()
        kept.append(each.last.kept.tolist())
    assert kept[0] == kept[1] and kept[0]


@pytest.mark.parametrize("options", [{"noise": 0.5}, {"rate": 0.2, "priority": "norm", "unbiased": True}], ids=told)
def test_what_is_forced_after_it_was_let_go_is_told_and_not_claimed(options):
    torch.manual_seed(1)
    ours, theirs = copies(Policy().double())
    with kondo.gated(ours, **options, window=3) as gate:
        for i in range(3):
            if i == 2:
                gate.force(torch.arange(24))
                with pytest.warns(kondo.KondoWarning, match="gate.force\\(\\) names rows of backwards before it"):
                    pg(ours(batch(i)[0]), batch(i), 1.0).backward()
            else:
                pg(ours(batch(i)[0]), batch(i), 1.0).backward()
    for i, mine in enumerate(gate.last.factors().split(24)):
        pg(theirs(batch(i)[0]), batch(i), mine).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert gate.stats.kept == gate.stats.forwarded == len(gate.last.kept)


def test_a_norm_of_integers_is_no_reason_to_round_factors():
    with kondo.gated(Policy(), noise=1.0) as gate:
        decision = gate.preselect(norm=torch.arange(24) % 5 + 1)
    assert (decision.weights % 1 != 0).any()


class WithValue(Tokens):
    def __init__(self):
        super().__init__()
        self.value = nn.Linear(8, 1)

    def forward(self, ids, values=False):
        hidden = torch.tanh(self.embed(ids))
        if values:
            return self.value(hidden).squeeze(-1)
        return self.head(hidden), self.value(hidden.mean(1)).squeeze(-1)


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
@pytest.mark.parametrize("kind", ["a value a row", "a value call", "an entropy"])
def test_lossless_tokens_lose_nothing_of_other_terms(kind):
    torch.manual_seed(1)
    ids = torch.randint(0, 7, (8, 5))
    u, target = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    u[:4] = 0

    def loss(m):
        logits, value = m(ids)
        logp = logits.log_softmax(-1)
        total = -(logp.gather(-1, ids.roll(1)[..., None]).squeeze(-1) * u).mean()
        if kind == "a value a row":
            return total + (value - target[:, 0]).square().mean()
        if kind == "a value call":
            return total + (m(ids, values=True) - target).square().mean()
        return total + 0.01 * (logp.exp() * logp).sum(-1).mean()

    ours, theirs = copies(WithValue().double())
    with kondo.gated(ours, rate="lossless", unit="token"):
        loss(ours).backward()
    loss(theirs).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_tokens_that_are_drawn_tell_of_outputs_without_positions():
    torch.manual_seed(1)
    ids, u = torch.randint(0, 7, (8, 5)), torch.randn(8, 5, dtype=torch.float64)
    model = WithValue().double()
    with kondo.gated(model, noise=0.5, unit="token"), pytest.warns(kondo.KondoWarning, match="has no positions"):
        logits, value = model(ids)
        logp = logits.log_softmax(-1).gather(-1, ids.roll(1)[..., None]).squeeze(-1)
        (value.square().mean() - (logp * u).mean()).backward()


@pytest.mark.parametrize("options", [{"noise": 0.5}, {"noise": 0.0}, {"rate": "lossless"}], ids=told)
def test_a_parameter_in_the_loss_code_is_right_on_average(options):
    torch.manual_seed(1)
    model = Policy().double()
    x, _, u = batch()
    action = torch.randn(24, 4, dtype=torch.float64)

    def loss():
        density = Normal(model(x)[0], model.log_std.exp())
        return -(density.log_prob(action).sum(-1) * u + 0.1 * density.entropy().sum(-1)).mean()

    (full,) = torch.autograd.grad(loss(), model.log_std)
    found = []
    for seed in range(400 if options.get("noise") else 1):
        model.zero_grad()
        with kondo.gated(model, **options, seed=seed):
            loss().backward()
        found.append(model.log_std.grad.clone())
    mean, error = torch.stack(found).mean(0), 0.0
    if len(found) > 1:
        error = 4.5 * torch.stack(found).std(0) / len(found) ** 0.5
    assert ((mean - full).abs() <= error + 1e-12).all()


class ValueFirst(Policy):
    def forward(self, x):
        logits, value = super().forward(x)
        return value, logits


class LeavesIt(Policy):
    def forward(self, x):
        self.left = super().forward(x)[0]


@pytest.mark.parametrize("kind", [ValueFirst, LeavesIt])
def test_a_long_pause_ends_whatever_the_loss_uses(kind):
    torch.manual_seed(1)
    model, data = kind().double(), batch()
    with kondo.gated(model, rate="auto") as gate:
        for step in range(150):
            out = model(data[0])
            logits = model.left if out is None else out[1]
            pg((logits,), data, 1.0).backward()
            if step == 20:
                decided, gate._step.shared.pace._ungated = gate.stats.decided, 60
            asleep = gate._step.shared.watcher.asleep
            assert asleep or step != 40
        assert gate.stats.decided > decided


def test_what_is_decided_before_the_forward_is_not_measured_and_does_not_pile_up():
    model, data = Policy().double(), batch()
    with kondo.gated(model, noise=0.5) as gate:
        for _ in range(20):
            gate.preselect(norm=data[2].abs())
            pg(model(data[0]), data, 1.0).backward()
        pace = gate._step.shared.pace
        assert not pace._now.steps and not pace._closed


class Complex(nn.Module):
    def __init__(self, alone):
        super().__init__()
        self.a, self.b, self.alone = nn.Linear(6, 4), nn.Linear(6, 4), alone

    def forward(self, x):
        z = torch.complex(self.a(x), self.b(x))
        return z if self.alone else (self.a(x), z)


@pytest.mark.parametrize("options", [{"rate": "lossless"}, {"noise": 0.5}, {"rate": 0.5}], ids=told)
def test_complex_outputs_have_a_norm(options):
    torch.manual_seed(1)
    x, a, u = batch(zeros=False)

    def loss(m, factors=1.0):
        out = m(x)
        z = out if m.alone else out[1]
        terms = (z.conj() * (1 + 2j)).real.sum(-1)
        if not m.alone:
            terms = terms - out[0].log_softmax(-1).gather(-1, a[:, None]).squeeze(-1) * u
        return (terms * factors).mean()

    for alone in (False, True):
        if alone and options.get("rate") == 0.5:
            continue  # no policy
        ours, theirs = copies(Complex(alone).double())
        with kondo.gated(ours, **options) as gate:
            loss(ours).backward()
        loss(theirs, gate.last.factors()).backward()
        assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_a_rule_that_needs_no_policy_takes_any_loss():
    torch.manual_seed(1)
    gate = check(Policy().double(), regression, batch(), rule=kondo.rules.random(0.5))
    assert len(gate.last.kept) == 12 and gate.last.delight.isnan().all()
    with kondo.gated(Policy().double(), rule=kondo.rules.random(0.5)) as gate:
        assert len(gate.preselect(norm=torch.ones(24)).kept) == 12


@pytest.mark.parametrize("unit", ["token", "prefix"])
def test_positions_need_a_policy_whatever_the_rule(unit):
    model, x = nn.Linear(4, 1), torch.randn(6, 5, 4)
    with (
        kondo.gated(model, noise=0.5, unit=unit),
        pytest.raises(kondo.DelightError, match=f"unit='{unit}' chooses among the positions of log-probs"),
    ):
        model(x).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())


def test_seconds_are_of_the_rows_that_ran():
    torch.manual_seed(1)
    ids, u = torch.randint(0, 7, (8, 50)), torch.randn(8, 50, dtype=torch.float64)
    model = Tokens().double()
    with kondo.gated(model, noise=0.5, unit="token") as gate:
        for _ in range(8):
            logp = model(ids).log_softmax(-1).gather(-1, ids.roll(1)[..., None]).squeeze(-1)
            start = time.perf_counter()
            (-(logp * u).mean()).backward()
            last = time.perf_counter() - start
    assert gate.stats.seconds_screen < 20 * last


def test_a_failed_replay_leaves_the_groups_for_the_next_try():
    torch.manual_seed(1)

    fails = []

    class Fails(Policy):
        def forward(self, x):
            if torch.is_grad_enabled() and fails:
                raise MemoryError
            return super().forward(x)

    model, data = Fails().double(), batch(zeros=False)
    with kondo.gated(model, rule=kondo.rules.cppo(0.5), audit=0) as gate:
        gate.groups(torch.arange(24) // 4)
        loss = pg(model(data[0]), data, 1.0)
        fails.append(True)
        with pytest.raises(RuntimeError):
            loss.backward(retain_graph=True)
        fails.clear()
        loss.backward()
    assert len(gate.last.kept) == 12


def test_what_is_said_of_a_step_that_passes_through_is_not_kept_for_another():
    torch.manual_seed(1)
    model, data = Policy().double(), batch()
    with kondo.gated(model, rule=kondo.rules.random(0.5), warmup_steps=1) as gate:
        gate.force(torch.tensor([20]))
        gate.groups(torch.arange(24))
        pg(model(data[0]), data, 1.0).backward()
        few = (data[0][:8], data[1][:8], data[2][:8])
        pg(model(few[0]), few, 1.0).backward()
    assert gate.last.samples == 8


def test_no_noise_keeps_every_row_however_small_its_gradient():
    for small in (1e-3, 1.0593e-8, 1e-12, 1e-100):
        n = torch.tensor([1.0, small], dtype=torch.float64)
        assert draw.inclusion(n, draw.bounded_noise(n, 0.0)).tolist() == [1.0, 1.0]


def test_functions_are_asked_whatever_the_default_device():
    signal = signals_of()
    with torch.device("meta"):
        decision = choose(Selector(SelectionConfig(rule=lambda rows: (rows.norm > 0).tolist())), signal)
    assert len(decision.kept) == 8
