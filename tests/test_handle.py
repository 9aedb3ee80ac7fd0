"""The handle of ``gated``: counters, screen-first, tokens, forced rows, resuming, and what it refuses."""

import math
import re
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.testing._internal.distributed.fake_pg import FakeStore

import kondo_hooks as kondo
from tests.cases import (
    FEATURES,
    LOSSES,
    MODELS,
    CnnBatchNorm,
    K,
    Mlp,
    PolicyAndValue,
    Recurrent,
    ScalarOutput,
    make_batch,
)
from tests.reference import copies, grads, kept_mask, largest_relative_difference

CASES = {case.name: case for case in MODELS}
LOSS = {case.name: case for case in LOSSES}


def pick(logits, actions):
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def reinforce(logits, batch, w=None):
    terms = -batch.advantages * pick(logits, batch.actions)
    return (terms if w is None else terms * w).mean()


def step(model, batch):
    reinforce(model(batch.x), batch).backward()


@pytest.fixture
def setup():
    model, reference = copies(Mlp().double())
    return model, reference, make_batch(12, False, torch.float64)


def assert_same_gradient(model, reference, tolerance=1e-10):
    assert largest_relative_difference(grads(model), grads(reference)) < tolerance


def rows_with_a_graph(layer):
    seen = []
    layer.register_forward_hook(
        lambda module, args, out: seen.append(len(args[0])) if torch.is_grad_enabled() else None
    )
    return seen


def sampled_logp(model, batch):
    with torch.no_grad():
        return pick(model(batch.x), batch.actions)


# Counters.


def test_a_fresh_gate_has_counted_nothing(setup):
    gate = kondo.gated(setup[0], rate=0.25)
    stats = gate.stats
    assert (stats.steps, stats.rows, stats.kept, stats.forwarded, stats.rows_screened) == (0, 0, 0, 0, 0)
    assert all(
        math.isnan(v) for v in (stats.rate, stats.skipped, stats.price, stats.delight_kept, stats.delight_dropped)
    )
    assert gate.last is None


def test_counters_over_several_steps_are_those_counted_by_hand(setup):
    model, _, _ = setup
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept, dropped, sizes = [], [], [12, 7, 20]
    with kondo.gated(model, rate=0.3) as gate:
        for seed, n in enumerate(sizes):
            batch = make_batch(n, False, torch.float64, seed)
            delight = -sampled_logp(model, batch) * batch.advantages
            step(model, batch)
            optimizer.step()
            optimizer.zero_grad()
            k = max(1, round(0.3 * n))
            order = delight.argsort(descending=True)
            kept.append(delight[order[:k]])
            dropped.append(delight[order[k:]])
            assert gate.last.kept.tolist() == order[:k].sort().values.tolist()
            torch.testing.assert_close(gate.last.delight, delight)
            assert gate.last.rate == k / n and gate.last.scale == pytest.approx(1 / n)
            assert gate.stats.steps == seed + 1
    stats, total = gate.stats, sum(len(d) for d in kept)
    assert total == 4 + 2 + 6
    assert (stats.steps, stats.rows, stats.kept) == (3, 39, 12)
    assert (stats.forwarded, stats.rows_screened) == (12, 39)
    assert stats.rate == pytest.approx(12 / 39) and stats.skipped == pytest.approx(27 / 39)
    assert stats.price == pytest.approx(kept[-1].min().item()) == gate.last.price
    assert stats.delight_kept == pytest.approx(torch.cat(kept).mean().item())
    assert stats.delight_dropped == pytest.approx(torch.cat(dropped).mean().item())


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
def test_a_batch_that_is_replayed_whole_counts_every_row_as_forwarded():
    model = CnnBatchNorm().double()
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25) as gate:
        reinforce(model(batch.image), batch).backward()
    assert (gate.stats.kept, gate.stats.forwarded, gate.stats.rows_screened, gate.stats.skipped) == (3, 12, 12, 0.0)


def test_steps_that_pass_through_count_as_kept_but_not_as_decided(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25, warmup_steps=2) as gate:
        for _ in range(2):
            step(model, batch)
        assert gate.last is None and math.isnan(gate.stats.delight_kept)
        assert (gate.stats.steps, gate.stats.rate, gate.stats.skipped) == (2, 1.0, 0.0)
        step(model, batch)
    assert (gate.stats.steps, gate.stats.rows, gate.stats.kept) == (3, 36, 27)
    assert gate.stats.delight_kept == pytest.approx(gate.last.delight[gate.last.kept].mean().item())


def test_the_gate_and_its_counters_read_well(setup):
    model, _, batch = setup
    gate = kondo.gated(model, rate=0.25)
    assert repr(gate).startswith("Gated(Mlp, rate=0.25, priority='delight', closed, Stats(steps=0, rows=0, kept=0 (")
    with gate:
        assert "open" in repr(gate)
        step(model, batch)
    assert "closed" in repr(gate)
    stats = gate.stats
    assert repr(stats) == (
        "Stats(steps=1, rows=12, kept=3 (25.0%), forwarded=3, skipped=75.0%, "
        f"price={stats.price:.4g}, delight_kept={stats.delight_kept:.4g}, delight_dropped={stats.delight_dropped:.4g})"
    )
    assert repr(stats) in repr(gate)
    assert "Gated(Mlp, price=0.5, priority='surprisal', off," in repr(
        kondo.gated(model, price=0.5, priority="surprisal", enabled=False)
    )


# Screen first.


SCREENED = [
    ("mlp", "reinforce_gather"),
    ("mlp", "ppo_entropy_value"),
    ("policy_and_value", "ppo_entropy_value"),
    ("gru_hidden_state", "grpo_masks_kl"),
    ("lstm", "grpo_masks_kl"),
    ("llama", "grpo_masks_kl"),
    ("llama", "cross_entropy"),
    ("bert_classifier", "categorical"),
    ("probabilities", "one_hot"),
    ("named_tuple_log_probs", "selective_log_softmax"),
    ("flattened", "reinforce_indexing_sum"),
    ("embedding_bag", "nll_loss"),
]


@pytest.mark.parametrize(("name", "loss"), SCREENED)
def test_gradient_after_a_screen_is_that_of_the_masked_full_backward(name, loss):
    case, loss_case = CASES[name], LOSS[loss]
    torch.manual_seed(1)
    model, reference = copies(case.build().double().eval())
    batch = make_batch(12, case.sequence, torch.float64)
    seen = rows_with_a_graph(next(m for m in model.modules() if not list(m.children())))
    shapes = []

    def run(m, w):
        out = case.call(m, batch)
        logits, value = case.logits(out, batch), case.value(out) if case.value else None
        shapes.append((logits.shape, None if value is None else value.shape))
        loss_case.loss(logits, value, batch, w).backward()

    with torch.no_grad():
        logp = pick(case.logits(case.call(reference, batch), batch), batch.actions)
    with kondo.gated(model, rate=0.25) as gate:
        decision = gate.preselect(logp=logp, advantages=batch.advantages, mask=batch.mask)
        run(model, None)
    run(reference, kept_mask(decision.kept, 12, torch.float64))
    assert len(decision.kept) == 3 and gate.last is decision
    assert seen[0] == 3 * (batch.actions.shape[1] if name == "flattened" else 1)
    assert shapes[0] == shapes[1]
    assert gate.stats.forwarded == 3 and gate.stats.rows_screened == 12 and gate.stats.steps == 1
    assert_same_gradient(model, reference)
    delight = (logp * -batch.advantages * batch.mask).sum(1) if case.sequence else logp * -batch.advantages
    torch.testing.assert_close(decision.delight, delight)


