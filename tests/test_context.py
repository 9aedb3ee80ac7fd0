"""What user code does around a gated model: each works exactly, or raises an error that says what to do."""

import contextlib
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal
from torch.utils.checkpoint import checkpoint

import kondo_hooks as kondo
from tests.cases import FEATURES, K, Mlp, PolicyAndValue, ScalarOutput, make_batch
from tests.kernels import cross_entropy
from tests.reference import copies, grads, kept_mask, largest_relative_difference


def reinforce(logits, batch, w=None):
    logp = logits.log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    terms = -batch.advantages * logp
    return (terms if w is None else terms * w).mean()


@pytest.fixture
def setup():
    model, reference = copies(Mlp().double())
    return model, reference, make_batch(12, False, torch.float64)


def check(model, reference, batch, gate, loss=None, tolerance=1e-10):
    w = kept_mask(gate.last.kept, len(batch.x), batch.x.dtype)
    (loss or (lambda m, w: reinforce(m(batch.x), batch, w)))(reference, w).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < tolerance


# Passing through.
def test_a_samplers_calls_are_not_watched(setup):
    model, _, batch = setup
    watching = []
    model.register_forward_hook(lambda *_: watching.append(torch._C._len_torch_function_stack()))
    with kondo.gated(model, rate=0.25):
        with torch.no_grad():
            model(batch.x)
        assert torch._C._len_torch_function_stack() == 1
        reinforce(model(batch.x), batch).backward()
    assert watching[0] == 0


