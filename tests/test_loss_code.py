"""Delight seen in the loss code: rows that move, scales of nested terms, what is no policy, parameters used outside."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.utils.flop_counter import FlopCounterMode

import kondo_hooks as kondo
from kondo_hooks.delight.graph import find_sources
from tests.reference import copies, grads, kept_mask, largest_relative_difference

B, X, K = 12, 5, 6


def pick(table, actions):
    return table.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(B, X, dtype=torch.float64, generator=g)
    return x, torch.randint(K, (B,), generator=g), torch.randn(B, dtype=torch.float64, generator=g)


def delight_of(model, x, a, u):
    return (-u * pick(model(x).log_softmax(-1), a)).detach()


def same_ranking(ours, theirs):
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm())


# Pairs.


def halves(t):
    return t[: B // 2] + t[B // 2 :]


PAIRED = {
    "gather": lambda gate, logits, a, u: -(pick(logits.log_softmax(-1), a) * u).mean(),
    "indexing": lambda gate, logits, a, u: -(logits.log_softmax(-1)[torch.arange(B), a] * u).mean(),
    "cross_entropy": lambda gate, logits, a, u: (F.cross_entropy(logits, a, reduction="none") * u).mean(),
    "marked": lambda gate, logits, a, u: -(gate.logp(pick(logits.log_softmax(-1), a)) * u).mean(),
    "categorical": lambda gate, logits, a, u: -(torch.distributions.Categorical(logits=logits).log_prob(a) * u).mean(),
}


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_are_row_i_and_the_row_half_a_batch_below(name, data):
    x, a, u = data
    model, reference = copies(nn.Linear(X, K).double())
    with kondo.gated(model, rate=0.34, pairs=True) as gate:
        PAIRED[name](gate, model(x), a, u).backward()
    torch.testing.assert_close(gate.last.delight, halves(delight_of(reference, x, a, u)))
    (-pick(reference(x).log_softmax(-1), a) * u * gate.last.factors().repeat(2)).mean().backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


@pytest.mark.parametrize("cut", [lambda t: t.chunk(2), lambda t: (t[: B // 2], t[B // 2 :])], ids=["chunk", "slice"])
@pytest.mark.parametrize("marked", [True, False])
def test_pairs_whose_halves_are_taken_apart(cut, marked, data):
    x, a, _ = data
    model, reference = copies(nn.Linear(X, K).double())

    def loss(chosen, rejected, w=1.0):
        return -(F.logsigmoid(0.3 * (chosen - rejected)) * w).mean()

    with kondo.gated(model, rate=0.34, pairs=True) as gate:
        parts = [pick(y, b) for y, b in zip(cut(model(x).log_softmax(-1)), a.chunk(2), strict=True)]
        loss(*(map(gate.logp, parts) if marked else parts)).backward()
    chosen, rejected = pick(reference(x).log_softmax(-1), a).chunk(2)
    u = 0.3 * torch.sigmoid(-0.3 * (chosen - rejected)).detach()
    same_ranking(gate.last.delight, (-u * chosen + u * rejected).detach())
    loss(chosen, rejected, gate.last.factors()).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


# Scales.


def nest(rng, terms):
    """The sum of the terms in any order and nesting, divided and multiplied again on the way."""
    terms = list(terms)
    rng.shuffle(terms)
    while len(terms) > 1:
        n = rng.randint(2, len(terms))
        group, terms = terms[:n], terms[n:]
        how = rng.choice(["add", "sum", "stack", "mean", "sub", "weights", "cat"])
        if how == "add":
            joined = group[0]
            for term in group[1:]:
                joined = term + joined if rng.random() < 0.5 else joined + term
        elif how == "sum":
            joined = sum(group) / len(group) * len(group)
        elif how == "stack":
            joined = torch.stack(group).sum()
        elif how == "cat":
            joined = torch.cat([term.view(1) for term in group]).sum()
        elif how == "mean":
            joined = n * torch.stack(group).mean()
        elif how == "weights":
            weights = torch.rand(n, dtype=torch.float64) + 0.5
            joined = torch.stack([term / w for term, w in zip(group, weights, strict=True)]) @ weights
        else:
            joined = group[0] - sum(-term for term in group[1:])
        c = rng.choice([1.0, 4, torch.tensor(0.3, dtype=torch.float64)])
        terms.append(rng.choice([lambda t, c=c: t, lambda t, c=c: t / c * c, lambda t, c=c: -(-c * t) / c])(joined))
        rng.shuffle(terms)
    return terms[0]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
def test_the_scale_is_that_of_the_policy_term_in_any_order_sign_division_and_nesting(seed, data):
    x, a, u = data
    rng = random.Random(seed)

    class ActorCritic(nn.Module):
        def __init__(self):
            super().__init__()
            self.pi, self.v = nn.Linear(X, K), nn.Linear(X, 1)

        def forward(self, x):
            return self.pi(x), self.v(x).flatten()

    model, reference = copies(ActorCritic().double())
    old = torch.randn(B, dtype=torch.float64) - 2

    def terms(m):
        logits, value = m(x)
        logp_all = logits.log_softmax(-1)
        logp = pick(logp_all, a)
        kl = ((old - logp).exp() - (old - logp) - 1).mean()
        yield rng.choice([-(logp * u).mean(), (-logp * u).sum() / B, -torch.dot(logp, u) / B, -(logp @ u) * (1 / B)])
        yield 0.04 * kl
        yield -0.01 * -(logp_all.exp() * logp_all).sum(-1).mean()
        yield 0.5 * F.mse_loss(value, u)

    factor = rng.choice([1.0, 1 / 8, 65536.0])
    with kondo.gated(model, rate=0.5) as gate:
        (nest(rng, terms(model)) * factor).backward()
    logp = pick(reference.pi(x).log_softmax(-1), a).detach()
    expected = (u - 0.04 * (1 - (old - logp).exp())) * -logp
    torch.testing.assert_close(gate.last.delight, expected)
    assert gate.last.scale == pytest.approx(factor / B)


def warned(run):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in told if isinstance(w.message, kondo.KondoWarning)]


@pytest.mark.parametrize("coefficient", [0.04, 1.0, 0.0])
@pytest.mark.parametrize("marked", [True, False])
def test_terms_of_different_scales_on_one_log_prob_are_told_once_and_only_these(coefficient, marked, data):
    x, a, u = data
    model = nn.Linear(X, K).double()

    def run():
        with kondo.gated(model, rate=0.5) as gate:
            for _ in range(3):
                logp = pick(model(x).log_softmax(-1), a)
                pg = -((gate.logp(logp) if marked else logp) * u).mean()
                (coefficient * (logp + 2).pow(2).mean() + pg).backward()

    told = [message for message in warned(run) if "different scales" in message]
    assert len(told) == (coefficient == 0.04 and not marked)


@pytest.mark.parametrize("loss", [lambda t: t / 2, lambda t: 3 * t, lambda t: (t / 4).sum()])
def test_a_dispatch_mode_around_the_step_changes_nothing(loss, data):
    x, a, u = data
    model, reference = copies(nn.Linear(X, K).double())
    with kondo.gated(model, rate=0.5) as gate, FlopCounterMode(display=False):
        loss(-(pick(model(x).log_softmax(-1), a) * u).mean()).backward()
    torch.testing.assert_close(gate.last.delight, delight_of(reference, x, a, u))


# Rows that move.

perm = torch.randperm(B, generator=torch.Generator().manual_seed(1))


def into(buffer, write):
    def moved(y):
        place = buffer(y)
        return place if (result := write(place, y)) is None else result

    return moved


def zeros(y):
    return torch.zeros_like(y)


MOVED = {
    "index_put": into(zeros, lambda b, y: b.__setitem__(perm, y)),
    "slices": into(
        zeros, lambda b, y: (b.__setitem__(slice(0, 4), y[8:]), b.__setitem__(slice(4, B), y[:8]))[2:] or None
    ),
    "index_copy": into(zeros, lambda b, y: b.index_copy(0, perm, y)),
    "index_copy_": into(zeros, lambda b, y: b.index_copy_(0, perm, y)),
    "index_add": into(zeros, lambda b, y: b.index_add(0, perm, y)),
    "scatter": into(zeros, lambda b, y: b.scatter(0, perm[:, None].expand(-1, K), y)),
    "permuted": lambda y: y[perm],
    "flipped": lambda y: y.flip(0),
    "rolled": lambda y: y.roll(1, 0),
    "selected": lambda y: y.index_select(0, perm),
    "sorted": lambda y: y.sort(0).values,
    "halves_swapped": lambda y: torch.cat([y[6:], y[:6]]),
    "whole_and_flipped": lambda y: y + 0.1 * y.flip(0),
    "transposed_into_rows": lambda y: y.T.reshape(B, K),
    "softmax_over_rows": lambda y: y.log_softmax(0),
}


@pytest.mark.parametrize("name", MOVED)
def test_rows_that_move_are_not_followed(name, data):
    model = nn.Linear(X, K).double()
    with kondo.gated(model, rate=0.25):
        y = model(data[0])
        assert find_sources(MOVED[name](y)) is None
        assert find_sources(y)[0].row_axis == 0


@pytest.mark.parametrize("name", ["index_put", "slices", "index_copy_", "scatter", "permuted", "flipped", "rolled"])
def test_delight_of_rows_that_move_is_that_of_the_rows_they_are(name, data):
    x, a, u = data
    model, reference = copies(nn.Linear(X, K).double())
    order = MOVED[name](torch.arange(B, dtype=torch.float64)[:, None].expand(-1, K).clone())[:, 0].long()
    with kondo.gated(model, rate=0.25) as gate:
        logp = pick(MOVED[name](model(x)).log_softmax(-1), a[order])
        (-logp * u[order]).mean().backward()
    same_ranking(gate.last.delight, delight_of(reference, x, a, u))


STAYED = {
    "copied_whole": (into(zeros, lambda b, y: b.copy_(y)), 0),
    "masked_in_place": (into(lambda y: y.clone(), lambda b, y: b.__setitem__((slice(None), 0), -1e9)), 0),
    "masked_by_index": (into(lambda y: y.clone(), lambda b, y: b.__setitem__(b > 9, 0.0)), 0),
    "in_a_column": (lambda y: torch.stack([y, 2 * y], 1), 0),
    "stacked_in_front": (lambda y: torch.stack([y, 2 * y]), 1),
    "joined_on_another_axis": (lambda y: torch.cat([y, y], 1), 0),
    "with_a_constant_column": (lambda y: torch.cat([torch.zeros(B, 1).double(), y], 1), 0),
    "across_others": (lambda y: y.sum(-1) * torch.ones(B, 1).double(), 1),
    "flipped_in_the_row": (lambda y: y.flip(1), 0),
    "cut_in_the_row": (lambda y: y.split([2, 4], 1)[1], 0),
    "unbound": (lambda y: y.view(B, 2, 3).unbind(1)[1], 0),
    "behind_another_axis": (lambda y: y.view(B, 2, 3).permute(2, 0, 1), 1),
    "centred": (lambda y: y - y.max(-1, keepdim=True).values, 0),
    "normed_over_rows": (lambda y: y - y.mean(0), 0),
    "in_order": (lambda y: y[torch.arange(B), torch.arange(B) % K], 0),
    "some_columns": (lambda y: y[:, [0, 2]], 0),
}


@pytest.mark.parametrize("name", STAYED)
def test_rows_that_stay_are_followed(name, data):
    move, axis = STAYED[name]
    model = nn.Linear(X, K).double()
    with kondo.gated(model, rate=0.25):
        y = model(data[0])
        (source,) = find_sources(move(y))
        assert source.row_axis == axis and source.call.batch == B


def test_rows_of_one_across_rows_of_another_are_not_followed(data):
    model = nn.Linear(X, K).double()
    with kondo.gated(model, rate=0.25):
        y = model(data[0]).sum(-1)
        assert find_sources(y[:, None] - y[None, :]) is None
        assert find_sources(y[:, None] * y[None, :].detach())[0].row_axis == 0


def test_a_head_outside_in_chunks_of_positions_is_followed_to_its_tokens():
    T, V = 6, 7  # noqa: N806
    body, reference = copies(nn.Linear(X, 4).double())
    head = nn.Linear(4, V, bias=False).double()
    x, ids, u = torch.randn(B, T, X).double(), torch.randint(V, (B, T)), torch.randn(B, T).double()

    def log_probs(m):
        pieces = zip(m(x).chunk(3, 1), ids.chunk(3, 1), strict=True)
        return torch.cat([pick(head(h).log_softmax(-1), i) for h, i in pieces], 1)

    with kondo.gated(body, rate=0.25, unit="token") as gate:
        (-u * gate.logp(log_probs(body))).mean().backward()
    torch.testing.assert_close(gate.last.delight, (-u * log_probs(reference)).detach().flatten())
    (-u * log_probs(reference) * gate.last.factors().view(B, T)).mean().backward()
    assert largest_relative_difference(grads(body), grads(reference)) < 1e-10


def test_several_choices_a_position_are_no_tokens():
    model = nn.Linear(X, 2 * K).double()
    x, a, u = torch.randn(B, 4, X).double(), torch.randint(K, (B, 4, 2)), torch.randn(B, 4, 1).double()
    with kondo.gated(model, rate=0.25, unit="token"), pytest.raises(kondo.DelightError, match="which position"):
        logp = pick(model(x).view(B, 4, 2, K).log_softmax(-1), a)
        (-u * logp).mean().backward()


# What is no policy.


class Old(nn.Module):
    """Returns log-probs of old under a name that says so, without a graph."""

    def __init__(self, name):
        super().__init__()
        self.pi, self.name = nn.Linear(X, K), name

    def forward(self, x, a):
        y = self.pi(x)
        return {"scores": y, self.name: pick(y.log_softmax(-1), a).detach()}


@pytest.mark.parametrize("name", ["log_probs", "per_token_logps", "nll", "logp"])
def test_an_output_without_a_graph_is_a_constant_whatever_its_name(name, data):
    x, a, u = data
    model, reference = copies(Old(name).double())
    with kondo.gated(model, rate=0.25) as gate:
        out = model(x, a)
        (-(pick(out["scores"].log_softmax(-1), a) - out[name]).exp() * u).mean().backward()
    torch.testing.assert_close(gate.last.delight, delight_of(reference.pi, x, a, u))


@pytest.mark.parametrize("shape", [(1,), ()])
def test_one_logit_is_no_policy(shape, data):
    x, _, u = data

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Linear(X, 1)

        def forward(self, x):
            return {"logits": self.v(x).view(-1, *shape)}

    def loss(m, w=1.0):
        return ((m(x)["logits"].view(-1) - u) ** 2 * w).mean()

    model, reference = copies(Critic().double())
    with kondo.gated(model, rate=0.25, priority="uniform") as gate:
        loss(model).backward()
    loss(reference, kept_mask(gate.last.kept, B, torch.float64)).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    with kondo.gated(model, rate=0.25), pytest.raises(kondo.DelightError, match="no policy was found"):
        loss(model).backward()


def test_an_entropy_and_soft_labels_of_a_bernoulli_are_no_actions(data):
    x, a, u = data
    model = nn.Linear(X, 1).double()
    bits = (a > 2).double()
    with kondo.gated(model, rate=0.25) as gate:
        logits = model(x)[:, 0]
        policy = Bernoulli(logits=logits)
        soft = F.binary_cross_entropy_with_logits(logits, torch.full_like(bits, 0.3))
        logp = policy.log_prob(bits)
        (-(logp * u).mean() - 0.5 * policy.entropy().mean() + 0.2 * soft).backward()
    torch.testing.assert_close(gate.last.delight, (-u * logp).detach())


# Parameters of the gated model in the loss code.


class Gaussian(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.log_std = nn.Linear(X, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.mean(x)


def gaussian(y, log_std, u):
    return -(Normal(y, log_std.exp()).log_prob(torch.ones(B, 2).double()).sum(-1) * u).mean()


fixed = torch.zeros(2).double()


def joined(m, y, u, w):
    """Half of the rows at a time, next to the log_std of each, in one term of the loss."""
    both = torch.cat([y, m.log_std.expand(B, 2)], 1)
    return gaussian(y, fixed, u * w) + (both.pow(2).sum(1) * w).mean()


def correlated(m, y):
    return torch.linalg.solve(torch.diag_embed(m.log_std.exp() + 0.1), y.T).pow(2).mean()


# Each row's terms times w.
SPLIT = {
    "in_a_density": lambda m, y, u, w: gaussian(y, m.log_std, u * w),
    "softplus": lambda m, y, u, w: gaussian(y, F.softplus(m.log_std).clamp(min=0.1).log(), u * w),
    "one_for_all": lambda m, y, u, w: gaussian(y, m.log_std.mean(), u * w),
    "independent": lambda m, y, u, w: (
        -(Independent(Normal(y, m.log_std.exp()), 1).log_prob(torch.ones(B, 2).double()) * u * w).mean()
    ),
    "added_to_rows": lambda m, y, u, w: gaussian(y, fixed, u * w) + ((y + m.log_std).pow(2) * w[:, None]).mean(),
    "scaled": lambda m, y, u, w: gaussian(y / m.log_std.exp()[0], fixed, u * w),
    "as_a_head": lambda m, y, u, w: gaussian(y, fixed, u * w) + ((y @ m.mean.weight).pow(2) * w[:, None]).mean(),
    "joined": joined,
    "ratio": lambda m, y, u, w: (
        -(torch.exp(Normal(y, m.log_std.exp()).log_prob(y.detach() + 0.3).sum(-1) + 1).clamp(0.1, 3) * u * w).mean()
    ),
    "and_in_a_penalty": lambda m, y, u, w: gaussian(y, m.log_std, u * w) - 0.01 * m.log_std.sum(),
    "time_first": lambda m, y, u, w: gaussian(y.T.contiguous().T, m.log_std, u * w),
}
TOLD = {
    "times_a_reduced_loss": lambda m, y, u: gaussian(y, fixed, u) * m.log_std.sum().exp(),
    "rows_moved": lambda m, y, u: gaussian(y, fixed, u) + (y.flip(0) + m.log_std).pow(2).mean(),
    "in_a_solver": lambda m, y, u: gaussian(y, fixed, u) + correlated(m, y),
}


def masked(name, model, x, u, factors):
    SPLIT[name](model, model(x), u, factors).backward()
    return grads(model)


@pytest.mark.parametrize("name", SPLIT)
def test_of_a_parameter_in_the_loss_code_only_the_kept_rows_share_counts(name, data):
    x, _, u = data
    model, reference = copies(Gaussian().double())

    def run():
        with kondo.gated(model, rate=0.25) as gate:
            SPLIT[name](model, model(x), u, torch.ones(B)).backward()
        expected = masked(name, reference, x, u, gate.last.factors())
        assert largest_relative_difference(grads(model), expected) < 1e-10
        assert 0 < gate.last.kept.numel() < B
        assert not model.log_std._backward_hooks

    assert not [message for message in warned(run) if "still reach" in message]


def test_the_kept_rows_share_in_a_parameter_of_the_loss_code_weighted_and_drawn(data):
    x, _, u = data
    model, reference = copies(Gaussian().double())
    with kondo.gated(model, rate=0.5, deterministic=False, unbiased=True, seed=3) as gate:
        SPLIT["in_a_density"](model, model(x), u, torch.ones(B)).backward()
    expected = masked("in_a_density", reference, x, u, gate.last.factors())
    assert largest_relative_difference(grads(model), expected) < 1e-10


def test_in_a_window_a_parameter_in_the_loss_code_is_told(data):
    """It would be asked for its share when the user may have changed what the loss is made of."""
    x, _, u = data
    model = Gaussian().double()
    noise = torch.randn(B, 2).double()

    def run():
        with kondo.gated(model, rate=0.25, window=2):
            gaussian(model(x) + model.log_std.exp() * noise, fixed, u).backward()
            noise.normal_()
            gaussian(model(x), model.log_std, u).backward()

    assert len([message for message in warned(run) if "log_std together" in message]) == 1


def asked(loss, inputs, how):
    """Gradients of some leaves alone, as a program may ask for them."""
    if how == "grad":
        return torch.autograd.grad(loss, inputs)
    loss.backward(inputs=inputs)
    return [leaf.grad for leaf in inputs]


@pytest.mark.parametrize("how", ["grad", "inputs"])
@pytest.mark.parametrize("both", [True, False])
def test_a_leaf_behind_a_parameter_that_is_not_the_models_keeps_its_gradient(how, both, data):
    x, _, u = data
    model, reference = copies(Gaussian().double())
    alpha = torch.full((), 0.3, dtype=torch.float64, requires_grad=True)

    def loss(m):
        return gaussian(m(x), m.log_std * alpha, u)

    def run():
        with kondo.gated(model, rate=0.25):
            found = asked(loss(model), [model.log_std, alpha] if both else [alpha], how)[-1].clone()
        alpha.grad = None
        torch.testing.assert_close(found, torch.autograd.grad(loss(reference), alpha)[0])

    told = [message for message in warned(run) if "log_std together" in message]
    assert len(told) == both


def test_a_parameter_of_one_gate_that_meets_rows_of_another_is_told_and_keeps_its_gradient(data):
    x, _, u = data
    (ours, ours_too), (other, _) = copies(Gaussian().double()), copies(Gaussian().double())

    def run():
        with kondo.gated(ours, rate=0.25) as gate, kondo.gated(other, rate=0.25):
            for _ in range(2):
                ours.zero_grad()
                (gaussian(ours(x), fixed, u) + gaussian(other(x), ours.log_std, u)).backward()
        assert not gate._step.entry._meetings
        gaussian(other(x), ours_too.log_std, u).backward()
        torch.testing.assert_close(ours.log_std.grad, ours_too.log_std.grad)

    assert [message for message in warned(run) if "log_std together" in message]


def test_rows_of_two_calls_that_meet_before_the_parameter_are_told(data):
    x, _, u = data
    model = Gaussian().double()

    def run():
        with kondo.gated(model, rate=0.25, priority="uniform"):
            gaussian(model(x) + 0.1 * model(x + 1), model.log_std, u).backward()

    assert [message for message in warned(run) if "log_std together" in message]


def test_one_parameter_that_cannot_be_split_does_not_keep_others_from_it(data):
    x, _, u = data
    model, reference = copies(Gaussian().double())
    model.other = nn.Parameter(torch.ones(2).double())
    reference.other = nn.Parameter(torch.ones(2).double())

    def run():
        with kondo.gated(model, rate=0.25) as gate:
            (gaussian(model(x), model.log_std, u) + (model(x).flip(0) + model.other).pow(2).mean()).backward()
        w = gate.last.factors()[:B]
        gaussian(reference(x), reference.log_std, u * w).backward()
        torch.testing.assert_close(model.log_std.grad, reference.log_std.grad)

    told = [message for message in warned(run) if "together with its outputs" in message]
    assert len(told) == 1 and "other" in told[0]


def test_a_second_backward_of_a_loss_with_a_parameter_is_autograds_error(data):
    x, _, u = data
    model = Gaussian().double()
    with kondo.gated(model, rate=0.25):
        loss = gaussian(model(x), model.log_std, u)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("retain", [False, True])
def test_the_kept_rows_share_in_a_parameter_of_the_loss_code_by_autograd_grad(retain, data):
    x, _, u = data
    model, reference = copies(Gaussian().double())
    with kondo.gated(model, rate=0.25) as gate:
        loss = gaussian(model(x), model.log_std, u)
        parameters = list(model.parameters())
        for _ in range(1 + retain):
            found = torch.autograd.grad(loss, parameters, None, retain)
    for p, grad in zip(parameters, found, strict=True):
        p.grad = grad
    expected = masked("in_a_density", reference, x, u, gate.last.factors())
    assert largest_relative_difference(grads(model), expected) < 1e-10


def test_a_failed_backward_leaves_nothing_of_a_parameter_in_the_loss_code(data):
    x, _, u = data
    model, reference = copies(Gaussian().double())

    def fail(grad):
        raise ValueError("no")

    with kondo.gated(model, rate=0.25) as gate:
        y = model(x)
        z = y * 1
        z.register_hook(fail)
        with pytest.raises(ValueError, match="no"):
            gaussian(z, model.log_std, u).backward()
        model.zero_grad()
        gaussian(model(x), model.log_std, u).backward()
    expected = masked("in_a_density", reference, x, u, gate.last.factors())
    assert largest_relative_difference(grads(model), expected) < 1e-10


PENALTIES = {
    "weight_decay": lambda m: 0.1 * sum(p.pow(2).sum() for p in m.parameters()),
    "entropy_of_the_std": lambda m: -0.01 * m.log_std.sum(),
    "mean": lambda m: m.log_std.exp().mean() / 3,
}


@pytest.mark.parametrize("name", TOLD)
def test_a_parameter_that_meets_rows_in_the_loss_is_told_once_and_named(name, data):
    x, _, u = data
    model = Gaussian().double()

    def run():
        with kondo.gated(model, rate=0.25):
            for _ in range(2):
                TOLD[name](model, model(x), u).backward()

    (told,) = [message for message in warned(run) if "still reach" in message]
    assert "log_std" in told


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_on_parameters_is_right_as_it_is(name, data):
    x, _, u = data
    model, reference = copies(Gaussian().double())

    def run():
        with kondo.gated(model, rate=0.25) as gate:
            (gaussian(model(x), fixed, u) + PENALTIES[name](model)).backward()
        w = kept_mask(gate.last.kept, B, torch.float64)
        (gaussian(reference(x), fixed, u * w) + PENALTIES[name](reference)).backward()

    assert not [message for message in warned(run) if "still reach" in message]
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


# Heads that the loss code runs on what it detached.


class Headed(nn.Module):
    """Returns hidden states; its head is for the loss."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 4)

    def forward(self, x):
        return self.body(x)