def test_only_the_kept_rows_run_after_a_screen(setup):
    model, _, batch = setup
    seen = rows_with_a_graph(model.body[0])
    with kondo.gated(model, rate=0.25, audit=0) as gate:
        logp = sampled_logp(model, batch)
        for _ in range(2):
            gate.preselect(logp=logp, advantages=batch.advantages)
            step(model, batch)
        step(model, batch)
    assert seen == [3, 3, 3]  # the last is the replay of a call that was not screened first
    assert gate.stats.steps == 3


def test_a_call_without_grad_does_not_use_up_the_screen(setup):
    model, _, batch = setup
    seen = rows_with_a_graph(model.body[0])
    with kondo.gated(model, rate=0.25) as gate:
        gate.preselect(delight=torch.arange(12.0))
        with torch.no_grad():
            assert model(batch.x).shape == (12, K)
        model(batch.x)
    assert seen == [3]


@pytest.mark.parametrize("name", ["gru_hidden_state", "flattened", "policy_and_value"])
@pytest.mark.parametrize("k", range(1, 12))
def test_outputs_are_full_size_and_the_gradient_is_right_however_many_rows_a_screen_keeps(name, k):
    case = CASES[name]
    torch.manual_seed(1)
    model, reference = copies(case.build().double())
    batch = make_batch(12, case.sequence, torch.float64)
    with kondo.gated(model, rate=k / 12) as gate:
        decision = gate.preselect(delight=torch.arange(12.0).flip(0))
        out = case.call(model, batch)
        reinforce(case.logits(out, batch), batch).backward()
    assert len(decision.kept) == k
    full = case.call(reference, batch)
    w = kept_mask(decision.kept, 12, torch.float64)
    reinforce(case.logits(full, batch), batch, w.unsqueeze(1) if case.sequence else w).backward()
    ours, theirs = ([t.shape for t in tensors(o)] for o in (out, full))
    assert ours == theirs
    assert_same_gradient(model, reference)


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    for item in value if isinstance(value, (tuple, list)) else vars(value).values() if hasattr(value, "pi") else ():
        yield from tensors(item)