def test_without_grad_the_call_is_the_models_own(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        with torch.no_grad():
            out = model(batch.x)
        with torch.inference_mode():
            model(batch.x)
        reinforce(model(batch.x), batch).backward()
    assert not out.requires_grad
    assert gate.stats.steps == 1


@pytest.mark.parametrize("options", [{"rate": 1.0}, {"rate": 0.1, "warmup_steps": 2}, {"rate": 0.1, "enabled": False}])
def test_passes_straight_through(setup, options):
    model, reference, batch = setup
    with kondo.gated(model, **options) as gate:
        for _ in range(2):
            out = model(batch.x)
            assert "Node" not in out.grad_fn.name()
            reinforce(out, batch).backward()
    for _ in range(2):
        reinforce(reference(batch.x), batch).backward()
    assert largest_relative_difference(grads(model), grads(reference)) == 0
    if options.get("enabled", True):
        assert (gate.stats.steps, gate.stats.rows, gate.stats.forwarded) == (2, 24, 24)


def test_warmup_ends_and_a_schedule_moves(setup):
    model, _, batch = setup
    kept = []
    with kondo.gated(model, rate=lambda step: [1.0, 0.5, 0.25][step], warmup_steps=0) as gate:
        for _ in range(3):
            before = gate.stats.kept
            reinforce(model(batch.x), batch).backward()
            kept.append(gate.stats.kept - before)
    assert kept == [12, 6, 3]


def test_environment_switch(setup, monkeypatch):
    model, _, batch = setup
    monkeypatch.setenv("KONDO_DISABLE", "1")
    with kondo.gated(model, rate=0.1) as gate:
        assert "Node" not in model(batch.x).grad_fn.name()
    assert not gate.enabled


def test_frozen_model_passes_through(setup):
    model, _, batch = setup
    model.requires_grad_(False)
    with kondo.gated(model, rate=0.25):
        assert not model(batch.x).requires_grad


# Populations.


def test_an_episode_of_single_calls_is_one_population_and_one_replay(setup):
    model, reference, batch = setup
    calls = []
    model.body[0].register_forward_hook(lambda m, a, o: calls.append(len(o)))
    with kondo.gated(model, rate=0.25, audit=0) as gate:
        losses = []
        for i in range(12):
            policy = Categorical(logits=model(batch.x[i : i + 1]))
            losses.append(-policy.log_prob(batch.actions[i : i + 1]) * batch.advantages[i])
        torch.cat(losses).sum().backward()
    assert calls == [1] * 12 + [3]
    check(model, reference, batch, gate, lambda m, w: reinforce(m(batch.x), batch, w) * 12)


def test_logits_concatenated_before_the_loss(setup):
    model, reference, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        logits = torch.cat([model(batch.x[:5]), model(batch.x[5:])])
        reinforce(logits, batch).backward()
    check(model, reference, batch, gate)
    expected = -batch.advantages * reference(batch.x).log_softmax(-1)[torch.arange(12), batch.actions]
    torch.testing.assert_close(gate.last.delight, expected.detach())


def test_calls_of_different_lengths_are_one_population():
    from tests.cases import Recurrent

    model, reference = copies(Recurrent(nn.GRU).double())
    short, long = make_batch(6, True, torch.float64, 1, 4), make_batch(6, True, torch.float64, 2, 7)
    with kondo.gated(model, rate=0.5) as gate:
        (reinforce(model(short.x)[0], short) + reinforce(model(long.x)[0], long)).backward()
    assert len(gate.last.kept) == 6
    w = kept_mask(gate.last.kept, 12, torch.float64).unsqueeze(1)
    (reinforce(reference(short.x)[0], short, w[:6]) + reinforce(reference(long.x)[0], long, w[6:])).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_a_shared_input_is_not_cut_even_where_its_size_is_the_batch_size():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(FEATURES, K)

        def forward(self, scale, x, mask):
            return self.layer((mask @ x).mean(1) * scale)

    model, reference = copies(Masked().double())
    batch = make_batch(5, True, torch.float64)  # B == T == 5
    batch.actions, batch.advantages = batch.actions[:, 0], batch.advantages[:, 0]
    mask, scale = torch.randn(5, 5).double(), torch.randn(FEATURES).double()
    with kondo.gated(model, rate=0.4) as gate:
        for _ in range(2):
            reinforce(model(scale, batch.x, mask), batch).backward()
    check(model, reference, batch, gate, lambda m, w: 2 * reinforce(m(scale, batch.x, mask), batch, w))


def test_batch_axis_can_be_named():
    model, reference = copies(nn.LSTM(FEATURES, K).double())  # time first
    batch = make_batch(8, True, torch.float64)
    x = batch.x.transpose(0, 1).contiguous()

    def loss(m, w=None):
        logp = m(x)[0].log_softmax(-1).gather(-1, batch.actions.T.unsqueeze(-1)).squeeze(-1)
        terms = -batch.advantages.T * logp
        return (terms if w is None else terms * w).mean()

    with kondo.gated(model, rate=0.25, batch_dim=1) as gate:
        loss(model).backward()
    assert gate.last.delight.shape == (8,)
    check(model, reference, batch, gate, loss)
    logp = reference(x)[0].log_softmax(-1).gather(-1, batch.actions.T.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(gate.last.delight, (-batch.advantages.T * logp).sum(0).detach())


# Inputs that want a gradient.


def test_input_gradients_are_right_and_decided_at_once(setup):
    model, reference, batch = setup
    encoder, encoder_reference = copies(nn.Linear(FEATURES, FEATURES).double())
    with kondo.gated(model, rate=0.25) as gate:
        reinforce(model(encoder(batch.x)), batch).backward()
    w = kept_mask(gate.last.kept, 12, torch.float64)
    reinforce(reference(encoder_reference(batch.x)), batch, w).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    assert largest_relative_difference(grads(encoder), grads(encoder_reference)) < 1e-10


def test_autograd_grad_of_an_input_alone_is_that_of_all_rows_and_leaves_the_parameters_alone(setup):
    model, reference, batch = setup
    x = batch.x.clone().requires_grad_()
    with kondo.gated(model, rate=0.25) as gate:
        (found,) = torch.autograd.grad(reinforce(model(x), batch), [x])
    assert gate.last is None and gate.stats.steps == 0
    y = batch.x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reinforce(reference(y), batch), [y])
    torch.testing.assert_close(found, expected)
    assert all(p.grad is None for p in model.parameters())


# What a loss may do.


def test_outputs_changed_in_place(setup):
    model, reference, batch = setup

    def loss(m, w=None):
        logits = m(batch.x)
        logits.div_(1.7)
        logits[:, 2] = -1e3
        return reinforce(logits, batch, w)

    batch.actions[batch.actions == 2] = 0
    with kondo.gated(model, rate=0.25) as gate:
        for _ in range(2):
            loss(model).backward()
    check(model, reference, batch, gate, lambda m, w: loss(m, w) * 2)


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("step", [lambda y: y, lambda y: y.view(-1, K), lambda y: y.squeeze()])
def test_a_kernel_that_puts_its_gradient_in_the_logits_place(setup, place, window, step):
    model, reference, batch = setup

    def loss(m, place=None, w=1):
        return (cross_entropy(step(m(batch.x)), batch.actions, place) * batch.advantages * w).mean()

    for _ in range(2):  # the second time it is known to do so
        model.zero_grad(), reference.zero_grad()
        with kondo.gated(model, rate=0.25, window=window) as gate:
            for _ in range(window):
                loss(model, place).backward()
        every = gate.last.factors().double().split(12)
        for w in every:
            loss(reference, None, w).backward()
        assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    logp = reference(batch.x).log_softmax(-1).gather(1, batch.actions[:, None])[:, 0]
    assert torch.allclose(gate.last.delight[:12], -(batch.advantages * logp).detach())


def test_retain_graph_and_a_second_backward(setup):
    model, reference, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        loss = reinforce(model(batch.x), batch)
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert gate.stats.steps == 2
    check(model, reference, batch, gate, lambda m, w: 2 * reinforce(m(batch.x), batch, w))


def test_freed_graph_raises_even_if_the_loss_saves_nothing(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25, logits=0):
        out = model(batch.x)
        loss = reinforce(out, batch)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            out.sum().backward()


def test_autograd_grad_on_parameters(setup):
    model, reference, batch = setup
    parameters = list(model.parameters())
    with kondo.gated(model, rate=0.25) as gate:
        loss = reinforce(model(batch.x), batch) + 0.1 * parameters[0].pow(2).sum()
        found = torch.autograd.grad(loss, parameters)
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(reinforce(model(batch.x), batch), [*parameters, torch.zeros(1, requires_grad=True)])
    w = kept_mask(gate.last.kept, 12, torch.float64)
    theirs = list(reference.parameters())
    expected = torch.autograd.grad(reinforce(reference(batch.x), batch, w) + 0.1 * theirs[0].pow(2).sum(), theirs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("functional", [True, False])
def test_backward_into_some_parameters(setup, functional):
    model, reference, batch = setup
    some = [model.body[3].weight]
    with kondo.gated(model, rate=0.25) as gate:
        loss = reinforce(model(batch.x), batch)
        if functional:
            torch.autograd.backward(loss, inputs=some)
        else:
            loss.backward(inputs=some)
    w = kept_mask(gate.last.kept, 12, torch.float64)
    reinforce(reference(batch.x), batch, w).backward(inputs=[reference.body[3].weight])
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_double_backward_is_refused(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25):
        loss = reinforce(model(batch.x), batch)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            loss.backward(create_graph=True)
        loss = reinforce(model(batch.x), batch)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    assert all(p.grad is None for p in model.parameters())


def test_functorch_is_refused(setup):
    model, _, batch = setup
    parameters = dict(model.named_parameters())
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda p: reinforce(torch.func.functional_call(model, p, batch.x), batch))(parameters)


def test_loss_of_some_outputs_and_an_unused_call():
    model, reference = copies(PolicyAndValue().double())
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25) as gate:
        model(batch.x)
        reinforce(model(batch.x)[0], batch).backward()
    assert len(gate.last.delight) == 12
    w = kept_mask(gate.last.kept, 12, torch.float64)
    reinforce(reference(batch.x)[0], batch, w).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_integer_outputs_and_none_come_back_as_they_are(setup):
    model = PolicyAndValue().double()
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25):
        logits, _value, best, nothing = model(batch.x)
    assert best.dtype == torch.int64 and not best.requires_grad and nothing is None
    assert logits.requires_grad


