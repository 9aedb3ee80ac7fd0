"""Selection against slow, obvious references, and the gated gradient's expectation against its closed form."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kondo_hooks as kondo
from kondo_hooks import SelectionConfig, Selector, Signal, additive
from kondo_hooks.rules.config import check_rate
from kondo_hooks.rules.draw import gate_probability, quantile_price, top_k


def slow_top_k(scores, k):
    values = scores.tolist()
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def decide(scores, forced=None, delight=None, **options):
    scores = torch.as_tensor(scores, dtype=torch.float64)
    selector = Selector(SelectionConfig(**options))
    return selector(scores if delight is None else torch.as_tensor(delight, dtype=torch.float64), scores, forced)


# A few values far apart make ties; any float makes order matter.
some_scores = st.lists(
    st.one_of(st.sampled_from([-1.0, -0.0, 0.0, 0.5]), st.floats(-1e6, 1e6)), min_size=1, max_size=40
)


# Top-k.


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=some_scores, k=st.integers(1, 50), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_top_k_is_the_head_of_a_sorted_list_and_ties_go_to_the_lower_index(values, k, dtype):
    scores = torch.tensor(values, dtype=dtype)
    assert top_k(scores, k).tolist() == slow_top_k(scores, k)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=some_scores, rate=st.floats(0.001, 1.0))
def test_a_rate_keeps_exactly_k_of_the_batch(values, rate):
    decision = decide(values, rate=rate)
    k = max(1, round(rate * len(values)))
    assert decision.kept.tolist() == slow_top_k(torch.tensor(values, dtype=torch.float64), k)
    assert decision.rate == k / len(values)
    assert decision.price == min(values[i] for i in decision.kept.tolist())
    assert decision.weights is None


@pytest.mark.parametrize(("n", "rate", "k"), [(1, 0.03, 1), (8, 0.03, 1), (100, 0.03, 3), (12, 0.25, 3), (10, 1, 10)])
def test_equal_scores_keep_exactly_k_and_the_lowest_indices(n, rate, k):
    assert decide([0.7] * n, rate=rate).kept.tolist() == list(range(k))


def test_a_large_batch_of_ties_keeps_the_lowest_indices():
    scores = torch.arange(5000) % 3
    kept = decide(scores, rate=0.5).kept.tolist()
    assert kept == slow_top_k(scores, 2500)


# Price.


def test_price_is_strict():
    assert decide([0.0, 1e-300, -1.0, 2.0, -0.0], price=0.0).kept.tolist() == [1, 3]
    assert decide([0.5, 0.5 + 1e-15, 0.4], price=0.5).kept.tolist() == [1]


def test_price_is_strict_in_single_precision():
    scores = torch.tensor([0.1, 0.2])
    assert Selector(SelectionConfig(price=0.1))(scores, scores).kept.tolist() == [1]


def test_a_price_may_keep_nothing_or_all():
    none = decide([1.0, 2.0], price=2.0, weight="dg", normalize="kept")
    assert len(none.kept) == 0 and none.rate == 0 and none.price == 2.0
    assert none.weights is None or len(none.weights) == 0
    assert decide([1.0, 2.0], price=-1.0).kept.tolist() == [0, 1]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=some_scores, rate=st.floats(0.0, 1.0))
def test_quantile_price_is_torchs_quantile(values, rate):
    scores = torch.tensor(values, dtype=torch.float64)
    expected = torch.quantile(scores, 1 - rate)
    torch.testing.assert_close(quantile_price(scores, rate), expected, rtol=1e-9, atol=1e-6)


def test_quantile_price_of_sixteen_million_samples():
    assert quantile_price(torch.arange(16_000_003, dtype=torch.float32).flip(0), 0.5) == 8_000_001


# Random and soft gates.


SCORES = torch.tensor([-0.5, 0.0, 0.1, 0.3, 0.35, 1.2], dtype=torch.float64)


@pytest.mark.parametrize("options", [{"price": 0.2}, {"rate": 0.5}], ids=["price", "rate"])
def test_bernoulli_keeps_with_the_probability_of_the_sigmoid(options):
    price = options.get("price", torch.quantile(SCORES, 0.5).item())
    selector = Selector(SelectionConfig(**options, deterministic=False, temperature=0.3))
    counts, draws = torch.zeros(len(SCORES), dtype=torch.float64), 4000
    for _ in range(draws):
        decision = selector(SCORES, SCORES)
        assert decision.price == pytest.approx(price)
        counts[decision.kept] += 1
    p = torch.tensor([1 / (1 + math.exp(-(s - price) / 0.3)) for s in SCORES.tolist()], dtype=torch.float64)
    z = (counts / draws - p) / (p * (1 - p) / draws).sqrt()
    assert z.abs().max() < 4.5


def test_bernoulli_rows_are_drawn_independently():
    selector = Selector(SelectionConfig(price=0.0, deterministic=False))
    zeros, draws = torch.zeros(2), 4000
    both = sum(len(selector(zeros, zeros).kept) == 2 for _ in range(draws))
    assert abs(both / draws - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / draws)


def test_soft_gate_keeps_all_with_sigmoid_weights():
    decision = decide(SCORES, price=0.2, hard=False, temperature=0.3)
    assert decision.kept.tolist() == list(range(6)) and decision.rate == 1
    torch.testing.assert_close(decision.weights, torch.sigmoid((SCORES - 0.2) / 0.3))


def test_soft_gate_takes_its_price_from_the_rate():
    decision = decide(SCORES, rate=0.25, hard=False, temperature=0.1)
    price = torch.quantile(SCORES, 0.75)
    torch.testing.assert_close(decision.weights, torch.sigmoid((SCORES - price) / 0.1))


def test_gate_probability_is_the_sigmoid_of_the_excess_over_temperature():
    p = gate_probability(torch.tensor([0.5, 1.0]), 0.5, 0.25)
    torch.testing.assert_close(p, torch.tensor([0.5, 1 / (1 + math.exp(-2))]))


# Weights.


def test_dg_multiplies_the_kept_by_the_sigmoid_of_their_delight_whatever_ranks_them():
    delight = torch.tensor([-2.0, 3.0, 0.5, 1.0])
    decision = decide([4.0, 3.0, 2.0, 1.0], delight=delight, rate=0.5, weight="dg")
    assert decision.kept.tolist() == [0, 1]
    torch.testing.assert_close(decision.weights, torch.sigmoid(delight[:2].double()))


def test_unbiased_divides_the_kept_by_their_probability():
    decision = decide(SCORES, price=0.2, deterministic=False, temperature=0.5, unbiased=True, seed=1)
    assert 1 < len(decision.kept) < 6
    torch.testing.assert_close(decision.weights, 1 / torch.sigmoid((SCORES[decision.kept] - 0.2) / 0.5))


def test_normalize_kept_multiplies_by_samples_over_kept():
    decision = decide(torch.arange(10.0), rate=0.3, normalize="kept")
    assert decision.weights.tolist() == pytest.approx([10 / 3] * 3)


def test_factors_multiply():
    options = {"price": 0.2, "deterministic": False, "temperature": 0.5, "seed": 1}
    decision = decide(SCORES, **options, unbiased=True, weight="dg", normalize="kept")
    kept = SCORES[decision.kept]
    assert 1 < len(kept) < 6
    expected = torch.sigmoid(kept) / torch.sigmoid((kept - 0.2) / 0.5) * 6 / len(kept)
    torch.testing.assert_close(decision.weights, expected)


# Forced rows.


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), values=some_scores, rate=st.floats(0.001, 1.0))
def test_forced_rows_are_kept_and_count_towards_the_rate(data, values, rate):
    n = len(values)
    forced = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    kept = decide(values, forced, rate=rate).kept.tolist()
    ranked = torch.tensor(values, dtype=torch.float64).masked_fill(forced, torch.inf)
    assert kept == slow_top_k(ranked, max(1, round(rate * n), int(forced.sum())))


@pytest.mark.parametrize(
    "options",
    [
        {"price": 10.0},
        {"rate": 0.2, "history": 4},
        {"price": 10.0, "deterministic": False},
        {"rate": 0.2, "deterministic": False, "temperature": 1e-3},
    ],
)
def test_forced_rows_are_kept_by_every_gate(options):
    forced = torch.tensor([False, True, False, False, False, True])
    kept = decide(-SCORES, forced, **options).kept.tolist()
    assert {1, 5} <= set(kept) and len(kept) < 6


def test_a_forced_row_has_probability_one():
    forced = torch.tensor([True] + [False] * 5)
    decision = decide(SCORES, forced, price=5.0, deterministic=False, unbiased=True)
    assert decision.kept.tolist() == [0] and decision.weights.tolist() == [1.0]


def test_a_forced_row_may_be_infinite_or_nan():
    forced = torch.tensor([True, True, False, False])
    decision = decide([math.nan, math.inf, 1.0, 2.0], forced, rate=0.75)
    assert decision.kept.tolist() == [0, 1, 3]
    assert decision.delight.isfinite().all() and math.isfinite(decision.price)


def test_the_price_is_that_of_the_rows_that_had_to_beat_it():
    forced = torch.tensor([False, False, False, True])
    assert decide([5.0, 4.0, 3.0, -100.0], forced, rate=0.75).price == 4.0


# Priorities.


def make_signal(shape=(5, 4), seed=0, mask=True):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(shape, generator=g, dtype=torch.float64) * 3
    advantages = torch.randn(shape, generator=g, dtype=torch.float64)
    valid = torch.rand(shape, generator=g) < 0.6 if mask else torch.ones(shape, dtype=torch.bool)
    if mask and len(shape) == 2:
        valid[1] = False
    return logp, advantages, valid


BY_HAND = {
    "delight": lambda u, ell: u * ell,
    "advantage": lambda u, ell: u,
    "abs_advantage": lambda u, ell: abs(u),
    "surprisal": lambda u, ell: ell,
    "additive": lambda u, ell: 0.5 * u + 0.5 * ell,
    additive(0.3): lambda u, ell: 0.3 * u + 0.7 * ell,
    additive(1.0): lambda u, ell: u,
}
REDUCED = {"sum": sum, "mean": lambda terms: sum(terms) / len(terms), "max": max}


@pytest.mark.parametrize("reduction", REDUCED)
@pytest.mark.parametrize("priority", BY_HAND, ids=str)
def test_priority_of_a_row_is_reduced_over_its_valid_positions(priority, reduction):
    logp, advantages, valid = make_signal()
    signal = Signal.of(logp, advantages, valid)
    found = signal.reduce(signal.score(priority), reduction)
    for b in range(5):
        terms = [BY_HAND[priority](advantages[b, t].item(), -logp[b, t].item()) for t in range(4) if bool(valid[b, t])]
        assert found[b].item() == pytest.approx(REDUCED[reduction](terms) if terms else 0.0)


@pytest.mark.parametrize("priority", BY_HAND, ids=str)
def test_priority_of_single_positions(priority):
    logp, advantages, valid = make_signal((9,))
    signal = Signal.of(logp, advantages, valid)
    score = signal.score(priority)
    assert signal.reduce(score, "max") is score
    for b in range(9):
        expected = BY_HAND[priority](advantages[b].item(), -logp[b].item()) if valid[b] else 0.0
        assert score[b].item() == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", REDUCED)
@pytest.mark.parametrize("priority", BY_HAND, ids=str)
def test_what_stands_in_masked_positions_does_not_matter(priority, reduction, bad):
    logp, advantages, valid = make_signal()
    clean = Signal.of(logp, advantages, valid)
    dirty = Signal.of(logp.masked_fill(~valid, -bad), advantages.masked_fill(~valid, bad), valid)
    for a, b in ((clean.delight, dirty.delight), (clean.score(priority), dirty.score(priority))):
        assert torch.equal(clean.reduce(a, reduction), dirty.reduce(b, reduction))


def test_one_advantage_and_one_mask_value_a_row_are_spread_over_its_positions():
    logp, _, _ = make_signal()
    advantages, mask = torch.arange(5.0).double(), torch.tensor([1, 0, 1, 1, 1])
    for a, m in ((advantages, mask), (advantages[:, None], mask[:, None])):
        signal = Signal.of(logp, a, m)
        torch.testing.assert_close(signal.delight, -logp * (advantages * mask)[:, None])
        assert signal.valid.sum() == 16


def test_a_signal_carries_no_graph():
    logp, advantages, _ = make_signal()
    signal = Signal.of(logp.requires_grad_(), advantages.requires_grad_())
    assert not signal.advantages.requires_grad and not signal.surprisal.requires_grad


def test_uniform_scores_are_uniform_on_the_unit_interval():
    draws = Selector(SelectionConfig(rate=0.1, priority="uniform")).uniform(20_000)
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean().item() - 0.5) < 4.5 * math.sqrt(1 / 12 / 20_000)


# Rates over many decisions.


def streams(kind, seed, n=8):
    g = torch.Generator().manual_seed(seed)
    for step in range(2000):
        values = torch.randn(n, generator=g)
        if kind == "drifting":
            values = values * (1 + step / 500) - step / 200
        elif kind == "rising":
            values = values + step / 100
        elif kind == "mostly_zero":
            values = values * (torch.rand(n, generator=g) < 0.1)
        elif kind == "mostly_zero_else_negative":
            values = -values.abs() * (torch.rand(n, generator=g) < 0.1)
        elif kind == "all_equal":
            values = torch.ones(n)
        elif kind == "few_values":
            values = (values > 1.5).float() - (values < -1).float()
        yield values


KINDS = ["continuous", "drifting", "rising", "mostly_zero", "mostly_zero_else_negative", "few_values", "all_equal"]


@pytest.mark.parametrize("history", [16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_history_keeps_the_rate_in_the_long_run_where_a_batch_is_less_than_one_row(kind, history):
    selector = Selector(SelectionConfig(rate=0.03, history=history))
    kept = sum(len(selector(values, values).kept) for values in streams(kind, seed=1))
    assert kept / 16_000 == pytest.approx(0.03, rel=0.1)


def test_without_history_a_small_batch_keeps_one_row_each():
    selector = Selector(SelectionConfig(rate=0.03))
    assert all(len(selector(values, values).kept) == 1 for values in list(streams("continuous", 1))[:50])


def test_history_keeps_the_rate_with_a_bernoulli_gate():
    selector = Selector(SelectionConfig(rate=0.03, history=32, deterministic=False))
    kept = sum(len(selector(values, values).kept) for values in streams("continuous", seed=2))
    assert kept / 16_000 == pytest.approx(0.03, rel=0.1)


def test_history_prefers_the_larger_delights_of_different_batches():
    selector = Selector(SelectionConfig(rate=0.1, history=50))
    kept, dropped = [], []
    for values in streams("continuous", seed=3):
        chosen = torch.zeros(8, dtype=torch.bool)
        chosen[selector(values, values).kept] = True
        kept.append(values[chosen])
        dropped.append(values[~chosen])
    assert torch.cat(kept).quantile(0.05) > torch.cat(dropped).quantile(0.9)


def test_history_forgets_what_is_older_than_its_length():
    selector = Selector(SelectionConfig(rate=0.5, history=3))
    for step in range(10):
        values = torch.full((4,), float(step))
        selector(values, values)
    assert [scores.tolist() for scores in selector.state_dict()["history"]] == [[s] * 4 for s in (7.0, 8.0, 9.0)]


def test_history_of_batches_of_other_sizes():
    selector = Selector(SelectionConfig(rate=0.25, history=20))
    g = torch.Generator().manual_seed(0)
    kept = rows = 0
    for step in range(600):
        values = torch.randn(1 + step % 7, generator=g)
        kept, rows = kept + len(selector(values, values).kept), rows + len(values)
    assert kept / rows == pytest.approx(0.25, rel=0.05)


def test_a_rate_may_follow_the_step():
    seen = []

    def rate(step):
        seen.append(step)
        return (1.0, 0.5, 0.1)[min(step, 2)]

    selector = Selector(SelectionConfig(rate=rate))
    scores = torch.arange(10.0)
    assert [len(selector(scores, scores).kept) for _ in range(4)] == [10, 5, 1, 1]
    assert set(seen) == {0, 1, 2, 3} and selector.step == 4


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5, math.nan, math.inf, None, "0.1", True])
def test_a_rate_from_a_function_is_checked_at_each_step(bad):
    selector = Selector(SelectionConfig(rate=lambda step: 0.5 if step == 0 else bad))
    scores = torch.arange(4.0)
    selector(scores, scores)
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\]"):
        selector(scores, scores)
    assert selector.step == 1


# The gate's own generator, and resuming.


RANDOM = [
    {"rate": 0.3, "deterministic": False},
    {"price": 0.1, "deterministic": False, "temperature": 0.5},
    {"rate": 0.1, "history": 5},
    {"rate": 0.1, "history": 5, "deterministic": False},
    {"rate": 0.25, "priority": "uniform"},
    {"rate": lambda step: 1 / (step + 1)},
]


def run(selector, steps, seed):
    g = torch.Generator().manual_seed(seed)
    decisions = []
    for _ in range(steps):
        values = torch.randn(12, generator=g)
        scores = selector.uniform(12) if selector.config.priority == "uniform" else values
        decisions.append(selector(values, scores))
    return [(d.kept.tolist(), d.price) for d in decisions]


@pytest.mark.parametrize("options", RANDOM)
def test_the_global_random_stream_is_not_moved_and_does_not_matter(options):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(Selector(SelectionConfig(**options)), 5, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert run(Selector(SelectionConfig(**options)), 5, seed=0) == first


@pytest.mark.parametrize("options", [RANDOM[0], RANDOM[4]])
def test_another_seed_decides_otherwise(options):
    decisions = [run(Selector(SelectionConfig(**options, seed=seed)), 5, seed=0) for seed in (0, 1)]
    assert decisions[0] != decisions[1]


@pytest.mark.parametrize("options", RANDOM)
def test_resuming_from_a_state_dict_takes_the_same_decisions(options, tmp_path):
    selector = Selector(SelectionConfig(**options))
    run(selector, 7, seed=0)
    torch.save(selector.state_dict(), tmp_path / "state.pt")
    kept_in_memory = selector.state_dict()
    expected = run(selector, 7, seed=1)
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), kept_in_memory):
        resumed = Selector(SelectionConfig(**options, seed=99))
        run(resumed, 3, seed=5)
        resumed.load_state_dict(state)
        assert run(resumed, 7, seed=1) == expected


@pytest.mark.parametrize("options", RANDOM[:5])
def test_without_the_state_the_decisions_differ(options):
    selector = Selector(SelectionConfig(**options))
    run(selector, 7, seed=0)
    expected = run(selector, 7, seed=1)
    assert run(Selector(SelectionConfig(**options)), 7, seed=1) != expected


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of rate, price, noise and rule"),
        ({"rate": 0.1, "price": 0.0}, "exactly one of rate and price"),
        ({"rate": "auto", "noise": 0.5}, "exactly one of rate and noise"),
        ({"price": 0.1, "rule": len}, "exactly one of price and rule"),
        *(({"noise": bad}, "noise must be a number >= 0") for bad in (-0.1, math.nan, math.inf, True, "1")),
        ({"rule": 3}, "rule must be a function of the rows, got 3"),
        ({"rate": "lossles"}, "rate must be in .* or 'lossless', or 'auto', got 'lossles'"),
        *(({"rate": 0.1, "groups": bad}, "groups must be a number of rows") for bad in (0, -1, 1.5, True)),
        ({"rate": 0.1, "groups": 2, "unit": "token"}, "groups are of rows"),
        ({"price": 0.1, "priority": "norm"}, "price is in advantage x nats"),
        ({"noise": 0.5, "hard": False}, "noise= says which samples are kept"),
        ({"rate": "lossless", "deterministic": False}, "rate='lossless' says which samples are kept"),
        ({"rate": "auto", "history": 3}, "give rate as a fraction"),
        ({"rate": 0.1, "unbiased": True, "history": 3}, "unbiased=True takes no price from the past"),
        ({"noise": 0.5, "normalize": "kept"}, "noise= weighs the kept samples"),
        ({"noise": 0.5, "priority": "advantage"}, "noise= goes by the gradients themselves"),
        ({"rule": len, "unbiased": True}, "the factors of a rule are its own"),
        *(({"rate": bad}, r"rate must be in \(0, 1\]") for bad in (0, 0.0, -0.1, 1.0001, math.nan, math.inf, True)),
        ({"rate": "0.1"}, r"rate must be in \(0, 1\]"),
        *(({"price": bad}, "price must be finite") for bad in (math.nan, math.inf, -math.inf)),
        ({"rate": 0.1, "priority": "joy"}, "priority must be one of delight.*'joy'"),
        ({"rate": 0.1, "priority": None}, "priority must be one of"),
        *(({"rate": 0.1, "temperature": bad}, "temperature must be > 0") for bad in (0.0, -1.0, math.nan)),
        ({"rate": 0.1, "unit": "row"}, "unit must be one of sample, token, prefix, got 'row'"),
        ({"rate": 0.1, "reduction": "min"}, "reduction must be one of sum, mean, max, got 'min'"),
        ({"rate": 0.1, "weight": "ppo"}, "weight must be one of pg, dg, got 'ppo'"),
        ({"rate": 0.1, "normalize": True}, "normalize must be one of batch, kept, got True"),
        *(({"rate": 0.1, "history": bad}, "history must be a number of decisions") for bad in (-1, 1.5, True, None)),
        ({"price": 0.0, "history": 3}, "history sets the price from a rate"),
        ({"price": 0.1, "unbiased": True}, "unbiased=True .* needs deterministic=False"),
        ({"rate": 0.1, "unbiased": True, "hard": False, "deterministic": False}, "unbiased=True"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**options)


def test_a_config_is_checked_again_when_it_is_replaced():
    config = SelectionConfig(rate=0.1)
    with pytest.raises(ValueError, match="rate"):
        dataclasses.replace(config, rate=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rate = 2.0


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_additive_needs_a_fraction(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        additive(alpha)


def test_check_rate_returns_a_float():
    assert check_rate(1) == 1.0 and isinstance(check_rate(1), float)
    assert check_rate(1e-9) == 1e-9


@pytest.mark.parametrize(
    ("logp", "advantages", "mask", "message"),
    [
        ([0.1], torch.ones(1), None, "logp must be a tensor of shape .* got list"),
        (torch.tensor(-1.0), torch.tensor(1.0), None, r"logp must be .* got \(\)"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), None, r"logp must be .* got \(2, 3, 4\)"),
        (torch.ones(3), torch.ones(4), None, r"advantages has shape \(4,\), logp has \(3,\)"),
        (torch.ones(3), torch.ones(3, 1), None, r"advantages has shape \(3, 1\)"),
        (torch.ones(3, 4), torch.ones(4), None, r"advantages has shape \(4,\).*one value a row, \(3,\)"),
        (torch.ones(3, 4), torch.ones(4, 3), None, "advantages has shape"),
        (torch.ones(3, 4), torch.ones(3), torch.ones(4), r"mask has shape \(4,\), logp has \(3, 4\)"),
        (torch.ones(3), torch.ones(3), torch.ones(1), r"mask has shape \(1,\)"),
    ],
)
def test_a_signal_of_shapes_that_do_not_fit_is_refused(logp, advantages, mask, message):
    with pytest.raises(ValueError, match=message):
        Signal.of(logp, advantages, mask)


def test_an_empty_batch_is_refused():
    selector = Selector(SelectionConfig(rate=0.5))
    with pytest.raises(ValueError, match="empty batch"):
        selector(torch.empty(0), torch.empty(0))
    assert selector.step == 0


def test_large_samples_are_finite():
    scores = torch.tensor([1.0, 3e38, -3e38])
    assert Selector(SelectionConfig(rate=0.3))(scores, scores).kept.tolist() == [1]


@pytest.mark.parametrize("options", [{"rate": 0.5}, {"price": 0.0}, {"rate": 0.5, "deterministic": False}])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["scores", "delight"])
def test_a_sample_that_is_not_finite_is_refused_and_leaves_no_trace(options, bad, where):
    selector = Selector(SelectionConfig(**options))
    good, wrong = torch.arange(4.0), torch.tensor([0.0, bad, 1.0, bad])
    before = selector.state_dict()
    with pytest.raises(ValueError, match=r"NaN or infinite in 2 of 4 samples \(first: 1\)"):
        selector(*((good, wrong) if where == "scores" else (wrong, good)))
    after = selector.state_dict()
    assert before.pop("generator").equal(after.pop("generator")) and before == after


# The gradient's expectation, through a small softmax policy.

DRAWS = 500


class Bandit:
    """16 rows of a linear softmax policy over 3 actions, and its gradients in closed form."""

    def __init__(self):
        g = torch.Generator().manual_seed(7)
        self.model = nn.Linear(4, 3).double()
        for p in self.model.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
        self.x = torch.randn(16, 4, generator=g, dtype=torch.float64)
        self.actions = torch.randint(0, 3, (16,), generator=g)
        self.advantages = torch.randn(16, generator=g, dtype=torch.float64)
        self.delight = (-self.logp() * self.advantages).detach()

    def logp(self):
        return self.model(self.x).log_softmax(-1).gather(1, self.actions[:, None]).squeeze(1)

    def gradient(self, weights):
        """Of the loss whose rows are multiplied by ``weights``."""
        loss = -(self.logp() * self.advantages * weights).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.model.parameters()))])

    def gated_gradient(self, **options):
        self.model.zero_grad()
        with kondo.gated(self.model, **options) as gate:
            (-(self.logp() * self.advantages).mean()).backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters()]), gate

    def z_scores(self, expected, **options):
        """Of the mean gated gradient over many seeds, by coordinate."""
        draws = torch.stack([self.gated_gradient(**options, seed=seed)[0] for seed in range(DRAWS)])
        return (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(DRAWS))


BERNOULLI = {"price": 0.3, "deterministic": False, "temperature": 0.8}


@pytest.fixture(scope="module")
def bandit():
    return Bandit()


def test_soft_gradient_is_that_of_the_sigmoid_weights(bandit):
    found, _ = bandit.gated_gradient(price=0.3, temperature=0.8, hard=False)
    torch.testing.assert_close(found, bandit.gradient(torch.sigmoid((bandit.delight - 0.3) / 0.8)))


def test_mean_bernoulli_gradient_is_the_soft_gradient_and_not_the_plain_one(bandit):
    soft, _ = bandit.gated_gradient(price=0.3, temperature=0.8, hard=False)
    assert bandit.z_scores(soft, **BERNOULLI).abs().max() < 4.5
    assert bandit.z_scores(bandit.gradient(torch.ones(16)), **BERNOULLI).abs().max() > 9


def test_mean_unbiased_gradient_is_the_plain_policy_gradient_and_not_the_soft_one(bandit):
    plain = bandit.gradient(torch.ones(16))
    assert bandit.z_scores(plain, **BERNOULLI, unbiased=True).abs().max() < 4.5
    soft, _ = bandit.gated_gradient(price=0.3, temperature=0.8, hard=False)
    assert bandit.z_scores(soft, **BERNOULLI, unbiased=True).abs().max() > 9


def test_mean_unbiased_dg_gradient_is_the_delightful_policy_gradient(bandit):
    dg = bandit.gradient(torch.sigmoid(bandit.delight))
    options = {**BERNOULLI, "weight": "dg"}
    assert bandit.z_scores(dg, **options, unbiased=True).abs().max() < 4.5
    assert bandit.z_scores(dg, **options).abs().max() > 9


def test_mean_unbiased_gradient_with_a_rate_is_the_plain_policy_gradient(bandit):
    options = {"rate": 0.3, "deterministic": False, "temperature": 0.8, "unbiased": True}
    assert bandit.z_scores(bandit.gradient(torch.ones(16)), **options).abs().max() < 4.5


def test_top_k_gradient_is_that_of_the_kept_rows(bandit):
    found, gate = bandit.gated_gradient(rate=0.25)
    weights = torch.zeros(16, dtype=torch.float64)
    weights[slow_top_k(bandit.delight, 4)] = 1
    assert len(gate.last.kept) == 4
    torch.testing.assert_close(found, bandit.gradient(weights))