class Masked(nn.Module):
    """Takes a (T, T) mask that all rows share."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, K)

    def forward(self, x, mask):
        return self.layer((mask @ x).mean(1))


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_a_screen_does_not_cut_a_shared_input_whose_size_is_the_batch_size(rate):
    model, reference = copies(Masked().double())
    batch = make_batch(5, True, torch.float64)  # B == T == 5
    batch.actions, batch.advantages = batch.actions[:, 0], batch.advantages[:, 0]
    mask = torch.randn(5, 5).double()
    with kondo.gated(model, rate=rate) as gate:
        decision = gate.preselect(delight=torch.arange(5.0))
        reinforce(model(batch.x, mask), batch).backward()
    reinforce(reference(batch.x, mask), batch, kept_mask(decision.kept, 5, torch.float64)).backward()
    assert_same_gradient(model, reference)


def test_an_input_gets_the_gradient_of_the_kept_rows_after_a_screen(setup):
    model, reference, batch = setup
    x, y = (batch.x.clone().requires_grad_() for _ in range(2))
    with kondo.gated(model, rate=0.25) as gate:
        decision = gate.preselect(delight=torch.arange(12.0))
        reinforce(model(x), batch).backward()
    reinforce(reference(y), batch, kept_mask(decision.kept, 12, torch.float64)).backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert x.grad[9:].any(1).all() and not x.grad[:9].any()


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_a_screen_with_time_first(k):
    model, reference = copies(nn.LSTM(FEATURES, K).double())
    batch = make_batch(8, True, torch.float64)
    x = batch.x.transpose(0, 1).contiguous()

    def loss(m, w):
        output, _ = m(x)
        return (-batch.advantages.T * pick(output, batch.actions.T) * w).mean()

    with kondo.gated(model, rate=k / 8, batch_dim=1) as gate:
        gate.preselect(delight=torch.randn(8))
        loss(model, 1).backward()
    assert len(gate.last.kept) == k == gate.stats.forwarded
    loss(reference, kept_mask(gate.last.kept, 8, torch.float64)).backward()
    assert_same_gradient(model, reference)


def test_a_screen_of_a_method():
    class Agent(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = PolicyAndValue()

        def evaluate(self, x, actions):
            logits, value, *_ = self.net(x)
            return pick(logits, actions), value

    model, reference = copies(Agent().double())
    batch = make_batch(12, False, torch.float64)
    seen = rows_with_a_graph(model.net.policy)

    def loss(m, w):
        logp, value = m.evaluate(batch.x, actions=batch.actions)
        return ((-batch.advantages * logp + (value - batch.returns) ** 2) * w).mean()

    with kondo.gated(model, rate=0.25, method="evaluate") as gate:
        with torch.no_grad():
            logp, _ = model.evaluate(batch.x, batch.actions)
        # A vector of as many entries as rows may be shared by all of them: the first call finds out.
        for _ in range(2):
            seen.clear()
            model.zero_grad()
            gate.preselect(logp=logp, advantages=batch.advantages)
            loss(model, 1).backward()
    assert seen == [3]
    loss(reference, kept_mask(gate.last.kept, 12, torch.float64)).backward()
    assert_same_gradient(model, reference)


def test_screened_and_other_calls_add_up_in_one_backward(setup):
    model, reference, _ = setup
    batches = [make_batch(12, False, torch.float64, seed) for seed in range(3)]
    with kondo.gated(model, rate=0.25) as gate:
        losses, kept = [], []
        for batch in batches[:2]:
            decision = gate.preselect(logp=sampled_logp(model, batch), advantages=batch.advantages)
            kept.append(decision.kept)
            losses.append(reinforce(model(batch.x), batch))
        losses.append(reinforce(model(batches[2].x), batches[2]))
        sum(losses).backward()
        kept.append(gate.last.kept)
    assert gate.stats.steps == 3 and gate.stats.forwarded == 9
    for batch, rows in zip(batches, kept, strict=True):
        reinforce(reference(batch.x), batch, kept_mask(rows, 12, torch.float64)).backward()
    assert_same_gradient(model, reference)


def test_screening_by_delight_alone(setup):
    model, reference, batch = setup
    delight = torch.randn(12, dtype=torch.float64)
    with kondo.gated(model, rate=0.25) as gate:
        decision = gate.preselect(delight=delight)
        step(model, batch)
    assert set(decision.kept.tolist()) == set(delight.topk(3).indices.tolist())
    assert torch.equal(decision.delight, delight)
    reinforce(reference(batch.x), batch, kept_mask(decision.kept, 12, torch.float64)).backward()
    assert_same_gradient(model, reference)


def test_screening_with_a_price_by_delight_of_a_tensor_that_has_a_graph(setup):
    model, _, batch = setup
    delight = torch.linspace(-1, 1, 12, dtype=torch.float64, requires_grad=True)
    with kondo.gated(model, price=0.5) as gate:
        decision = gate.preselect(delight=delight)
        step(model, batch)
    assert decision.kept.tolist() == [9, 10, 11] and not decision.delight.requires_grad
    assert delight.grad is None


def test_a_screen_that_keeps_nothing_gives_full_size_outputs_and_a_gradient_of_zero(setup):
    model, _, batch = setup
    with kondo.gated(model, price=10.0) as gate:
        decision = gate.preselect(delight=torch.zeros(12))
        out = model(batch.x)
        reinforce(out, batch).backward()
    assert out.shape == (12, K) and len(decision.kept) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("layout", ["time_first", "flat", "classes"])
@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("factors", [[0, 1, 0, 0], [0.5, 1, 0, 2], [0.5, 1, 0.2, 2]], ids=str)
def test_after_screen_an_output_keeps_its_rows_on_any_axis(layout, length, factors):
    """Also where all rows are run and only weighted, and where another axis is as long as the batch."""
    torch.manual_seed(0)
    model, x = LaidOut(layout).double(), torch.randn(4, length, 3).double()
    factors = torch.tensor(factors, dtype=torch.float64)
    with kondo.gated(model, rate=0.5) as gate:
        gate.preselect(kept=factors)
        model.rows_first(model(x), 4).sin().sum().backward()
    ours = grads(model)
    model.zero_grad()
    (model.rows_first(model(x), 4).sin() * factors.view(4, 1, 1)).sum().backward()
    assert largest_relative_difference(ours, grads(model)) < 1e-12


@pytest.mark.parametrize("kind", ["categorical", "normal", "independent"])
def test_after_screen_a_distribution_that_the_model_returns_has_the_batch_shape_of_all_rows(kind):
    class Policy(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            if kind == "categorical":
                return Categorical(logits=out)
            normal = Normal(out, out.exp())
            return Independent(normal, 1) if kind == "independent" else normal

    torch.manual_seed(0)
    model, x, factors = Policy(3, K).double(), torch.randn(5, 3).double(), torch.tensor([0, 1, 0, 0.5, 0]).double()
    actions = model(x).sample()

    def log_probs(policy):
        return policy.log_prob(actions).reshape(5, -1).sum(1)

    with kondo.gated(model, rate=0.5) as gate:
        gate.preselect(kept=factors)
        policy = model(x)
        assert policy.batch_shape[0] == 5 and len(policy.sample()) == 5
        log_probs(policy).sum().backward()
    ours = grads(model)
    model.zero_grad()
    (log_probs(model(x)) * factors).sum().backward()
    assert largest_relative_difference(ours, grads(model)) < 1e-12


def test_after_screen_rows_that_are_flattened_in_another_order_are_refused():
    model, x = LaidOut("time_flat").double(), torch.randn(4, 3, 3).double()
    with kondo.gated(model, rate=0.5) as gate:
        gate.preselect(kept=torch.tensor([1.0, 0, 0.5, 0]))
        with pytest.raises(RuntimeError, match=r"of the model \(6, 7\) could not be told.*another order"):
            model(x)


class LaidOut(nn.Linear):
    """Logits of a sequence in one layout or another."""

    def __init__(self, layout):
        super().__init__(3, K)
        self.layout = layout

    def forward(self, x):
        logits = super().forward(x)
        if self.layout == "classes":
            return logits.transpose(1, 2)
        logits = logits.transpose(0, 1) if self.layout.startswith("time") else logits
        return logits.flatten(0, 1) if self.layout.endswith("flat") else logits

    def rows_first(self, out, batch):
        if self.layout == "time_first":
            return out.transpose(0, 1)
        return out.unflatten(0, (batch, -1)) if self.layout == "flat" else out


@pytest.mark.parametrize("factors", [([0, 0, 0], [1, 0, 0.3]), ([1, 0.7, 0], [0, 0, 0])], ids=str)
def test_a_call_that_keeps_nothing_leaves_the_gradient_of_the_others_in_its_backward(factors):
    """It is silenced on its own way, not at the parameters; nor is what its input was made of."""
    torch.manual_seed(0)
    encoder, model, x = nn.Linear(4, 3).double(), nn.Linear(3, K).double(), torch.randn(2, 3, 4).double()
    factors = torch.tensor(factors, dtype=torch.float64)

    def loss(weights):
        hidden = encoder(x)
        return sum((model(h).sin() * w.unsqueeze(1)).sum() for h, w in zip(hidden, weights, strict=True)) + hidden.sum()

    def gated_loss(gate):
        hidden, terms = encoder(x), []
        for h, w in zip(hidden, factors, strict=True):
            gate.preselect(kept=w)
            terms.append(model(h).sin().sum())
        return sum(terms) + hidden.sum()

    with kondo.gated(model, rate=0.5) as gate:
        gated_loss(gate).backward()
    both = nn.ModuleList([encoder, model])
    ours = grads(both)
    both.zero_grad()
    loss(factors).backward()
    assert largest_relative_difference(ours, grads(both)) < 1e-12


@pytest.mark.parametrize("first", [True, False], ids=["screen", "hook"])
@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"rate": 0.25, "weight": "dg"}, lambda d, kept: torch.sigmoid(d) * kept),
        ({"rate": 0.25, "normalize": "kept"}, lambda d, kept: kept * 12 / 3),
        ({"rate": 0.25, "weight": "dg", "normalize": "kept"}, lambda d, kept: torch.sigmoid(d) * kept * 12 / 3),
        ({"price": 0.1, "hard": False, "temperature": 0.7}, lambda d, kept: torch.sigmoid((d - 0.1) / 0.7)),
        (
            {"price": 0.1, "deterministic": False, "temperature": 0.7, "unbiased": True, "seed": 2},
            lambda d, kept: kept / torch.sigmoid((d - 0.1) / 0.7),
        ),
    ],
    ids=["dg", "kept", "dg_kept", "soft", "unbiased"],
)
def test_weights_multiply_the_kept_rows_terms(setup, options, factor, first):
    model, reference, batch = setup
    with kondo.gated(model, **options) as gate:
        if first:
            gate.preselect(logp=sampled_logp(model, batch), advantages=batch.advantages)
        step(model, batch)
    delight = -sampled_logp(reference, batch) * batch.advantages
    kept = kept_mask(gate.last.kept, 12, torch.float64)
    assert kept.any()
    reinforce(reference(batch.x), batch, factor(delight, kept)).backward()
    assert_same_gradient(model, reference)


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.25},
        {"price": 0.1},
        {"rate": 0.3, "priority": "surprisal"},
        {"rate": 0.3, "priority": kondo.additive(0.2)},
        {"rate": 0.3, "priority": "uniform", "seed": 4},
        {"rate": 0.3, "deterministic": False, "seed": 4},
        {"rate": 0.2, "history": 3},
    ],
    ids=str,
)
def test_a_screen_decides_as_the_hook_does(setup, options):
    model, other, _ = setup
    decisions = []
    for m, first in ((model, True), (other, False)):
        with kondo.gated(m, **options) as gate:
            for seed in range(4):
                batch = make_batch(12, False, torch.float64, seed)
                if first:
                    gate.preselect(logp=sampled_logp(m, batch), advantages=batch.advantages)
                step(m, batch)
                decisions.append((first, gate.last))
    for (_, a), (_, b) in zip(decisions[:4], decisions[4:], strict=True):
        assert a.kept.tolist() == b.kept.tolist()
        torch.testing.assert_close(a.delight, b.delight)
        assert a.price == pytest.approx(b.price)
    assert_same_gradient(model, other)


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_a_screen_reduces_tokens_to_rows_over_the_mask(reduction):
    model = Recurrent(nn.GRU).double()
    batch = make_batch(8, True, torch.float64)
    with torch.no_grad():
        logp = pick(model(batch.x)[0], batch.actions)
    with kondo.gated(model, rate=0.25, reduction=reduction) as gate:
        decision = gate.preselect(logp=logp, advantages=batch.advantages, mask=batch.mask)
        model(batch.x)
    for b in range(8):
        terms = [(-logp[b, t] * batch.advantages[b, t]).item() for t in range(logp.shape[1]) if batch.mask[b, t].item()]
        by_hand = {"sum": sum(terms), "mean": sum(terms) / len(terms), "max": max(terms)}[reduction]
        assert decision.delight[b].item() == pytest.approx(by_hand)


def test_integer_outputs_and_none_come_back_in_full_size_after_a_screen():
    model = PolicyAndValue().double()
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25) as gate:
        decision = gate.preselect(delight=torch.arange(12.0).flip(0))
        logits, value, best, nothing = model(batch.x)
    full = model(batch.x)
    assert decision.kept.tolist() == [0, 1, 2]
    assert best.shape == (12,) and best.dtype == torch.int64 and not best.requires_grad and nothing is None
    assert torch.equal(best[:3], full[2][:3])
    torch.testing.assert_close(logits[:3], full[0][:3])
    torch.testing.assert_close(value[:3], full[1][:3])
    assert all(bool(((row == logits[:3]).all(1)).any()) for row in logits)


def test_a_scalar_output_that_the_loss_uses_is_refused_after_a_screen():
    model = ScalarOutput().double()
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25) as gate:
        gate.preselect(delight=torch.arange(12.0))
        logits, aux = model(batch.x)
        assert aux.dim() == 0
        with pytest.raises(RuntimeError, match=r"output \[1\], which has no batch axis of size 12"):
            (reinforce(logits, batch) + aux).backward()


def test_batch_norm_in_training_is_refused_after_a_screen_and_works_in_eval():
    model, reference = copies(CnnBatchNorm().double())
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25) as gate:
        gate.preselect(delight=torch.arange(12.0))
        with pytest.raises(RuntimeError, match="BatchNorm2d in training mode"):
            model(batch.image)
        for m in (model, reference):
            m.eval()
        decision = gate.preselect(delight=torch.arange(12.0))
        reinforce(model(batch.image), batch).backward()
    reinforce(reference(batch.image), batch, kept_mask(decision.kept, 12, torch.float64)).backward()
    assert_same_gradient(model, reference)


@pytest.mark.parametrize("rows", [10, 24, FEATURES])
def test_a_screen_of_another_number_of_rows_is_refused(setup, rows):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        gate.preselect(delight=torch.arange(float(rows)))
        with pytest.raises(ValueError, match=rf"preselect\(\) was given {rows} rows"):
            model(batch.x)
        step(model, batch)
        assert len(gate.last.delight) == 12


def test_a_second_screen_before_the_call_is_refused(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        first = gate.preselect(delight=torch.arange(12.0))
        with pytest.raises(RuntimeError, match="preselect: called twice"):
            gate.preselect(delight=torch.arange(12.0))
        assert gate.stats.steps == 1 and gate.last is first
        step(model, batch)
        gate.preselect(delight=torch.arange(12.0))


ONES = torch.ones(12)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"logp": ONES},
        {"advantages": ONES},
        {"mask": ONES},
        {"logp": ONES, "advantages": ONES, "delight": ONES},
        {"logp": ONES, "delight": ONES},
        {"advantages": ONES, "delight": ONES},
        {"mask": ONES, "delight": ONES},
        {"logp": ONES, "advantages": torch.ones(11)},
        {"logp": ONES, "advantages": ONES, "mask": torch.ones(3)},
        {"logp": torch.ones(2, 3, 4), "advantages": torch.ones(2, 3, 4)},
        {"logp": ONES, "advantages": ONES * math.nan},
        {"logp": ONES * -math.inf, "advantages": ONES},
        {"delight": ONES * math.nan},
        {"delight": ONES * math.inf},
        {"delight": torch.ones(0)},
        {"delight": torch.tensor(1.0)},
        {"delight": torch.ones(2, 3, 4)},
        {"delight": [1.0, 2.0]},
    ],
    ids=lambda a: "-".join(f"{k}{tuple(getattr(v, 'shape', ()))}" for k, v in a.items()) or "nothing",
)
def test_a_screen_that_cannot_be_right_is_refused_and_leaves_no_trace(setup, arguments):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        with pytest.raises(ValueError, match=r"[a-z]"):
            gate.preselect(**arguments)
        assert gate.stats.steps == 0 and gate.last is None
        step(model, batch)
        assert gate.stats.steps == 1 and gate.stats.forwarded == 3


def test_screening_by_delight_alone_needs_a_priority_that_it_tells(setup):
    for priority in ("advantage", "surprisal", kondo.additive(0.5)):
        with pytest.raises(ValueError, match="priority needs logp and advantages"):
            kondo.gated(setup[0], rate=0.25, priority=priority).screen(delight=ONES)


@pytest.mark.parametrize("options", [{"rate": 1.0}, {"rate": 0.25, "warmup_steps": 1}, {"enabled": False}])
def test_a_screen_passes_through_where_the_gate_does(setup, options):
    model, reference, batch = setup
    seen = rows_with_a_graph(model.body[0])
    with kondo.gated(model, **options) as gate:
        decision = gate.preselect(delight=torch.arange(12.0))
        step(model, batch)
    assert decision.kept.tolist() == list(range(12)) and decision.rate == 1.0 and seen == [12]
    assert gate.stats.steps == (0 if "enabled" in options else 1)
    step(reference, batch)
    assert_same_gradient(model, reference)


# Tokens.


class TokenPolicyAndValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.GRU(FEATURES, 12, batch_first=True)
        self.policy = nn.Linear(12, K)
        self.value = nn.Linear(12, 1)

    def forward(self, x):
        hidden = self.body(x)[0]
        return self.policy(hidden), self.value(hidden).squeeze(-1)


def token_terms(logits, actions, advantages, kind):
    """Loss terms (B, P) of the tokens, by the ways that users write it."""
    if kind == "gather":
        return -advantages * pick(logits, actions)
    nll = F.cross_entropy(logits.flatten(0, 1), actions.flatten(), reduction="none").view(actions.shape)
    return advantages * nll


def shifted(tensor, cut):
    return {"none": tensor, "last": tensor[:, :-1], "first": tensor[:, 1:]}[cut]


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["gather", "cross_entropy"])
@pytest.mark.parametrize("cut", ["none", "last", "first"])
def test_kept_tokens_alone_drive_a_language_models_gradient(cut, kind, rate):
    case = CASES["llama"]
    torch.manual_seed(1)
    model, reference = copies(case.build().double())
    batch = make_batch(10, True, torch.float64)
    actions, advantages, mask = (shifted(t, cut) for t in (batch.actions, batch.advantages, batch.mask))

    def loss(m, w=None):
        logits = shifted(case.call(m, batch).logits, cut)
        terms = token_terms(logits, actions, advantages, kind) * mask
        return (terms if w is None else terms * w).sum() / mask.sum(), logits

    with kondo.gated(model, rate=rate, unit="token") as gate:
        loss(model)[0].backward()
    valid = int(mask.sum())
    k = max(1, round(rate * valid))
    w = kept_mask(gate.last.kept, mask.numel(), torch.float64).view(mask.shape)
    assert len(gate.last.kept) == k and gate.last.rate == k / valid
    assert not w[mask == 0].any()
    value, logits = loss(reference, w)
    value.backward()
    assert_same_gradient(model, reference)
    delight = -pick(logits, actions).detach() * advantages * mask
    torch.testing.assert_close(gate.last.delight, delight.flatten())
    best = delight.flatten().masked_fill(mask.flatten() == 0, -torch.inf).topk(k).indices
    assert set(best.tolist()) == set(gate.last.kept.tolist())
    assert gate.stats.forwarded == int(w.any(1).sum())


def test_tokens_ignored_by_cross_entropy_are_not_candidates():
    case = CASES["llama"]
    torch.manual_seed(1)
    model, reference = copies(case.build().double())
    batch = make_batch(10, True, torch.float64)
    labels = batch.actions.masked_fill(batch.mask == 0, -100)

    def loss(m, w=None):
        nll = F.cross_entropy(case.call(m, batch).logits.transpose(1, 2), labels, reduction="none")
        return (batch.advantages * nll if w is None else batch.advantages * nll * w).sum()

    with kondo.gated(model, rate=0.3, unit="token") as gate:
        loss(model).backward()
    w = kept_mask(gate.last.kept, 50, torch.float64).view(10, 5)
    assert len(gate.last.kept) == round(0.3 * int(batch.mask.sum())) and not w[batch.mask == 0].any()
    loss(reference, w).backward()
    assert_same_gradient(model, reference)


def actor_critic(m, batch, w=None):
    logits, value = m(batch.x)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    terms = -batch.advantages * pick(logits, batch.actions) - 0.01 * entropy + 0.5 * (value - batch.returns) ** 2
    return ((terms if w is None else terms * w) * batch.mask).sum() / batch.mask.sum()


@pytest.mark.parametrize("first", [True, False], ids=["screen", "hook"])
@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, lambda d: 1.0),
        ({"weight": "dg"}, torch.sigmoid),
        ({"normalize": "kept"}, lambda d: "kept"),
    ],
    ids=["pg", "dg", "kept"],
)
def test_kept_tokens_of_a_policy_and_value_model_lose_no_term_and_dropped_ones_all(options, factor, first):
    model, reference = copies(TokenPolicyAndValue().double())
    batch = make_batch(10, True, torch.float64)
    with torch.no_grad():
        logp = pick(reference(batch.x)[0], batch.actions)
    seen = rows_with_a_graph(model.policy)
    with kondo.gated(model, rate=0.2, unit="token", audit=0, **options) as gate:
        if first:
            gate.preselect(logp=logp, advantages=batch.advantages, mask=batch.mask)
        actor_critic(model, batch).backward()
    valid, kept = int(batch.mask.sum()), gate.last.kept
    w = kept_mask(kept, 50, torch.float64).view(10, 5)
    assert len(kept) == round(0.2 * valid) and not w[batch.mask == 0].any()
    assert seen == [int(w.any(1).sum())]
    gain = factor(-logp * batch.advantages)
    actor_critic(reference, batch, w * (valid / len(kept) if gain == "kept" else gain)).backward()
    assert_same_gradient(model, reference)


def test_the_screen_and_the_hook_keep_the_same_tokens():
    model, other = copies(TokenPolicyAndValue().double())
    batch = make_batch(10, True, torch.float64)
    with torch.no_grad():
        logp = pick(model(batch.x)[0], batch.actions)
    with kondo.gated(model, rate=0.2, unit="token") as first:
        first.preselect(delight=(-logp * batch.advantages).masked_fill(batch.mask == 0, -100.0))
        actor_critic(model, batch).backward()
    with kondo.gated(other, rate=10 / int(batch.mask.sum()), unit="token") as second:
        actor_critic(other, batch).backward()
    assert first.last.kept.tolist() == second.last.kept.tolist()
    assert_same_gradient(model, other)


@pytest.mark.parametrize("cut", ["last", "first"])
def test_tokens_screened_for_shifted_logits_are_exact_or_refused(cut):
    """Only the loss tells which positions the screened tokens stand for."""
    model, reference = copies(TokenPolicyAndValue().double())
    batch = make_batch(10, True, torch.float64)
    actions, advantages, mask = (shifted(t, cut) for t in (batch.actions, batch.advantages, batch.mask))

    def loss(m, w=1.0):
        return (-advantages * pick(shifted(m(batch.x)[0], cut), actions) * mask * w).sum()

    with torch.no_grad():
        logp = pick(shifted(reference(batch.x)[0], cut), actions)
    with kondo.gated(model, rate=0.2, unit="token") as gate:
        gate.preselect(logp=logp, advantages=advantages, mask=mask)
        value = loss(model)
        try:
            value.backward()
        except (RuntimeError, ValueError) as error:
            assert cut == "first" and "preselect" in str(error)
            return
    loss(reference, kept_mask(gate.last.kept, 40, torch.float64).view(10, 4)).backward()
    assert_same_gradient(model, reference)


def test_tokens_of_several_calls_are_one_population():
    model, reference = copies(TokenPolicyAndValue().double())
    short, long = make_batch(4, True, torch.float64, 1, 3), make_batch(6, True, torch.float64, 2, 7)
    with kondo.gated(model, rate=0.2, unit="token") as gate:
        (actor_critic(model, short) + actor_critic(model, long)).backward()
    w = kept_mask(gate.last.kept, 12 + 42, torch.float64)
    assert len(gate.last.kept) == round(0.2 * int(short.mask.sum() + long.mask.sum()))
    total = actor_critic(reference, short, w[:12].view(4, 3)) + actor_critic(reference, long, w[12:].view(6, 7))
    total.backward()
    assert_same_gradient(model, reference)


def test_masked_tokens_are_not_counted():
    model = TokenPolicyAndValue().double()
    batch = make_batch(10, True, torch.float64)
    valid, dropped, kept = int(batch.mask.sum()), [], []
    with kondo.gated(model, rate=0.2, unit="token") as gate:
        for _ in range(2):
            actor_critic(model, batch).backward()
            w = kept_mask(gate.last.kept, 50, torch.float64).bool()
            kept.append(gate.last.delight[w])
            dropped.append(gate.last.delight[~w & (batch.mask.flatten() > 0)])
    assert (gate.stats.kept, gate.stats.rows) == (2 * round(0.2 * valid), 2 * valid)
    assert gate.stats.rate == pytest.approx(round(0.2 * valid) / valid)
    assert gate.stats.rows_screened == 20
    assert gate.stats.delight_kept == pytest.approx(torch.cat(kept).mean().item())
    assert gate.stats.delight_dropped == pytest.approx(torch.cat(dropped).mean().item())


@pytest.mark.parametrize("first", [True, False], ids=["screen", "hook"])
def test_all_tokens_masked_gives_a_gradient_of_zero(first):
    model = TokenPolicyAndValue().double()
    batch = make_batch(6, True, torch.float64)
    batch.mask = torch.zeros_like(batch.mask)
    with kondo.gated(model, rate=0.2, unit="token") as gate:
        if first:
            gate.preselect(logp=-torch.ones(6, 5), advantages=batch.advantages, mask=batch.mask)
        logits, value = model(batch.x)
        terms = -batch.advantages * pick(logits, batch.actions) + value**2
        (terms * batch.mask).sum().backward()
        assert len(gate.last.kept) == 0 and gate.stats.kept == 0 and gate.stats.steps == 1
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
        batch.mask = torch.ones_like(batch.mask)
        actor_critic(model, batch).backward()
    assert len(gate.last.kept) == 6


def test_tokens_of_a_batch_of_single_values_are_rows(setup):
    model, reference, batch = setup
    with kondo.gated(model, rate=0.25, unit="token") as gate:
        step(model, batch)
    assert len(gate.last.kept) == 3
    reinforce(reference(batch.x), batch, kept_mask(gate.last.kept, 12, torch.float64)).backward()
    assert_same_gradient(model, reference)


# Forced rows.


@pytest.mark.parametrize("rows", [torch.tensor([7, 2]), torch.tensor([False, False, True] + [False] * 4 + [True] * 1)])
def test_forced_rows_of_a_smaller_batch_are_kept_by_mask_or_by_index(rows):
    model, reference = copies(Mlp().double())
    batch = make_batch(8, False, torch.float64)
    batch.advantages[[2, 7]] = -100.0
    with kondo.gated(model, rate=0.5) as gate:
        gate.force(rows)
        step(model, batch)
        forced = gate.last.kept.tolist()
        assert len(forced) == 4 and {2, 7} <= set(forced)
        reinforce(reference(batch.x), batch, kept_mask(gate.last.kept, 8, torch.float64)).backward()
        assert_same_gradient(model, reference)
        step(model, batch)
        assert not {2, 7} & set(gate.last.kept.tolist())


@pytest.mark.parametrize("options", [{"price": 1e6}, {"rate": 0.01}, {"price": 1e6, "deterministic": False}])
def test_forced_rows_are_kept_by_any_gate(setup, options):
    model, _, batch = setup
    with kondo.gated(model, **options) as gate:
        gate.force(torch.tensor([0, 5, 11]))
        step(model, batch)
    assert gate.last.kept.tolist() == [0, 5, 11]


def test_forced_rows_are_kept_after_a_screen(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        gate.force(torch.tensor([0]))
        assert gate.preselect(delight=torch.arange(12.0)).kept.tolist() == [0, 10, 11]
        step(model, batch)
    assert gate.last.kept.tolist() == [0, 10, 11]


def test_forced_tokens_are_kept_unless_they_are_masked():
    model = TokenPolicyAndValue().double()
    batch = make_batch(6, True, torch.float64)
    batch.advantages[0, 0] = -100.0
    masked = int((batch.mask.flatten() == 0).nonzero()[0])
    with kondo.gated(model, rate=0.2, unit="token") as gate:
        gate.force(torch.tensor([0, masked]))
        actor_critic(model, batch).backward()
    assert 0 in gate.last.kept and masked not in gate.last.kept


def test_no_forced_rows_is_fine(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        for nothing in (torch.empty(0, dtype=torch.long), torch.zeros(12, dtype=torch.bool)):
            gate.force(nothing)
            step(model, batch)
            assert len(gate.last.kept) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(11, dtype=torch.bool), "force: the mask has 11 entries, the population 12"),
        (torch.tensor([12]), r"force: row indices must be in \[0, 12\)"),
        (torch.tensor([-1]), r"force: row indices must be in \[0, 12\)"),
        (torch.tensor([0.5]), "force"),
    ],
)
def test_forced_rows_that_do_not_exist_are_refused_once(setup, rows, message):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        with pytest.raises(ValueError, match=message):
            gate.force(rows)
            step(model, batch)
        assert gate.stats.steps == 0 and all(p.grad is None for p in model.parameters())
        step(model, batch)
        assert gate.stats.steps == 1 and len(gate.last.kept) == 3


# Resuming, flushing, opening and closing.


def train(model, optimizer, gate, steps):
    decisions = []
    with gate:
        for seed in steps:
            batch = make_batch(12, False, torch.float64, seed)
            step(model, batch)
            optimizer.step()
            optimizer.zero_grad()
            decisions.append((gate.last.kept.tolist(), gate.last.price))
    return decisions


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.2, "history": 4, "deterministic": False, "temperature": 0.5},
        {"rate": 0.05, "history": 6},
        {"rate": 0.2, "priority": "uniform"},
        {"rate": lambda step: 1 / (2 + step)},
    ],
    ids=["bernoulli_history", "history", "uniform", "schedule"],
)
def test_a_run_resumed_from_a_state_dict_ends_where_the_uninterrupted_one_does(setup, options, tmp_path):
    model, again, _ = setup
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gate = kondo.gated(model, seed=3, **options)
    train(model, optimizer, gate, range(5))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "gate": gate.state_dict()}
    torch.save(saved, tmp_path / "run.pt")
    expected = train(model, optimizer, gate, range(5, 12))

    state = torch.load(tmp_path / "run.pt", weights_only=True)
    again.load_state_dict(state["model"])
    resumed_optimizer = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    resumed_optimizer.load_state_dict(state["optimizer"])
    resumed = kondo.gated(again, seed=11, **options)
    resumed.load_state_dict(state["gate"])
    assert resumed.stats.steps == 5 and resumed.stats.rows == 60
    assert train(again, resumed_optimizer, resumed, range(5, 12)) == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert repr(resumed.stats) == repr(gate.stats)


def test_a_state_dict_is_not_moved_by_what_comes_after(setup):
    model, _, batch = setup
    gate = kondo.gated(model, rate=0.2, history=3, deterministic=False)
    with gate:
        step(model, batch)
        state, stats = gate.state_dict(), repr(gate.stats)
        first = []
        for _ in range(3):
            step(model, batch)
            first.append(gate.last.kept.tolist())
        gate.load_state_dict(state)
        assert repr(gate.stats) == stats
        second = []
        for _ in range(3):
            step(model, batch)
            second.append(gate.last.kept.tolist())
    assert first == second


def test_nothing_waits_between_backwards(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        assert gate.flush() == 0
        loss = reinforce(model(batch.x), batch)
        assert gate.flush() == 0 and gate.stats.steps == 0
        loss.backward()
        assert gate.flush() == 0
    assert gate.flush() == 0 and gate.stats.steps == 1


def test_a_context_can_be_opened_again_after_it_was_closed(setup):
    model, reference, batch = setup
    gate = kondo.gated(model, rate=0.25)
    for opened in (1, 2):
        with gate as entered:
            assert entered is gate
            model.zero_grad()
            step(model, batch)
        assert gate.stats.steps == opened
    model(batch.x).sum().backward()
    assert gate.stats.steps == 2
    model.zero_grad()
    with gate:
        step(model, batch)
    reinforce(reference(batch.x), batch, kept_mask(gate.last.kept, 12, torch.float64)).backward()
    assert_same_gradient(model, reference)


def test_a_context_opened_again_sees_parameters_that_came_meanwhile():
    model = nn.Sequential(nn.Linear(FEATURES, K)).double()
    batch = make_batch(12, False, torch.float64)
    gate = kondo.gated(model, rate=0.25)
    with gate:
        step(model, batch)
    model.append(nn.Linear(K, K).double())
    with gate:
        model.zero_grad()
        loss = reinforce(model(batch.x), batch)
        with torch.no_grad():
            model[1].weight.add_(1.0)
        with pytest.raises(kondo.ReplayMismatchError, match="parameters were changed"):
            loss.backward()


def test_a_context_is_not_entered_twice_and_stays_open(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        with pytest.raises(RuntimeError, match="already open"), gate:
            pass
        step(model, batch)
    assert gate.stats.steps == 1
    step(model, batch)
    assert gate.stats.steps == 1


def test_a_screen_is_forgotten_when_the_context_closes(setup):
    model, _, batch = setup
    gate = kondo.gated(model, rate=0.25)
    with gate:
        step(model, batch)
        gate.preselect(delight=torch.arange(12.0))
    with gate:
        batch = make_batch(5, False, torch.float64)
        step(model, batch)
    assert len(gate.last.delight) == 5


# Arguments.


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"rate": 0.1, "price": 0.0}, ValueError, "rate and price"),
        *(({"rate": bad}, ValueError, "rate") for bad in (0, -1, 2, math.nan, "0.1", True, [0.1])),
        *(({"price": bad}, ValueError, "price") for bad in (math.nan, math.inf)),
        ({"price": "0"}, (ValueError, TypeError), "price"),
        *(({"temperature": bad}, ValueError, "temperature") for bad in (0, -1, math.nan)),
        ({"temperature": "hot"}, (ValueError, TypeError), "temperature"),
        ({"priority": "joy"}, ValueError, "priority"),
        ({"priority": 3}, ValueError, "priority"),
        ({"unit": "row"}, ValueError, "unit"),
        ({"reduction": "median"}, ValueError, "reduction"),
        *(({"history": bad}, ValueError, "history") for bad in (-1, 2.5, True)),
        ({"price": 0.0, "history": 2}, ValueError, "history"),
        ({"weight": "ppo"}, ValueError, "weight"),
        ({"unbiased": True, "hard": False}, ValueError, "unbiased"),
        ({"normalize": "rows"}, ValueError, "normalize"),
        *(({"warmup_steps": bad}, ValueError, "warmup_steps") for bad in (-1, 1.5, True, "2")),
        ({"seed": "a"}, (ValueError, TypeError), "seed"),
        ({"seed": 0.5}, (ValueError, TypeError), "seed"),
        ({"method": "act"}, ValueError, "method"),
        ({"method": "training"}, ValueError, "method"),
        ({"method": 3}, (ValueError, TypeError), "method"),
        ({"logp": 0, "logits": 1}, ValueError, "logp, logits and probs"),
        *(({"batch_dim": bad}, ValueError, "batch_dim") for bad in (-1, 0.5, True, None)),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_right_is_named(setup, options, error, name):
    with pytest.raises(error, match=rf"\b{re.escape(name)}\b"):
        kondo.gated(setup[0], **options)


@pytest.mark.parametrize("model", [None, lambda x: x, "model", nn.Linear])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        kondo.gated(model)


def test_three_per_cent_is_the_default_rate(setup):
    assert "rate=0.03" in repr(kondo.gated(setup[0]))
    assert "price=0.0" in repr(kondo.gated(setup[0], price=0.0))


def test_all_but_model_and_rate_are_keyword_only(setup):
    with pytest.raises(TypeError):
        kondo.gated(setup[0], 0.1, 0.0)


def test_data_parallel_over_several_devices_is_refused():
    model = torch.nn.DataParallel(torch.nn.Linear(3, 2))
    model.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"DataParallel.*DistributedDataParallel"):
        kondo.gated(model)


# Rows decided before, for several calls.


def test_one_selection_for_several_calls_is_that_of_the_whole_batch(setup):
    model, _, batch = setup
    logp = model(batch.x).log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1).detach()
    with kondo.gated(model, rate=0.25) as gate:
        decision = gate.select(logp=logp, advantages=batch.advantages)
        factors = decision.factors()
        for half in (slice(0, 6), slice(6, 12)):
            assert gate.preselect(kept=factors[half]) is None
            out = model(batch.x[half]).log_softmax(-1).gather(-1, batch.actions[half].unsqueeze(-1)).squeeze(-1)
            (-(batch.advantages[half] * out).sum() / 12).backward()
    found = grads(model)
    model.zero_grad()
    keep = torch.zeros(12, dtype=torch.float64)
    keep[(batch.advantages * -logp).topk(3).indices] = 1
    assert decision.kept.tolist() == keep.nonzero().flatten().tolist()
    out = model(batch.x).log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    (-(keep * batch.advantages * out).sum() / 12).backward()
    assert largest_relative_difference(found, grads(model)) < 1e-10
    assert gate.stats.steps == 1 and gate.stats.kept == 3 and gate.stats.rows == 12
    assert gate.stats.forwarded == sum(max(1, int(keep[half].sum())) for half in (slice(0, 6), slice(6, 12)))


def test_screen_is_the_old_name_of_preselect_and_says_nothing(setup):
    model, _, batch = setup
    assert kondo.Gated.screen is kondo.Gated.preselect
    with warnings.catch_warnings(), kondo.gated(model, rate=0.25) as gate:
        warnings.simplefilter("error")
        gate.screen(delight=torch.arange(12.0))
        model(batch.x).sum().backward()
    assert gate.last.kept.tolist() == [9, 10, 11]


def test_screen_takes_kept_rows_alone(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        with pytest.raises(ValueError, match="kept is decided already"):
            gate.preselect(kept=torch.ones(12), delight=torch.ones(12))
        with pytest.raises(ValueError, match=r"kept must be a tensor of shape \(B,\)"):
            gate.preselect(kept=torch.ones(12, 2))
        gate.preselect(kept=torch.ones(5))
        with pytest.raises(ValueError, match="preselect\\(\\) was given 5 rows"):
            model(batch.x)
    with kondo.gated(model, rate=1.0) as gate:
        assert len(gate.select(delight=torch.arange(12.0)).kept) == 12
        gate.preselect(kept=torch.zeros(12))
        model(batch.x).sum().backward()
        assert gate.stats.kept == 12


@pytest.mark.parametrize("rows", [torch.randn(7, 3), torch.randn(1, 3)])
def test_pairs_need_an_even_batch(rows):
    with kondo.gated(nn.Linear(3, 2), pairs=True) as gate, pytest.raises(ValueError, match="not even"):
        gate.model(rows)
    with gate, pytest.raises(ValueError, match="preselect: pairs=True"):
        gate.preselect(kept=torch.ones(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 1}, "pairs must be"),
        ({"pairs": True, "unit": "token"}, "pairs are kept or dropped as one"),
        ({"shared_loss": "drop"}, "shared_loss must be"),
        ({"shared_loss": "kept", "scope": "global", "balance": True}, "shared_loss='kept' takes"),
    ],
)
def test_options_of_pairs_and_losses(options, message):
    with pytest.raises(ValueError, match=message):
        kondo.gated(nn.Linear(2, 2), rate=0.5, **options)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("window", [1, 2])
def test_pairs_are_kept_or_dropped_as_one(dropout, window):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()
    batches = [(torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))) for _ in range(window)]

    def loss(x, actions, weights=1.0):
        logp = model(x).log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        chosen, rejected = logp.chunk(2)
        return (-F.logsigmoid(chosen - rejected) * weights).mean()

    with kondo.gated(model, rate=1 / 3, pairs=True, window=window) as gate:
        for i, batch in enumerate(batches):
            torch.manual_seed(i)
            loss(*batch).backward()
    found, kept = grads(model), gate.last.kept
    model.zero_grad()
    weights = torch.zeros(6 * window, dtype=torch.float64)
    weights[kept] = 1
    for i, batch in enumerate(batches):
        torch.manual_seed(i)
        loss(*batch, weights[6 * i : 6 * i + 6]).backward()
    assert largest_relative_difference(found, grads(model)) < 1e-10
    assert len(kept) == 2 * window and gate.stats.rows == 6 * window


def test_two_gates_around_two_models_count_each_log_prob_once():
    models = [nn.Linear(4, 3).double() for _ in range(2)]
    x, actions, advantages = torch.randn(8, 4).double(), torch.randint(3, (8,)), torch.randn(8).double()

    def logp(model):
        return model(x).log_softmax(-1).gather(1, actions[:, None])[:, 0]

    with kondo.gated(models[0], rate=0.25) as first, kondo.gated(models[1], rate=0.25) as second:
        for model in models:
            (-(advantages * logp(model)).mean()).backward()
    for model, gate in zip(models, (first, second), strict=True):
        torch.testing.assert_close(gate.last.delight, -(advantages * logp(model)).detach())


class Headless(nn.Module):
    """A body that is called, and a head that the loss code applies itself."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 5)

    def forward(self, x):
        return self.body(x)