def test_scalar_output_with_a_gradient_is_refused():
    model = ScalarOutput().double()
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25):
        logits, aux = model(batch.x)
        with pytest.raises(RuntimeError, match=r"tensor that mean makes the model's 1 of has no row for each sample"):
            (reinforce(logits, batch) + aux).backward()
    assert all(p.grad is None for p in model.parameters())


def test_nothing_kept_gives_zero_and_not_none(setup):
    model, _, batch = setup
    with kondo.gated(model, price=1e6) as gate:
        reinforce(model(batch.x), batch).backward()
    assert len(gate.last.kept) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# Delight that has to be told.


class TwoActions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, 2)

    def forward(self, x):
        return self.layer(x)


def test_two_actions_seen_in_the_loss():
    model = TwoActions().double()
    batch = make_batch(12, False, torch.float64)
    batch.actions %= 2
    with kondo.gated(model, rate=0.25) as gate:
        logits = model(batch.x)
        reinforce(logits, batch).backward()
    expected = -batch.advantages * logits.log_softmax(-1)[torch.arange(12), batch.actions]
    torch.testing.assert_close(gate.last.delight, expected.detach())


@pytest.mark.parametrize("tail", [(2,), (3,)], ids=["two_actions", "two_likely_actions_of_three"])
def test_ambiguous_gradient_at_the_logits(tail):
    """Raising one log-prob and lowering the other give the same gradient: nothing may be guessed."""
    logits = torch.zeros(4, *tail, dtype=torch.float64)
    if tail == (3,):
        logits[:, 2] = -2000.0
    model, x = nn.Linear(4, tail[0], bias=False).double(), torch.eye(4).double()
    model.weight.data = logits.T.clone()
    one_hot = F.one_hot(torch.tensor([0, 1, 0, 1]), tail[0])
    with kondo.gated(model, rate=0.5) as gate:
        loss = -(model(x).log_softmax(-1) * one_hot).sum(-1).mean()
        with pytest.raises(kondo.DelightError, match=r"gate\.logp"):
            loss.backward()
        assert model.weight.grad is None
        gate.logp((model(x).log_softmax(-1) * one_hot).sum(-1)).mean().neg().backward()
    torch.testing.assert_close(gate.last.delight, torch.full((4,), 2.0).log().double())