class Bridge(torch.autograd.Function):
    """The loss, with a gradient that is known already."""

    @staticmethod
    def forward(ctx, hidden, grad, loss):
        ctx.save_for_backward(grad)
        return loss.detach()

    @staticmethod
    def backward(ctx, _grad):
        return ctx.saved_tensors[0], None, None


def head_in_chunks(model, x, actions, weights, way):
    hidden, total, found = model(x), 0.0, []
    chunks = [part.detach().requires_grad_() for part in hidden.split(3)]
    parts = zip(chunks, actions.split(3), weights.split(3), strict=True)
    for chunk, a, w in parts:
        scores = chunk if way == "no parameter" else model.head(chunk)
        loss = -(w * scores.log_softmax(-1).gather(1, a[:, None])[:, 0]).sum()
        loss.backward()
        total += loss.detach()
        found.append(chunk.grad)
    grad = torch.cat(found)
    if way == "a function of its own":
        Bridge.apply(hidden, grad, total).backward()
    else:
        (hidden * grad).sum().backward()


@pytest.mark.parametrize("way", ["a function of its own", "a surrogate"])
@pytest.mark.parametrize("options", [{"priority": "uniform", "rate": 0.5}, {"noise": 0.5}, {"window": "step"}], ids=str)
def test_a_head_on_detached_outputs_that_learns_from_all_rows_is_told(options, way):
    torch.manual_seed(0)
    model = Headed().double()
    x, actions, weights = torch.randn(6, 6).double(), torch.randint(4, (6,)), torch.randn(6).double()
    options = {"priority": "uniform", "rate": 0.5, **options} if "window" in options else options
    with (
        pytest.warns(kondo.KondoWarning, match=r"another one gave head\.weight a gradient. It went past the gate"),
        kondo.gated(model, **options),
    ):
        head_in_chunks(model, x, actions, weights, way)


def test_a_head_on_detached_outputs_is_right_where_dropped_rows_are_masked_after_preselect():
    torch.manual_seed(0)
    ours, theirs = copies(Headed().double())
    x, actions, weights = torch.randn(6, 6).double(), torch.randint(4, (6,)), torch.randn(6).double()
    with warnings.catch_warnings(), kondo.gated(ours, rate=0.34) as gate:
        warnings.simplefilter("error")
        factors = gate.preselect(delight=torch.rand(6).double()).factors()
        head_in_chunks(ours, x, actions, weights * factors, "a function of its own")
    head_in_chunks(theirs, x, actions, weights * factors, "a function of its own")
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert gate.stats.forwarded == 2


def test_backwards_that_give_the_model_nothing_are_not_told_of():
    torch.manual_seed(0)
    model, critic = Headed().double(), nn.Linear(6, 1).double()
    x, actions, weights = torch.randn(6, 6).double(), torch.randint(4, (6,)), torch.randn(6).double()
    with warnings.catch_warnings(), kondo.gated(model, rate=0.34, priority="uniform"):
        warnings.simplefilter("error")
        hidden = model(x)
        critic(x).square().mean().backward()
        hidden.sum().backward()
        head_in_chunks(model, x, actions, weights, "no parameter")
