"""Rows that are steps of sequences, with a recurrent state beside them: the sequences are kept or dropped whole."""

import pytest
import torch
from torch import nn

import kondo_hooks as kondo
from tests.reference import copies, grads, largest_relative_difference

N, T, F, H, K = 6, 5, 4, 8, 3


class Policy(nn.Module):
    """Two heads on a recurrent layer, which begins anew where an episode does."""

    def __init__(self, by_step, kind=nn.LSTM, layers=1, dropout=0.0):
        super().__init__()
        self.by_step, self.encoder, self.rnn = by_step, nn.Linear(F, F), kind(F, H, layers)
        self.pi, self.value, self.dropout = nn.Linear(H, K), nn.Linear(H, 1), nn.Dropout(dropout)

    def forward(self, x, state, starts, action):
        n = (state[0] if isinstance(state, tuple) else state).shape[1]
        hidden, starts = self.dropout(self.encoder(x)), starts.float().to(x.dtype)
        if self.by_step:
            hidden, starts = hidden.reshape(-1, n, F), starts.reshape(-1, n)
        else:
            hidden, starts = hidden.reshape(n, -1, F).swapaxes(0, 1), starts.reshape(n, -1).swapaxes(0, 1)
        out = []
        for h, start in zip(hidden, starts, strict=True):
            fresh = (1 - start).view(1, -1, 1)
            state = tuple(fresh * s for s in state) if isinstance(state, tuple) else fresh * state
            h, state = self.rnn(h[None], state)
            out.append(h)
        out = torch.cat(out)
        out = (out if self.by_step else out.swapaxes(0, 1)).flatten(0, 1)
        policy = torch.distributions.Categorical(logits=self.pi(out))
        return policy.log_prob(action), policy.entropy(), self.value(out), state


def batch(n=N, t=T, layers=1, gru=False, seed=1):
    g = torch.Generator().manual_seed(seed)
    double = {"generator": g, "dtype": torch.float64}
    state = torch.randn(layers, n, H, **double)
    return {
        "x": torch.randn(n * t, F, **double),
        "state": state if gru else (state, torch.randn(layers, n, H, **double)),
        "starts": torch.rand(n * t, generator=g) < 0.2,
        "action": torch.randint(K, (n * t,), generator=g),
        "u": torch.randn(n * t, **double),
    }


def loss_of(model, given, factors=1.0):
    logp, entropy, value, _ = model(given["x"], given["state"], given["starts"], given["action"])
    u = given["u"]
    return ((-u * logp - 0.01 * entropy + (value[:, 0] - u) ** 2) * factors).mean()


def steps_of(factors, by_step, t=T):
    """Of each row, the factor of its sequence."""
    return factors.repeat(t) if by_step else factors.repeat_interleave(t)


RULES = [{"rate": 0.34}, {"noise": 0.7}, {"rate": 0.34, "priority": "norm"}, {"rate": "lossless"}]
KINDS = [(nn.LSTM, 1), (nn.GRU, 1), (nn.LSTM, 2)]