def test_action_among_two_likely_ones_is_told_by_the_third():
    model = nn.Linear(4, 3, bias=False).double()
    x = torch.eye(4).double()
    model.weight.data = torch.tensor([[1.0, 0.0, -25.0]] * 4).double().T.clone()
    actions = torch.tensor([0, 1, 0, 1])
    advantages = torch.tensor([1.0, 2.0, -3.0, -4.0]).double()
    with kondo.gated(model, rate=0.5) as gate:
        logp = model(x).log_softmax(-1)
        (-(logp * F.one_hot(actions, 3)).sum(-1) * advantages).mean().backward()
    torch.testing.assert_close(gate.last.delight, -advantages * logp[torch.arange(4), actions].detach())


def test_bernoulli_policy():
    model = nn.Sequential(nn.Linear(FEATURES, 3)).double()
    batch = make_batch(12, False, torch.float64)
    acts = torch.randint(0, 2, (12, 3)).double()
    with kondo.gated(model, rate=0.25) as gate:
        logits = model(batch.x)
        logp = Bernoulli(logits=logits).log_prob(acts).sum(-1)
        (-logp * batch.advantages).mean().backward()
    torch.testing.assert_close(gate.last.delight, (-logp * batch.advantages).detach())


def test_gaussian_policy_needs_one_line():
    class Gaussian(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Linear(FEATURES, 3)
            self.log_std = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            mean = self.mean(x)
            return mean, self.log_std.expand_as(mean)

    model, reference = copies(Gaussian().double())
    batch = make_batch(12, False, torch.float64)
    acts = torch.randn(12, 3).double()

    def logp(m):
        mean, log_std = m(batch.x)
        return Normal(mean, log_std.exp()).log_prob(acts).sum(-1)

    with kondo.gated(model, rate=0.25) as gate:
        with pytest.raises(kondo.DelightError, match=r"gate\.logp"):
            written_out = -((model(batch.x)[0] - acts) ** 2).sum(-1)
            (-written_out * batch.advantages).mean().backward()
        (-gate.logp(logp(model)) * batch.advantages).mean().backward()
    torch.testing.assert_close(gate.last.delight, (-logp(reference) * batch.advantages).detach())
    check(model, reference, batch, gate, lambda m, w: (-logp(m) * batch.advantages * w).mean())


def test_logp_of_the_policy_term_alone_is_pure_of_a_kl_on_the_same_logp(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        logp = model(batch.x).log_softmax(-1).gather(1, batch.actions[:, None]).squeeze(1)
        k3 = (batch.old_logp - logp).exp() - (batch.old_logp - logp) - 1
        (-gate.logp(logp) * batch.advantages + 0.5 * k3).mean().backward()
    torch.testing.assert_close(gate.last.delight, -(logp * batch.advantages).detach())


@pytest.mark.parametrize("seen", [True, False], ids=["gather", "one_hot"])
@pytest.mark.parametrize("name", ["pi", 0, lambda out: out["pi"]], ids=["field", "index", "function"])
def test_an_output_can_be_named(name, seen):
    """An auxiliary head has log-probs too; the named output alone counts."""

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.pi, self.other = nn.Linear(FEATURES, K), nn.Linear(FEATURES, K)

        def forward(self, x):
            heads = self.pi(x), self.other(x)
            return heads if name == 0 else dict(zip(("pi", "other"), heads, strict=True))

    model = TwoHeads().double()
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25, logits=name) as gate:
        out = model(batch.x)
        pi, other = (out[0], out[1]) if name == 0 else (out["pi"], out["other"])

        def log_prob(logits):
            if seen:
                return Categorical(logits=logits).log_prob(batch.actions)
            return (logits.log_softmax(-1) * F.one_hot(batch.actions, K)).sum(-1)

        logp = log_prob(pi)
        (-(logp * batch.advantages).mean() - log_prob(other).mean()).backward()
    torch.testing.assert_close(gate.last.delight, -(logp * batch.advantages).detach())


def test_a_name_that_is_no_output_is_refused(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25, logp="nonsense"), pytest.raises(ValueError, match="logp='nonsense'"):
        model(batch.x)


def test_regression_is_refused_and_a_q_value_is_not_taken_for_a_logit(setup):
    model, _, batch = setup
    target = torch.randn(12, K).double()
    with kondo.gated(model, rate=0.25):
        with pytest.raises(kondo.DelightError, match="no policy was found"):
            F.mse_loss(model(batch.x), target).backward()
        q = model(batch.x).gather(1, batch.actions[:, None]).squeeze(1)
        with pytest.raises(kondo.DelightError, match="no policy was found"):
            F.mse_loss(q, batch.returns).backward()
    assert all(p.grad is None for p in model.parameters())


def test_loss_far_from_a_policy_gradient_warns_once_with_the_residual(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25), pytest.warns(kondo.KondoWarning, match=r"\d+% of its gradient") as caught:
        for _ in range(3):
            logp = model(batch.x).log_softmax(-1)
            pg = -((logp * F.one_hot(batch.actions, K)).sum(-1) * batch.advantages).mean()
            (pg + 5.0 * (logp.exp() * logp).sum(-1).mean()).backward()
    assert len(caught) == 1


# What the replay must see again.


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning")
def test_activation_checkpointing_with_dropout(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(FEATURES, 16)
            self.block = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.2))
            self.head = nn.Linear(16, K)

        def forward(self, x):
            return self.head(checkpoint(self.block, self.embed(x), use_reentrant=use_reentrant))

    model, reference = copies(Checkpointed().double())
    batch = make_batch(12, False, torch.float64)
    state = torch.get_rng_state()
    with kondo.gated(model, rate=0.25) as gate:
        reinforce(model(batch.x), batch).backward()
    assert gate.stats.forwarded == 3
    torch.set_rng_state(state)
    check(model, reference, batch, gate)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(FEATURES, 16)
        self.head = nn.Linear(16, K)

    def forward(self, x):
        h = self.embed(x).unflatten(-1, (2, 8)).transpose(1, 2)
        noise = torch.randn(len(x), 1, 1, 1, dtype=x.dtype) * 0.1 + torch.rand_like(h) * 0.1
        h = F.scaled_dot_product_attention(h, h, h, dropout_p=0.3 if self.training else 0.0) + noise
        return self.head(F.alpha_dropout(h.transpose(1, 2).flatten(2).mean(1), 0.2, self.training))


