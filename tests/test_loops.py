"""Loops that real users write: exact, or told; and delight scored on the right rows, whatever the loss's shape."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import kondo_hooks as kondo
from tests.cases import FEATURES, K, Mlp, make_batch
from tests.reference import copies, grads, kept_mask, largest_relative_difference
from tests.test_context import check, reinforce


def pick(logits, actions):
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


@pytest.fixture
def batch():
    return make_batch(12, False, torch.float64)


# State that leaves the model by a side door.


def test_tensors_left_in_attributes_have_their_gradient_and_are_put_back(batch):
    class Auxiliary(Mlp):
        def forward(self, x):
            self.aux = self.body[0](x).pow(2).sum(1)
            return super().forward(x)

    model, reference = copies(Auxiliary().double())
    with kondo.gated(model, rate=0.25) as gate:
        (reinforce(model(batch.x), batch) + model.aux.mean()).backward()
    assert len(model.aux) == 12
    check(model, reference, batch, gate, lambda m, w: reinforce(m(batch.x), batch, w) + (m.aux * w).mean())


def test_forward_hooks_are_told_that_they_see_no_graph(batch):
    model, seen = Mlp().double(), []
    model.body[0].register_forward_hook(lambda module, args, output: seen.append(output))
    gate = kondo.gated(model, rate=0.25, audit=0)
    with gate, pytest.warns(kondo.KondoWarning, match="forward hooks") as caught:
        for _ in range(2):
            reinforce(model(batch.x), batch).backward()
    assert len(caught) == 1 and [len(output) for output in seen] == [12, 3, 12, 3]


def test_a_mask_of_large_values_does_not_hide_a_layer_that_mixes_rows(batch):
    class Masked(nn.Module):
        def __init__(self, mixes):
            super().__init__()
            self.layer, self.mixes = nn.Linear(FEATURES, K), mixes

        def forward(self, x, legal):
            return self.layer(x - x.mean(0) if self.mixes else x).masked_fill(~legal, -1e9)

    legal = torch.rand(12, K) > 0.3
    legal[torch.arange(12), batch.actions] = True
    model, reference = copies(Masked(False).double())
    with kondo.gated(model, rate=0.25) as gate:
        reinforce(model(batch.x, legal), batch).backward()
    check(model, reference, batch, gate, lambda m, w: reinforce(m(batch.x, legal), batch, w))
    model = Masked(True).double()
    with kondo.gated(model, rate=0.25), pytest.raises(kondo.ReplayMismatchError):
        reinforce(model(batch.x, legal), batch).backward()


@pytest.mark.parametrize("first", [True, False], ids=["screen", "hook"])
def test_a_zero_initialised_path_does_not_hide_a_wrong_reading_of_the_batch_axis(first):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position = nn.Embedding(K, 8), nn.Embedding(32, 8)
            self.head = nn.Linear(8, K)
            nn.init.zeros_(self.position.weight)

        def forward(self, ids, position_ids):
            return self.head((self.token(ids) + self.position(position_ids)).tanh())

    model, reference = copies(Positions().double())
    batch = make_batch(8, True, torch.float64, length=8)
    positions = torch.arange(8)[None]

    def loss(m, w=None):
        terms = -pick(m(batch.ids, positions), batch.actions) * batch.advantages
        return (terms if w is None else terms * w.unsqueeze(1)).mean()

    with kondo.gated(model, rate=0.03) as gate:
        if first:
            gate.preselect(delight=torch.arange(8.0))
        loss(model).backward()
    loss(reference, kept_mask(gate.last.kept, 8, torch.float64)).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_parameters_put_in_from_outside_are_refused(batch):
    model = Mlp().double()
    delta = {name: torch.zeros_like(p, requires_grad=True) for name, p in model.named_parameters()}
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match="functional_call"):
        swapped = {name: p.detach() + delta[name] for name, p in model.named_parameters()}
        torch.func.functional_call(model, swapped, (batch.x,))
    with kondo.gated(model, rate=1.0):
        reinforce(torch.func.functional_call(model, swapped, (batch.x,)), batch).backward()
    assert all(d.grad is not None for d in delta.values())
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match="before the context"):
        model.body[3] = nn.Linear(16, K).double()
        model(batch.x)


def test_parametrised_weights_are_exact_and_their_cache_is_refused(batch):
    model = Mlp().double()
    parametrizations.weight_norm(model.body[0])
    model, reference = copies(model)
    with kondo.gated(model, rate=0.25) as gate:
        reinforce(model(batch.x), batch).backward()
        with parametrize.cached(), pytest.raises(RuntimeError, match="cached"):
            model(batch.x)
    check(model, reference, batch, gate)


def test_a_recurrent_state_between_calls_is_told(batch):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRUCell(FEATURES, 8), nn.Linear(8, K)

        def forward(self, x, hidden):
            hidden = self.cell(x, hidden)
            return self.head(hidden), hidden

    model, hidden, total = Step().double(), torch.zeros(12, 8).double(), 0
    with kondo.gated(model, rate=0.25), pytest.warns(kondo.KondoWarning, match="recurrent state") as caught:
        for _ in range(3):
            logits, hidden = model(batch.x, hidden)
            total = total + reinforce(logits, batch)
        total.backward()
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2 and "recurrent state" in told[0] and "holds no policy" in told[1]


def test_buffers_that_change_first_at_a_later_call_change_once(batch):
    class Counting(Mlp):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.tensor(0))
            self.counts = False

        def forward(self, x):
            self.seen += len(x) * self.counts
            return super().forward(x)

    model = Counting().double()
    with kondo.gated(model, rate=0.25):
        for model.counts in (False, True, True):
            reinforce(model(batch.x), batch).backward()
    assert model.seen == 24


def test_checkpointing_after_the_same_seed_twice():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(FEATURES, 16), nn.Linear(16, K)
            self.block = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.4))

        def forward(self, x):
            return self.head(checkpoint(self.block, self.embed(x), use_reentrant=False))

    model, reference = copies(Checkpointed().double())
    batch = make_batch(12, False, torch.float64)

    def loss(m, w=None):
        total = 0
        for rows in (slice(0, 6), slice(6, 12)):
            torch.manual_seed(7)
            part = batch.rows(rows)
            total = total + reinforce(m(part.x), part, None if w is None else w[rows])
        return total

    with kondo.gated(model, rate=0.34) as gate:
        loss(model).backward()
    check(model, reference, batch, gate, loss)


def test_a_model_that_returns_its_parameter_is_left_clean():
    class LogStd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.log_std = nn.Linear(FEATURES, 2), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.mean(x), self.log_std

    model, batch = LogStd().double(), make_batch(12, False, torch.float64)

    def loss():
        mean, log_std = model(batch.x)
        return -(Normal(mean, log_std.exp()).log_prob(torch.zeros(12, 2)).sum(-1) * batch.advantages).mean()

    with kondo.gated(model, rate=0.25) as gate:
        gate.preselect(delight=batch.advantages)
        with pytest.raises(RuntimeError, match="no batch axis"):
            loss().backward()
    with kondo.gated(model, rate=1.0) as gate:
        for _ in range(3):
            loss().backward()
    assert gate.stats.rows == 36 and not model.log_std._backward_hooks
    loss().backward()


def test_contexts_closed_out_of_order_leave_no_mode_behind(batch):
    first, second = kondo.gated(Mlp().double(), rate=0.25), kondo.gated(Mlp().double(), rate=0.25)
    before = torch._C._len_torch_function_stack()
    for gate in (first, second):
        gate.__enter__()
        reinforce(gate.model(batch.x), batch).backward()
    first.__exit__(None, None, None)
    reinforce(second.model(batch.x), batch).backward()
    assert second.stats.steps == 2 and first.stats.steps == 1
    second.__exit__(None, None, None)
    assert torch._C._len_torch_function_stack() == before


def test_sampling_inside_the_gated_call():
    class Agent(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Mlp(0.2)

        def act(self, x):
            policy = Categorical(logits=self.net(x))
            action = policy.sample()
            return action, policy.log_prob(action)

    model, reference = copies(Agent().double())
    batch = make_batch(12, False, torch.float64)
    state = torch.get_rng_state()
    with kondo.gated(model, rate=0.25, method="act", logp=1) as gate:
        (-model.act(batch.x)[1] * batch.advantages).mean().backward()
    torch.set_rng_state(state)
    check(model, reference, batch, gate, lambda m, w: (-m.act(batch.x)[1] * batch.advantages * w).mean())


def test_transformer_in_eval_mode_with_padding():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    model, reference = copies(model)
    x, head = torch.randn(12, 5, 8).double(), torch.randn(8, K).double()
    padding = torch.arange(5) >= torch.randint(1, 6, (12, 1))
    batch = make_batch(12, True, torch.float64)

    def loss(m, w=None):
        terms = -pick(m(x, src_key_padding_mask=padding) @ head, batch.actions) * batch.advantages * ~padding
        return (terms if w is None else terms * w.unsqueeze(1)).mean()

    with kondo.gated(model, rate=0.25) as gate:
        gate_loss = loss(model)
        with pytest.raises(kondo.DelightError):
            gate_loss.backward()
        terms = gate.logp(pick(model(x, src_key_padding_mask=padding) @ head, batch.actions))
        (-terms * batch.advantages * ~padding).mean().backward()
    check(model, reference, batch, gate, loss)


def test_sparse_and_renormalised_embeddings():
    class Embedded(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.embed, self.head = nn.Embedding(K, 8, **options), nn.Linear(8, K)

        def forward(self, ids):
            return self.head(self.embed(ids).mean(1))

    batch = make_batch(12, False, torch.float64)
    for options in ({"sparse": True}, {"max_norm": 1.0}):
        model, reference = copies(Embedded(**options).double())
        with kondo.gated(model, rate=0.25) as gate:
            reinforce(model(batch.ids), batch).backward()
        reinforce(reference(batch.ids), batch, kept_mask(gate.last.kept, 12, torch.float64)).backward()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.to_dense(), theirs.grad.to_dense())


# Delight on the right rows, in the right units.


def expected_delight(reference, batch):
    return (-batch.advantages * pick(reference(batch.x), batch.actions)).detach()


REDUCTIONS = {
    "mean": lambda logp, u: -(logp * u).mean(),
    "dot": lambda logp, u: -(logp @ u) / 12,
    "einsum": lambda logp, u: -torch.einsum("i,i->", logp, u) / 12,
    "sum_over_b": lambda logp, u: (-logp * u).sum() * (1 / 12),
    "added_to_others": lambda logp, u: 0.5 * (-(logp * u).mean() * 2 + logp.exp().detach().sum()),
    "one_by_one": lambda logp, u: sum(-p * a for p, a in zip(logp, u, strict=True)) / 12,
    "stacked": lambda logp, u: torch.stack([-p * a for p, a in zip(logp, u, strict=True)]).mean(),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_scale_of_a_loss_is_divided_out(batch, name):
    model, reference = copies(Mlp().double())
    with kondo.gated(model, rate=0.25) as gate:
        REDUCTIONS[name](pick(model(batch.x), batch.actions), batch.advantages).backward()
    torch.testing.assert_close(gate.last.delight, expected_delight(reference, batch))


@pytest.mark.parametrize("how", ["cross_entropy", "nll_loss", "sum", "mean", "scalar"])
def test_an_advantage_on_each_call_of_a_summed_loss_is_no_scale(batch, how):
    model, reference = copies(Mlp().double())

    def nll(logits, action):
        if how == "cross_entropy":
            return F.cross_entropy(logits, action)
        if how == "nll_loss":
            return F.nll_loss(logits.log_softmax(-1), action)
        logp = pick(logits, action)
        return -(logp.squeeze() if how == "scalar" else getattr(logp, how)())

    with kondo.gated(model, rate=0.25) as gate:
        loss = 0
        for t in range(12):
            loss = loss + batch.advantages[t] * nll(model(batch.x[t : t + 1]), batch.actions[t : t + 1])
        loss.backward()
    torch.testing.assert_close(gate.last.delight, expected_delight(reference, batch))


def test_a_return_on_each_episode_of_a_summed_loss_is_no_scale(batch):
    model, reference = copies(Mlp().double())
    returns = torch.tensor([5.0, 0.1, 1.0]).double().repeat_interleave(4)
    with kondo.gated(model, rate=0.25) as gate:
        loss = 0
        for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
            loss = loss - returns[rows][0].item() * pick(model(batch.x[rows]), batch.actions[rows]).sum()
        loss.backward()
    batch.advantages = returns
    torch.testing.assert_close(gate.last.delight, expected_delight(reference, batch))


def test_two_thousand_calls_in_one_backward_have_one_scale():
    n = 2000
    model, reference = copies(Mlp().double())
    batch = make_batch(n, False, torch.float64)
    with kondo.gated(model, rate=0.03) as gate:
        terms = []
        for t in range(n):
            policy = Categorical(logits=model(batch.x[t : t + 1]))
            terms.append(-policy.log_prob(batch.actions[t : t + 1]).squeeze() * batch.advantages[t])
        torch.stack(terms).sum().backward()
    torch.testing.assert_close(gate.last.delight, expected_delight(reference, batch))


def test_a_value_picked_beside_a_policy_is_no_policy(batch):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.pi, self.q = nn.Linear(FEATURES, K), nn.Linear(FEATURES, K)

        def forward(self, x):
            return self.pi(x), self.q(x)

    model = TwoHeads().double()
    with kondo.gated(model, rate=0.25) as gate:
        pi, q = model(batch.x)
        logp = pick(pi, batch.actions)
        value = q.gather(1, batch.actions[:, None]).squeeze(1)
        (-(logp * batch.advantages).mean() + 0.5 * (value - 3).pow(2).mean()).backward()
    torch.testing.assert_close(gate.last.delight, (-batch.advantages * logp).detach())


@pytest.mark.parametrize("head", [nn.Sigmoid(), nn.Softplus(), nn.ReLU()], ids=lambda h: type(h).__name__)
def test_an_output_of_one_sign_is_not_taken_for_a_log_prob(batch, head):
    model = nn.Sequential(nn.Linear(FEATURES, 3), head).double()
    with kondo.gated(model, rate=0.25), pytest.raises(kondo.DelightError, match="no policy was found"):
        logp = -((model(batch.x) - torch.rand(12, 3).double()) ** 2).sum(-1) / (2 * 0.3**2)  # a density written out
        (-logp * batch.advantages).mean().backward()


@pytest.mark.parametrize("marked", [True, False])
def test_time_first_models_are_scored_by_batch_rows(marked):
    model, reference = copies(nn.LSTM(FEATURES, K).double())
    batch = make_batch(4, True, torch.float64, length=8)  # T is a multiple of B
    x, actions, advantages = (t.transpose(0, 1) for t in (batch.x, batch.actions, batch.advantages))
    with kondo.gated(model, rate=0.25, batch_dim=1) as gate:
        logp = pick(model(x)[0], actions)
        (-(gate.logp(logp) if marked else logp) * advantages).mean().backward()
    expected = (-pick(reference(x)[0], actions) * advantages).sum(0).detach()
    torch.testing.assert_close(gate.last.delight, expected)


def test_marked_log_probs_whose_rows_moved_are_refused_or_followed(batch):
    model = Mlp().double()
    with kondo.gated(model, rate=0.25) as gate:
        logp = pick(model(batch.x), batch.actions)
        for moved in (logp[torch.randperm(12)], logp.flip(0), logp[logp < logp.median()]):
            with pytest.raises(kondo.DelightError, match="in the batch's order"):
                gate.logp(moved)
        gate.logp(model(batch.x).log_softmax(-1)[torch.arange(12), batch.actions])


def test_logits_joined_with_constants_are_not_misread(batch):
    model, reference = copies(Mlp().double())
    constant = torch.randn(12, K).double()
    with kondo.gated(model, rate=0.25) as gate:
        logits = torch.cat([model(batch.x), constant])
        logp = pick(logits, torch.cat([batch.actions, batch.actions]))[:12]
        (-logp * batch.advantages).mean().backward()
    ours, theirs = gate.last.delight, expected_delight(reference, batch)
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm())


@pytest.mark.parametrize("raw", [True, False])
def test_gather_of_the_first_positions(raw):
    """An index shorter than the logits picks from the first positions of each row."""
    model, reference = copies(nn.Linear(FEATURES, K).double())
    batch = make_batch(6, True, torch.float64)
    actions, advantages = batch.actions[:, :-2], batch.advantages[:, :-2]

    def log_probs(m):
        logits = m(batch.x)
        if raw:
            picked = logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            return picked - logits[:, :-2].logsumexp(-1)
        return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    with kondo.gated(model, rate=0.5) as gate:
        (-log_probs(model) * advantages).mean().backward()
    expected = (-log_probs(reference) * advantages).sum(1).detach()
    torch.testing.assert_close(gate.last.delight, expected)


def test_a_probe_before_the_backward_leaves_nothing_behind(batch):
    model, reference = copies(Mlp().double())
    with kondo.gated(model, rate=0.25) as gate:
        logits = model(batch.x)
        probe = pick(logits, (batch.actions + 1) % K)
        torch.autograd.grad(probe.sum(), logits, retain_graph=True)
        reinforce(logits, batch).backward()
    torch.testing.assert_close(gate.last.delight, expected_delight(reference, batch))


def test_discrete_heads_split_from_one_output(batch):
    sizes = [3, 4]
    model = Mlp().double()
    actions = [batch.actions % 3, batch.actions % 4]
    with kondo.gated(model, rate=0.25) as gate:
        heads = [Categorical(logits=part) for part in torch.split(model(batch.x), sizes, dim=1)]
        logp = sum(head.log_prob(a) for head, a in zip(heads, actions, strict=True))
        (-logp * batch.advantages).mean().backward()
    torch.testing.assert_close(gate.last.delight, (-batch.advantages * logp).detach())


TOKENS = {
    "strided": (lambda y: y[:, 1::2], slice(1, None, 2)),
    "second_half": (lambda y: y.chunk(2, 1)[1], slice(4, None)),
    "from_the_third": (lambda y: y[:, 2:], slice(2, None)),
    "flattened": (lambda y: y.reshape(-1, K), slice(None)),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_at_other_positions_are_exact_or_refused(name):
    cut, positions = TOKENS[name]
    model, reference = copies(nn.Linear(FEATURES, K).double())
    batch = make_batch(6, True, torch.float64, length=8)
    actions, advantages = batch.actions[:, positions], batch.advantages[:, positions]

    def loss(m, w=1.0):
        return (
            -pick(cut(m(batch.x)), actions.reshape(cut(m(batch.x)).shape[:-1])).view_as(actions) * advantages * w
        ).mean()

    with kondo.gated(model, rate=0.25, unit="token") as gate:
        try:
            loss(model).backward()
        except kondo.DelightError as error:
            assert name in ("strided", "second_half") and "positions" in str(error)
            return
    loss(reference, kept_mask(gate.last.kept, actions.numel(), torch.float64).view_as(actions)).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_tokens_on_the_last_axis_are_refused():
    model, batch = nn.Conv1d(FEATURES, K, 1).double(), make_batch(6, True, torch.float64, length=9)
    with kondo.gated(model, rate=0.25, unit="token"), pytest.raises(kondo.DelightError, match="positions"):
        logits = model(batch.x.transpose(1, 2))
        (F.cross_entropy(logits, batch.actions, reduction="none") * batch.advantages).mean().backward()


def test_ppo_epochs_of_shuffled_minibatches_follow_a_masked_loop():
    model, reference = copies(Mlp().double())
    batch = make_batch(48, False, torch.float64)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (model, reference)]
    rng = np.random.default_rng(0)

    def loss(m, part, w=None):
        policy = Categorical(logits=m(part.x))
        u = (part.advantages - part.advantages.mean()) / part.advantages.std()
        ratio = (policy.log_prob(part.actions) - part.old_logp).exp()
        terms = -torch.min(ratio * u, ratio.clamp(0.8, 1.2) * u) - 0.01 * policy.entropy()
        return (terms if w is None else terms * w).mean()

    with kondo.gated(model, rate=0.25) as gate:
        for _ in range(6):
            order = rng.permutation(48)
            for start in range(0, 48, 16):
                part = batch.rows(torch.from_numpy(order[start : start + 16]))
                loss(model, part).backward()
                loss(reference, part, kept_mask(gate.last.kept, 16, torch.float64)).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class Decoder(nn.Module):
    """Returns what each token costs, (B * T,) or (B, T), causal and without a mask of padding."""

    def __init__(self, flat):
        super().__init__()
        self.flat = flat
        self.token, self.qkv, self.head = nn.Embedding(17, 12), nn.Linear(12, 36), nn.Linear(12, 17)

    def forward(self, ids, targets, reduction="mean"):
        x = self.token(ids)
        x = x + F.scaled_dot_product_attention(*self.qkv(F.rms_norm(x, (12,))).chunk(3, -1), is_causal=True)
        logits = 15 * torch.tanh(self.head(F.rms_norm(x, (12,))) / 15)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
        return nll.view(targets.shape) if reduction == "none" and not self.flat else nll


def cost(model, ids, targets, advantages, factors=None):
    logp = -model(ids, targets, reduction="none").view_as(ids)
    terms = logp * advantages[:, None]
    if factors is not None:
        terms = terms * (factors.view_as(terms) if factors.numel() == terms.numel() else factors[:, None])
    return -terms.sum() / ((targets >= 0).sum().clamp(min=1) * 2)


@pytest.mark.parametrize("rule", [{}, {"window": 2}, {"window": "step"}, {"unit": "token"}, {"noise": 0.5}], ids=str)
@pytest.mark.parametrize("flat", [True, False], ids=["B * T", "B, T"])
def test_a_model_that_returns_the_nll_of_each_token(flat, rule):
    torch.manual_seed(0)
    ours, theirs = copies(Decoder(flat).double())
    ids, targets = torch.randint(17, (2, 8, 10)), torch.randint(17, (2, 8, 10))
    targets[:, :, :3] = targets[:, 2, 7:] = -1
    advantages, decided = torch.randn(2, 8).double(), []
    with kondo.gated(ours, **({} if "noise" in rule else {"rate": 0.25}), **rule) as gate:
        for given in zip(ids, targets, advantages, strict=True):
            cost(ours, *given).backward()
            decided += [] if "window" in rule else [gate.last]
    for n, given in enumerate(zip(ids, targets, advantages, strict=True)):
        factors = decided[n].factors() if decided else gate.last.factors().split(8)[n]
        cost(theirs, *given, factors).backward()
        if "unit" not in rule:
            delight = decided[n].delight if decided else gate.last.delight.split(8)[n]
            with torch.no_grad():
                expected = (theirs(*given[:2], "none").view(8, 10) * given[2][:, None]).sum(1)
            torch.testing.assert_close(delight, expected)
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert 0 < gate.stats.forwarded < 16