@pytest.mark.filterwarnings("ignore:.*holds no policy.*:kondo_hooks.KondoWarning")
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("kind", "layers"), KINDS, ids=str)
@pytest.mark.parametrize("by_step", [False, True])
def test_the_state_tells_that_rows_are_steps(by_step, kind, layers, rule, recwarn):
    given = batch(layers=layers, gru=kind is nn.GRU)
    ours, theirs = copies(Policy(by_step, kind, layers).double())
    with kondo.gated(ours, logp=0, **rule) as gate:
        loss_of(ours, given).backward()
    factors = gate.last.factors().double()
    assert len(factors) == N * T and gate.stats.forwarded * T == (factors != 0).sum()
    loss_of(theirs, given, factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert rule["rate" if "rate" in rule else "noise"] == "lossless" or gate.stats.forwarded < N
    assert not [w for w in recwarn if "holds no policy" not in str(w.message)]


@pytest.mark.parametrize("by_step", [False, True])
def test_delight_is_that_of_the_sequence(by_step):
    given = batch()
    ours, theirs = copies(Policy(by_step).double())
    with torch.no_grad():
        logp = theirs(given["x"], given["state"], given["starts"], given["action"])[0]
    with kondo.gated(ours, rate=0.5) as gate:
        (-given["u"] * ours(given["x"], given["state"], given["starts"], given["action"])[0]).mean().backward()
    delight = -given["u"] * logp
    each = delight.view(T, N).sum(0) if by_step else delight.view(N, T).sum(1)
    torch.testing.assert_close(gate.last.delight.double(), each)


@pytest.mark.parametrize("by_step", [False, True])
def test_dropout_and_single_steps(by_step):
    given = batch()
    for options, dropout in (({"rate": 0.34}, 0.3), ({"noise": 0.5, "unit": "token"}, 0.0)):
        ours, theirs = copies(Policy(by_step, dropout=dropout).double())
        with kondo.gated(ours, logp=0, **options) as gate:
            torch.manual_seed(3)
            (-given["u"] * ours(given["x"], given["state"], given["starts"], given["action"])[0]).mean().backward()
        torch.manual_seed(3)
        factors = gate.last.factors().double()
        if "unit" in options and by_step:
            factors = factors.view(N, T).t().flatten()
        logp = theirs(given["x"], given["state"], given["starts"], given["action"])[0]
        (-given["u"] * logp * factors).mean().backward()
        assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
        assert gate.stats.kept < gate.stats.rows


@pytest.mark.parametrize("by_step", [False, True])
def test_a_window_of_several_lengths(by_step):
    lengths = (T, T, 3)
    batches = [batch(t=t, seed=t + i) for i, t in enumerate(lengths)]
    ours, theirs = copies(Policy(by_step).double())
    with kondo.gated(ours, logp=0, noise=0.7, window=3) as gate:
        for given in batches:
            loss_of(ours, given).backward()
    each = gate.last.factors().double().split([N * t for t in lengths])
    for given, factors in zip(batches, each, strict=True):
        loss_of(theirs, given, factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert 0 < gate.stats.forwarded < gate.stats.rows_screened == 3 * N


@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("n", [1, 2, F])
def test_preselect_takes_one_value_a_sequence(by_step, n):
    given = batch(n)
    ours, theirs = copies(Policy(by_step).double())
    for rates in (0.5, 0.5):
        ours.zero_grad(), theirs.zero_grad()
        with kondo.gated(ours, rate=rates) as gate:
            decision = gate.preselect(delight=torch.arange(n).double())
            loss_of(ours, given).backward()
        loss_of(theirs, given, steps_of(decision.factors().double(), by_step)).backward()
        assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
        assert gate.stats.forwarded == max(1, n // 2)


class Cell(nn.Module):
    """A recurrent cell of one's own: its state says nothing, (n, H)."""

    def __init__(self):
        super().__init__()
        self.cell, self.pi = nn.GRUCell(F, H), nn.Linear(H, K)

    def forward(self, x, h):
        out = []
        for step in x.reshape(len(h), -1, F).unbind(1):
            h = self.cell(step, h)
            out.append(h)
        return self.pi(torch.stack(out, 1).flatten(0, 1))


def cell_loss(model, given, factors=1.0):
    logp = model(given["x"], given["state"][0]).log_softmax(-1).gather(1, given["action"][:, None])[:, 0]
    return (-given["u"] * logp * factors).mean()


def test_the_user_says_how_many_sequences_there_are():
    given = batch(gru=True)
    ours, theirs = copies(Cell().double())
    with kondo.gated(ours, rate=0.34, sequences=lambda x, h: len(h)) as gate:
        cell_loss(ours, given).backward()
    cell_loss(theirs, given, gate.last.factors().double()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10 and gate.stats.forwarded == 2


def test_a_number_of_sequences_that_cannot_be_is_an_error():
    given, model = batch(gru=True), Cell().double()
    for wrong, match in ((lambda x, h: 7, "no input"), (lambda x, h: 0, "number of sequences")):
        with pytest.raises(ValueError, match=match), kondo.gated(model, sequences=wrong):
            cell_loss(model, given)
    with pytest.raises(ValueError, match="neither where its steps"), kondo.gated(model, sequences=lambda x, h: 3):
        cell_loss(model, given)
    for bad in ({"sequences": 3}, {"sequences": lambda: 3, "pairs": True}, {"sequences": lambda: 3, "batch_dim": 1}):
        with pytest.raises(ValueError, match="sequences"):
            kondo.gated(model, **bad)


class Plain(nn.Module):
    """Sequences that stand on an axis of their own, with their state."""

    def __init__(self, batch_first):
        super().__init__()
        self.rnn, self.pi = nn.LSTM(F, H, batch_first=batch_first), nn.Linear(H, K)

    def forward(self, x, state):
        return self.pi(self.rnn(x, state)[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("t", [N, 2 * N, 5])
def test_sequences_on_an_axis_of_their_own_are_rows_as_ever(batch_first, t):
    given = batch(t=t)
    x, a, u = (given[name].view(N, t, *given[name].shape[1:]) for name in ("x", "action", "u"))
    if not batch_first:
        x, a, u = (v.transpose(0, 1).contiguous() for v in (x, a, u))
    ours, theirs = copies(Plain(batch_first).double())

    def loss(model, factors=1.0):
        return (-u * model(x, given["state"]).log_softmax(-1).gather(-1, a[..., None])[..., 0] * factors).mean()

    with kondo.gated(ours, rate=0.34, batch_dim=0 if batch_first else 1) as gate:
        loss(ours).backward()
    factors = gate.last.factors().double()
    loss(theirs, factors[:, None] if batch_first else factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10 and gate.stats.forwarded == 2


@pytest.mark.parametrize("by_step", [False, True])
def test_heads_that_are_still_zero_hide_no_order(by_step):
    given = batch()
    model = Policy(by_step).double()
    for head in (model.pi, model.value):
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    ours, theirs = copies(model)
    with kondo.gated(ours, logp=0, rate=0.34, priority="norm", audit=0) as gate:
        loss_of(ours, given).backward()
    loss_of(theirs, given, gate.last.factors().double()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10 and gate.stats.forwarded == 2