def test_dropout_inside_attention_and_other_random_numbers():
    model, reference = copies(Attention().double())
    batch = make_batch(12, True, torch.float64)
    batch.actions, batch.advantages = batch.actions[:, 0], batch.advantages[:, 0]
    state = torch.get_rng_state()
    with kondo.gated(model, rate=0.25) as gate:
        reinforce(model(batch.x), batch).backward()
    after = torch.get_rng_state()
    assert gate.stats.forwarded == 3
    torch.set_rng_state(state)
    check(model, reference, batch, gate)
    assert torch.equal(after, torch.get_rng_state())


def test_randomness_that_comes_late_is_recorded_and_exact(setup):
    """A model that drew nothing so far is not watched; the call that surprises is screened once more."""
    model, reference = copies(Mlp(0.5).double())
    batch = make_batch(12, False, torch.float64)
    model.eval()
    with kondo.gated(model, rate=0.25) as gate:
        reinforce(model(batch.x), batch).backward()
        model.zero_grad()
        model.train()
        state = torch.get_rng_state()
        reinforce(model(batch.x), batch).backward()
        torch.set_rng_state(state)
        check(model, reference, batch, gate)
        reinforce(model(batch.x), batch).backward()
    assert gate.stats.forwarded == 3 + 3 + 3


def test_training_mode_is_that_of_the_call():
    model, reference = copies(Mlp(0.5).double())
    batch = make_batch(12, False, torch.float64)
    state = torch.get_rng_state()
    with kondo.gated(model, rate=0.25) as gate:
        loss = reinforce(model(batch.x), batch)
        model.eval()
        loss.backward()
    assert not model.training and not model.body[2].training
    torch.set_rng_state(state)
    check(model, reference, batch, gate)