def _headless(whole):
    torch.manual_seed(0)
    ours, theirs = copies(Headless().double())
    gated = ours if whole else ours.body
    x, u = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    a, keep = torch.randint(5, (6,)), torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.float64)

    def terms(model, hidden, rows=slice(None)):
        return -(u[rows] * model.head(hidden).log_softmax(-1).gather(1, a[rows, None])[:, 0])

    (terms(theirs, theirs(x)) * keep).sum().backward()
    return ours, gated, theirs, x, keep, terms


@pytest.mark.parametrize("whole", [False, True])
def test_a_head_that_rows_reach_which_were_not_run_is_refused(whole):
    ours, gated, _, x, keep, terms = _headless(whole)
    with kondo.gated(gated, rate=0.34) as gate, pytest.raises(RuntimeError, match=r"preselect.* the loss code applies"):
        gate.preselect(kept=keep)
        terms(ours, gated(x)).sum().backward()


@pytest.mark.parametrize("way", ["taken", "masked"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.filterwarnings("ignore:gated. the loss code uses the model's parameter")
def test_a_head_that_kept_rows_alone_reach_is_exact(whole, way):
    ours, gated, theirs, x, keep, terms = _headless(whole)
    kept = keep.nonzero().flatten()
    with kondo.gated(gated, rate=0.34) as gate:
        gate.preselect(kept=keep)
        hidden = gated(x)
        (terms(ours, hidden[kept], kept) if way == "taken" else terms(ours, hidden) * keep).sum().backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_a_parameter_that_no_row_reaches_is_none_of_that():
    ours, gated, _, x, keep, _ = _headless(False)
    temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with kondo.gated(gated, rate=0.34) as gate:
        gate.preselect(kept=keep)
        (gated(x).sum() + ours.head.weight.square().sum() + temperature).backward()
    assert torch.equal(ours.head.weight.grad, 2 * ours.head.weight)


@pytest.fixture
def two_ranks():
    """A process group of two ranks, of which the other is not there."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("first", [False, True], ids=["screened", "decided first"])
@pytest.mark.parametrize("named", [False, True], ids=["by position", "by name"])
def test_a_row_that_ranks_run_together_is_refused(named, first, two_ranks):
    class Ring(nn.Linear):
        def forward(self, x, group=None):
            return super().forward(x)

    model, x = Ring(4, 3).double(), torch.randn(8, 4).double()
    given = {"group": dist.group.WORLD} if named else {}
    with pytest.raises(ValueError, match="tensor_parallel_group=group"), kondo.gated(model, rate=0.5) as gate:
        if first:
            gate.preselect(delight=torch.randn(8))
        model(x, *([] if named else [dist.group.WORLD]), **given)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("group", [None, "alone", "told"])
def test_a_group_of_one_rank_or_one_that_is_told_is_none(group, two_ranks):
    class Ring(nn.Linear):
        def forward(self, x, group=None):
            return super().forward(x)

    model, x = Ring(4, 3).double(), torch.randn(8, 4).double()
    groups = {None: None, "alone": dist.new_group([0]), "told": dist.group.WORLD}
    told = {"tensor_parallel_group": dist.group.WORLD} if group == "told" else {}
    gate = kondo.gated(model, rate=0.5, **told)
    with gate:
        out = model(x, group=groups[group])
        assert out.grad_fn is not None and gate.stats.steps == 0