def test_cpu_autocast():
    model, reference = copies(Mlp())
    batch = make_batch(12, False, torch.float32)
    with kondo.gated(model, rate=0.25) as gate:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch.x)
        assert out.dtype == torch.bfloat16
        reinforce(out.float(), batch).backward()

    def loss(m, w):
        with torch.autocast("cpu", torch.bfloat16):
            out = m(batch.x)
        return reinforce(out.float(), batch, w)

    check(model, reference, batch, gate, loss, tolerance=2e-2)


def test_grad_scaler(setup):
    model, reference, batch = setup
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with kondo.gated(model, rate=0.25) as gate:
        scaler.scale(reinforce(model(batch.x), batch)).backward()
        scaler.unscale_(optimizer)
    check(model, reference, batch, gate)
    expected = -batch.advantages * reference(batch.x).log_softmax(-1)[torch.arange(12), batch.actions]
    torch.testing.assert_close(gate.last.delight, expected.detach())


def test_grad_scaler_sees_an_overflow_in_half_precision():
    model = nn.Linear(FEATURES, K)
    batch = make_batch(12, False, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model.state_dict())
    with kondo.gated(model, rate=0.25):
        with torch.autocast("cpu", torch.float16):
            out = model(batch.x)
        scaler.scale(reinforce(out.float(), batch)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**29
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["wrapper", "method"])
def test_compiled_models(setup, mode):
    model, reference, batch = setup
    compiled = torch.compile(model, backend="aot_eager") if mode == "wrapper" else model
    if mode == "method":
        model.compile(backend="aot_eager")
    with kondo.gated(compiled, rate=0.25) as gate:
        for _ in range(2):
            reinforce(compiled(batch.x), batch).backward()
    assert gate.stats.forwarded == 6
    check(model, reference, batch, gate, lambda m, w: 2 * reinforce(m(batch.x), batch, w))


def test_a_compiled_model_with_dropout():
    model, reference = copies(Mlp(0.5).double())
    batch = make_batch(12, False, torch.float64)
    compiled = torch.compile(model, backend="aot_eager")
    with kondo.gated(compiled, rate=0.25) as gate:
        for _ in range(2):
            model.zero_grad()
            state = torch.get_rng_state()
            reinforce(compiled(batch.x), batch).backward()
    torch.set_rng_state(state)
    check(model, reference, batch, gate)


@pytest.mark.parametrize("part", ["forward_and_loss", "whole_step", "inductor"])
def test_a_gated_model_called_from_compiled_code_is_gated(setup, part):
    """Dynamo must not trace past the gate into the model."""
    model, reference, batch = setup

    def loss():
        return reinforce(model(batch.x), batch)

    def step():
        loss().backward()

    backend = "inductor" if part == "inductor" else "aot_eager"
    compiled = torch.compile(step if part == "whole_step" else loss, backend=backend)
    with kondo.gated(model, rate=0.25) as gate:
        for _ in range(2):
            compiled() if part == "whole_step" else compiled().backward()
    assert gate.stats.forwarded == 6
    check(model, reference, batch, gate, lambda m, w: 2 * reinforce(m(batch.x), batch, w))


def test_compiled_loss_is_read_off_the_boundary(setup):
    model, reference, batch = setup
    loss = torch.compile(lambda logits: reinforce(logits, batch), backend="aot_eager")
    with kondo.gated(model, rate=0.25) as gate:
        loss(model(batch.x)).backward()
    check(model, reference, batch, gate)
    expected = -batch.advantages * reference(batch.x).log_softmax(-1)[torch.arange(12), batch.actions]
    torch.testing.assert_close(gate.last.delight, expected.detach())


def test_compiling_inside_the_context_is_refused(setup):
    model, _, _batch = setup
    with pytest.raises(RuntimeError, match=r"call model\.compile\(\) before the context"), kondo.gated(model):
        model.compile(backend="eager")


def test_complex_and_integer_inputs():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(FEATURES, K, dtype=torch.complex128)
            self.embed = nn.Embedding(K, K, dtype=torch.float64)

        def forward(self, z, ids):
            z = self.mix(z)
            return z.abs() + self.embed(ids).sum(1), z

    model, reference = copies(Spectral())
    batch = make_batch(12, False, torch.float64)
    z = torch.complex(batch.x, batch.x.flip(0))

    def loss(m, w=None):
        logits, spectrum = m(z, batch.ids)
        penalty = spectrum.abs().pow(2).sum(1)
        return reinforce(logits, batch, w) + 0.1 * (penalty if w is None else penalty * w).mean()

    with kondo.gated(model, rate=0.25) as gate:
        loss(model).backward()
    check(model, reference, batch, gate, loss)


def test_frozen_and_shared_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(K, 8)
            self.middle = nn.Linear(8, 8)
            self.head = nn.Linear(8, K, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.middle(self.embed(ids)).mean(1))

    model, reference = copies(Tied().double())
    for m in (model, reference):
        m.middle.weight.requires_grad_(False)
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25) as gate:
        reinforce(model(batch.ids), batch).backward()
    check(model, reference, batch, gate, lambda m, w: reinforce(m(batch.ids), batch, w))


# What cannot be replayed.


def test_a_layer_that_mixes_samples_is_caught():
    class Centered(Mlp):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    model = Centered().double()
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25) as gate:
        loss = reinforce(model(batch.x), batch)
        with pytest.raises(kondo.ReplayMismatchError, match=r"changed the output by up to .* other rows of the batch"):
            loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert gate.stats.steps == 0


def test_input_overwritten_before_the_backward(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25):
        loss = reinforce(model(batch.x), batch)
        batch.x.zero_()
        with pytest.raises(kondo.ReplayMismatchError, match=r"input args\[0\] was modified in place"):
            loss.backward()


def test_parameters_changed_before_the_backward(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25):
        loss = reinforce(model(batch.x), batch)
        with torch.no_grad():
            model.body[0].weight.mul_(2)
        with pytest.raises(kondo.ReplayMismatchError, match="parameters were changed"):
            loss.backward()


def test_unbatched_calls_say_so():
    model = nn.Linear(FEATURES, K).double()
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match=r"x\[None\]"):
        (-model(batch.x[0]).log_softmax(-1)[0]).backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_delight(setup, bad):
    model, _, batch = setup
    batch.advantages[4] = bad
    with kondo.gated(model, rate=0.25) as gate:
        with pytest.raises(ValueError, match=r"NaN or infinite in 1 of 12 samples \(first: 4\)"):
            reinforce(model(batch.x), batch).backward()
        assert gate.stats.steps == 0
    assert all(p.grad is None for p in model.parameters())


def test_empty_batch(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25), pytest.raises(ValueError, match="empty batch"):
        model(batch.x[:0])


def test_stateful_normaliser_updates_once():
    class Normaliser(Mlp):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return super().forward(x) / self.count

    model, reference = copies(Normaliser().double())
    batch = make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25) as gate:
        for _ in range(2):
            model.zero_grad()
            reinforce(model(batch.x), batch).backward()
    assert model.count == 2
    reference(batch.x)
    check(model, reference, batch, gate)


# The module while the context is open, and after it.


def test_copies_and_pickles_inside_the_context_are_not_gated(setup):
    model, _, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        for other in others:
            reinforce(other(batch.x), batch).backward()
            assert other.state_dict().keys() == model.state_dict().keys()
        assert gate.stats.steps == 0
        reinforce(model(batch.x), batch).backward()
    assert gate.stats.steps == 1


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = PolicyAndValue()

    def act(self, x, action=None):
        logits, value, *_ = self.net(x)
        policy = Categorical(logits=logits)
        action = policy.sample() if action is None else action
        return action, policy.log_prob(action), policy.entropy(), value


def test_method_of_an_agent():
    model, reference = copies(Agent().double())
    batch = make_batch(12, False, torch.float64)

    def loss(m, w=None):
        _, logp, entropy, value = m.act(batch.x, batch.actions)
        ratio = (logp - logp.detach()).exp()
        terms = -ratio * batch.advantages - 0.01 * entropy + 0.5 * (value - batch.returns) ** 2
        return (terms if w is None else terms * w).mean()

    with kondo.gated(model, rate=0.25, method="act", logp=1) as gate:
        with torch.no_grad():
            model.act(batch.x)
        loss(model).backward()
        clone, restored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        loss(clone).backward()
        loss(restored).backward()
    assert gate.stats.steps == 1
    assert "act" not in model.__dict__
    check(model, reference, batch, gate, loss)
    logp = reference.act(batch.x, batch.actions)[1]
    torch.testing.assert_close(gate.last.delight, (-logp * batch.advantages).detach())


def test_nested_contexts(setup):
    model, reference, batch = setup
    other, other_reference = copies(Mlp().double())
    with kondo.gated(model, rate=0.25) as gate, kondo.gated(other, rate=0.5) as second:
        (reinforce(model(batch.x), batch) + reinforce(other(batch.x), batch)).backward()
        for inner in (model, model.body):
            with pytest.raises(RuntimeError, match="already inside a gated context"), kondo.gated(inner):
                pass
    check(model, reference, batch, gate)
    check(other, other_reference, batch, second)


def state_of(model):
    names = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_backward_hooks")
    hooks = [[list(getattr(m, name)) for name in names] for m in model.modules()]
    return [sorted(m.__dict__) for m in model.modules()], hooks, torch._C._len_torch_function_stack()


class BoomError(Exception):
    pass


@pytest.mark.parametrize("stage", ["forward", "loss", "backward", "replay", "after"])
def test_an_exception_at_any_stage_leaves_no_trace(setup, stage):
    model, reference, batch = setup
    before = state_of(model)
    armed = []

    def explode(*_):
        if armed:
            raise BoomError

    with contextlib.ExitStack() as stack:
        if stage == "forward":
            armed.append(True)
        handle = model.body[0].register_forward_pre_hook(explode)
        stack.callback(handle.remove)
        # What a replay raises says that it is the gate's replay, and holds what the model raised.
        expected = kondo.ReplayMismatchError if stage == "replay" else BoomError
        with pytest.raises(expected) as raised, kondo.gated(model, rate=0.25) as gate:
            out = model(batch.x)
            if stage == "backward":
                out.register_hook(explode)
                armed.append(True)
            loss = reinforce(out, batch)
            if stage == "loss":
                raise BoomError
            if stage == "replay":
                armed.append(True)
            loss.backward()
            raise BoomError
    assert isinstance(raised.value if stage != "replay" else raised.value.__cause__, BoomError)
    assert state_of(model) == before
    if stage != "after":
        assert all(p.grad is None for p in model.parameters())
        assert gate.stats.steps == 0
    model.zero_grad()
    with kondo.gated(model, rate=0.25) as gate:
        reinforce(model(batch.x), batch).backward()
    check(model, reference, batch, gate)


def test_nothing_is_left_in_memory():
    model, batch = Mlp().double(), make_batch(12, False, torch.float64)
    with kondo.gated(model, rate=0.25) as gate:
        unused = model(batch.x)
        out = model(batch.x)
        call = weakref.ref(out.grad_fn.kondo_call)
        idle = weakref.ref(unused.grad_fn.kondo_call)
        reinforce(out, batch).backward()
        assert call().inputs == [] and call().outputs == []
        del out, unused
    gc.collect()
    assert call() is None and idle() is None
    refs = [weakref.ref(model), weakref.ref(gate)]
    del model, gate
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_calls_are_freed_without_the_garbage_collector(setup):
    model, _, batch = setup
    gc.disable()
    try:
        with kondo.gated(model, rate=0.25):
            out = model(batch.x)
            loss = reinforce(out, batch)
            call = weakref.ref(out.grad_fn.kondo_call)
            loss.backward()
            del out, loss
            assert call() is None
    finally:
        gc.enable()


def test_backward_after_the_context_is_still_gated(setup):
    model, reference, batch = setup
    with kondo.gated(model, rate=0.25) as gate:
        loss = reinforce(model(batch.x), batch)
    loss.backward()
    check(model, reference, batch, gate)


def test_a_context_in_which_nothing_was_called_warns(setup):
    model, _, batch = setup
    with pytest.warns(kondo.KondoWarning, match="never called with grad"), kondo.gated(nn.Sequential(model)):
        reinforce(model(batch.x), batch).backward()


def test_users_own_function_mode_keeps_working(setup):
    model, reference, batch = setup
    with kondo.gated(model, rate=0.25) as gate, torch.device("cpu"):
        reinforce(model(batch.x), batch).backward()
    check(model, reference, batch, gate)


def test_training_under_anomaly_detection_and_hooks_on_outputs(setup):
    model, reference, batch = setup
    seen = []
    with kondo.gated(model, rate=0.25) as gate, torch.autograd.detect_anomaly(check_nan=True):
        out = model(batch.x)
        out.retain_grad()
        out.register_hook(lambda g: seen.append(g.shape))
        reinforce(out, batch).backward()
    assert seen == [(12, K)] and out.grad.shape == (12, K)
    check(model, reference, batch, gate)
