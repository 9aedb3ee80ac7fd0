"""Rows that are cut after their last kept position: the draw by brute force, the gradient by the masked loss."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import kondo_hooks as kondo
from kondo_hooks.core.engine import Engine
from kondo_hooks.rules import draw
from tests.reference import Runs, copies, grads, largest_relative_difference, told

V, T, B = 23, 16, 6

# The draw.

rows_of_sizes = st.lists(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=9), min_size=1, max_size=5
)


def laid_out(rows):
    sizes = torch.tensor([size for row in rows for size in row], dtype=torch.float64)
    begins = torch.tensor([place == 0 for row in rows for place in range(len(row))])
    return sizes, begins


@settings(max_examples=200, deadline=None, derandomize=True)
@given(rows=rows_of_sizes)
def test_sizes_fall_within_a_row_as_isotonic_regression_has_them(rows):
    sizes, begins = laid_out(rows)
    found = draw.falling(sizes, begins).split([len(row) for row in rows])
    for mine, row in zip(found, rows, strict=True):
        squares = [size**2 for size in row]
        expected = torch.tensor(isotonic_regression(squares, increasing=False).x.copy()).clamp_min(0).sqrt()
        assert torch.allclose(mine, expected, rtol=1e-6, atol=1e-7 * float(sizes.max()))
        last = max((place for place, size in enumerate(row) if size), default=-1)
        assert torch.equal(mine > 0, torch.arange(len(row)) <= last)  # what has a gradient can be kept


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=rows_of_sizes, noise=st.floats(0.05, 3.0), seed=st.integers(0, 5))
def test_no_other_prefixes_cost_less_for_their_noise(rows, noise, seed):
    sizes, begins = laid_out(rows)
    if not sizes.any():
        return
    by = draw.falling(sizes, begins)
    p = draw.inclusion(by, draw.bounded_noise(by, noise))
    used = p > 0

    def moment(p):
        return float((sizes.square()[used] / p[used]).sum())

    assert moment(p) <= (1 + noise) * float(sizes.square().sum()) * (1 + 1e-6)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        other = p * torch.exp(0.3 * torch.randn(len(p), generator=generator, dtype=torch.float64))
        pieces = other.clamp(1e-9, 1).split([len(row) for row in rows])
        other = torch.cat([piece.cummin(0).values for piece in pieces])
        other = torch.where(used, other, 0)
        cheaper = float(other.sum()) < float(p.sum()) * (1 - 1e-6)
        assert not (cheaper and moment(other) < moment(p) * (1 - 1e-6))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows=rows_of_sizes)
def test_each_row_keeps_its_first_positions_as_often_as_it_should(rows):
    sizes, begins = laid_out(rows)
    if not sizes.any():
        return
    by = draw.falling(sizes, begins)
    p = draw.inclusion(by, draw.bounded_noise(by, 0.7))
    total = torch.zeros_like(p)
    generator, n = torch.Generator().manual_seed(0), 400
    for _ in range(n):
        factors = draw.drawn_prefixes(p, begins, torch.arange(len(p)).double(), generator)
        kept = factors > 0
        for piece in kept.split([len(row) for row in rows]):
            assert torch.equal(piece, piece.cummin(0).values)
        assert torch.allclose(factors[kept] * p[kept], torch.ones(int(kept.sum()), dtype=torch.float64))
        total += kept
    assert bool(((total / n - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-9).all())


# The gradient.


class Recurrent(nn.Module):
    """A GRU's policy and value at every step; dropout where asked."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.token, self.gru = nn.Embedding(V, 12), nn.GRU(12, 12, batch_first=True)
        self.dropout, self.policy, self.value = nn.Dropout(dropout), nn.Linear(12, V), nn.Linear(12, 1)

    def forward(self, ids):
        hidden = self.dropout(self.gru(self.dropout(self.token(ids)))[0])
        return self.policy(hidden), self.value(hidden).squeeze(-1)


class Masked(nn.Module):
    """Attention under a mask of (T, T) that all rows share, learned positions, checkpointed."""

    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(V, 12), nn.Embedding(T, 12)
        self.attention, self.head = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, V)

    def forward(self, ids, mask, places):
        x = self.token(ids) + self.place(places)

        def attend(x):
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

        return self.head(x + checkpoint(attend, x, use_reentrant=False))


def made(kind):
    torch.manual_seed(0)
    small = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 24, "max_position_embeddings": 64}
    if kind in ("llama", "llama checkpointed"):
        model = LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=1))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**small, num_key_value_heads=1, head_dim=8))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.1)
        )
    elif kind == "bert":
        model = BertForMaskedLM(BertConfig(**small)).eval()
    elif kind == "masked":
        model = Masked()
    else:
        model = Recurrent(0.2 if kind == "dropout" else 0.0)
    if kind == "llama checkpointed":
        model.gradient_checkpointing_enable()
    return model.double().train(kind != "bert")


def batch(seed=0, rows=B, length=T):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (rows, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    u = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    u = u * torch.linspace(1.5, 0.1, length - 1).double()
    return ids, (torch.arange(length) < lengths[:, None]).long(), u


def called(model, ids, mask):
    """Logits, and values where the model has them."""
    if isinstance(model, Recurrent):
        return model(ids)
    if isinstance(model, Masked):
        n = ids.shape[1]
        return model(ids, torch.triu(torch.full((n, n), -math.inf, dtype=torch.float64), 1), torch.arange(n)), None
    cache = {} if "Bert" in type(model).__name__ else {"use_cache": False}
    return model(input_ids=ids, attention_mask=mask, **cache).logits, None


def loss_of(model, given, loss="gather", factors=None):
    """A loss over the tokens after the first, each token's terms times its factor."""
    ids, mask, u = given
    logits, values = called(model, ids, mask)
    every = logits[:, :-1].log_softmax(-1)
    logp = every.gather(-1, ids[:, 1:, None]).squeeze(-1)
    if loss == "clip":
        ratio = (logp - logp.detach() - 0.1).exp()
        terms = -torch.min(ratio * u, ratio.clamp(0.8, 1.2) * u)
    else:
        terms = -u * logp
    if loss == "entropy":
        terms = terms + 0.1 * (every.exp() * every).sum(-1)
    if values is not None:
        terms = terms + 0.5 * (values[:, :-1] - u).square()
    terms = terms * mask[:, 1:]
    return (terms if factors is None else terms * factors).mean()


def largest_advantages(rows):
    return (rows.advantage > 0.3).float() * 2


RULES = [
    {"noise": 0.5},
    {"rate": 0.3, "priority": "norm", "unbiased": True},
    {"rate": "lossless"},
    {"rate": 0.1},
    {"rate": 0.2, "priority": "surprisal"},
    {"rule": largest_advantages},
]


def factors_of(gate, given, rows=B):
    """(B, T - 1) of each token after the first; the signal may have begun at the first."""
    factors = gate.last.factors().view(rows, -1)
    return factors[:, : given[0].shape[1] - 1]


@pytest.mark.parametrize("loss", ["gather", "clip", "entropy"])
@pytest.mark.parametrize("rule", RULES, ids=told)
@pytest.mark.parametrize("kind", ["llama", "llama checkpointed", "qwen3", "gpt2", "recurrent", "dropout", "masked"])
def test_the_gradient_is_that_of_the_masked_loss_and_fewer_positions_run(kind, rule, loss):
    ours, theirs = copies(made(kind))
    given = batch(1)
    seen = Runs(ours, V)
    torch.manual_seed(7)
    with kondo.gated(ours, unit="prefix", audit=0, **rule) as gate:
        loss_of(ours, given, loss).backward()  # the first step looks at where positions are
        ours.zero_grad()
        seen.shapes.clear()
        torch.manual_seed(8)
        loss_of(ours, given, loss).backward()
    factors = factors_of(gate, given)
    torch.manual_seed(8)
    loss_of(theirs, given, loss, factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    # To its last kept token; a token more has no gradient of its own where rows of a pass are not as long.
    ends = [int(row.nonzero().max()) + 1 for row in factors if row.any()]
    assert sum(ends) <= sum(seen.tokens) <= 1.5 * sum(ends) * (2 if kind == "llama checkpointed" else 1) + T
    assert sum(seen.tokens) < B * T * (2 if kind == "llama checkpointed" else 1)


@pytest.mark.parametrize("kind", ["llama", "recurrent"])
@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 2}, {"window": 2}, {"window": 2, "micro_batch_size": 2}], ids=told
)
def test_windows_and_passes_of_a_few_rows(kind, options):
    ours, theirs = copies(made(kind))
    batches = [batch(1), batch(2, rows=4, length=T - 4)]
    with kondo.gated(ours, unit="prefix", noise=0.5, **options) as gate:
        for given in batches:
            loss_of(ours, given).backward()
            if options.get("window", 1) == 1:
                loss_of(theirs, given, factors=factors_of(gate, given, len(given[0]))).backward()
    if options.get("window", 1) == 2:
        sizes = [
            len(given[0]) * gate_length for given, gate_length in zip(batches, _lengths(gate, batches), strict=True)
        ]
        for given, mine in zip(batches, gate.last.factors().split(sizes), strict=True):
            n = len(given[0])
            loss_of(theirs, given, factors=mine.view(n, -1)[:, : given[0].shape[1] - 1]).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def _lengths(gate, batches):
    """How many positions a row the signal of each batch has: all, or all after the first."""
    total = len(gate.last.factors())
    full = [given[0].shape[1] for given in batches]
    less = total != sum(len(given[0]) * n for given, n in zip(batches, full, strict=True))
    return [n - less for n in full]


def test_it_is_right_on_average():
    model = made("recurrent")
    given = batch(3)
    loss_of(model, given).backward()
    expected, total, n = grads(model), None, 600
    with kondo.gated(model, unit="prefix", noise=1.0) as gate:
        for _ in range(n):
            model.zero_grad()
            loss_of(model, given).backward()
            mine = grads(model)
            total = mine if total is None else {name: total[name] + mine[name] for name in mine}
    assert gate.last.rate < 0.7
    assert largest_relative_difference({name: each / n for name, each in total.items()}, expected) < 0.2


def test_padding_costs_nothing_without_loss():
    ours, theirs = copies(made("llama"))
    given = batch(4)
    given[1][:4] = (torch.arange(T) < 5).long()  # most rows are short, in a batch that is padded
    given[1][4:] = 1
    seen = Runs(ours, V)
    with kondo.gated(ours, unit="prefix", rate="lossless", audit=0):
        loss_of(ours, given).backward()
        ours.zero_grad()
        seen.shapes.clear()
        loss_of(ours, given).backward()
    loss_of(theirs, given).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert sorted(seen.shapes) == [(2, T - 1), (4, 4)]


@pytest.mark.parametrize("kind", ["llama", "recurrent"])
@pytest.mark.parametrize("rule", RULES[:2] + RULES[3:4], ids=told)
def test_before_the_forward_rows_run_no_further_than_that(kind, rule):
    ours, theirs = copies(made(kind))
    given = batch(5)
    ids, mask, u = given
    seen = Runs(ours, V)
    with kondo.gated(ours, unit="prefix", **rule) as gate:
        for step in range(2):
            ours.zero_grad()
            with torch.no_grad():
                logp = called(theirs, ids, mask)[0].log_softmax(-1)
                logp = logp[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
            padded = [torch.cat([t, torch.zeros(B, 1, dtype=t.dtype)], 1) for t in (logp, u, mask[:, 1:])]
            gate.preselect(logp=padded[0], advantages=padded[1], mask=padded[2])
            seen.shapes.clear()
            loss_of(ours, given).backward()
            if step == 0:
                continue
            factors = gate.last.factors().view(B, T)[:, :-1]
            loss_of(theirs, given, factors=factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    ends = [int(row.nonzero().max()) + 1 for row in factors if row.any()]
    assert sum(ends) <= sum(seen.tokens) <= 1.3 * sum(ends) + T


# What cannot be cut.


class Pooled(Recurrent):
    def forward(self, ids):
        logits, values = super().forward(ids)
        return logits, values.mean(1)


class Coupled(Recurrent):
    """Log-probs of the tokens, in which each row has something of the others."""

    def forward(self, ids):
        logits = super().forward(ids)[0]
        return log_probs(logits + 0.1 * logits.mean(0), ids)


class LastOnes(nn.Module):
    """Logits of the last positions alone, as many as an argument says."""

    def __init__(self):
        super().__init__()
        self.inner = Recurrent()

    def forward(self, ids, keep):
        return self.inner(ids)[0][:, -keep:]


class Flat(Recurrent):
    def forward(self, ids):
        return super().forward(ids)[0].flatten(0, 1)


def refused(model, call, match, first=lambda gate: None):
    model = model.double()
    params = [p.clone() for p in model.parameters()]
    with kondo.gated(model, unit="prefix", noise=0.5) as gate:
        first(gate)
        with pytest.raises(kondo.PrefixError, match=match):
            call(model).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(params, model.parameters(), strict=True))


def log_probs(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def test_later_positions_that_matter_are_named():
    ids, mask, u = batch(1)
    refused(
        made("bert"),
        lambda model: loss_of(model, (ids, mask, u)),
        r"first 8 positions of output \['logits'\] come out otherwise without the others: later positions matter",
    )


def test_later_positions_that_matter_are_named_before_the_forward():
    ids, mask, u = batch(1)
    refused(
        made("bert"),
        lambda model: loss_of(model, (ids, mask, u)),
        "later positions matter",
        lambda gate: gate.preselect(logp=-torch.rand(B, T), advantages=torch.randn(B)),
    )


@pytest.mark.parametrize("window", [1, 2])
def test_rows_that_depend_on_each_other_are_told_of_all_the_same(window):
    ids, _, u = batch(1)
    model = Coupled().double()
    with kondo.gated(model, unit="prefix", rate=0.2, audit=0, window=window):
        with pytest.raises(kondo.ReplayMismatchError, match="a row's output depends on the other rows"):
            for _ in range(window):
                (-u[:, :1] * model(ids)).mean().backward()
        assert all(p.grad is None for p in model.parameters())


def test_a_gradient_without_positions_is_named():
    ids, _, u = batch(1)

    def call(model):
        logits, value = model(ids)
        return -(u[:, :1] * log_probs(logits, ids)).mean() + value.square().mean()

    refused(Pooled(), call, r"output \[1\] gets a gradient and has no positions")


def test_a_model_that_is_told_how_many_positions_it_returns_is_named():
    ids, _, u = batch(1)
    refused(
        LastOnes(),
        lambda model: -(u[:, :1] * log_probs(model(ids, 6), ids[:, -6:])).mean(),
        "6 positions, and no input",
    )


def test_positions_that_are_flattened_into_rows_are_named():
    ids, _, u = batch(1)
    refused(
        Flat(),
        lambda model: -(u[:, :1] * log_probs(model(ids).view(B, T, V), ids)).mean(),
        "flattened into the rows",
    )


def test_an_input_that_wants_a_gradient_is_named():
    ids, _, u = batch(1)
    x = torch.randn(B, T, 12, dtype=torch.float64, requires_grad=True)
    model = nn.Linear(12, V)
    refused(model, lambda model: -(u[:, :1] * log_probs(model(x), ids)).mean(), "an input of the model requires grad")


def test_one_position_is_a_row():
    ours, theirs = copies(nn.Linear(5, 3).double())
    x, a, u = torch.randn(8, 5).double(), torch.randint(3, (8,)), torch.randn(8).double()
    with kondo.gated(ours, unit="prefix", noise=0.5) as gate:
        (-u * log_probs(ours(x), a)).mean().backward()
    (-u * log_probs(theirs(x), a) * gate.last.factors()).mean().backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_one_number_a_row_before_the_forward_is_one_position():
    model = made("recurrent")
    given = batch(6)
    with kondo.gated(model, unit="prefix", noise=0.0) as gate:
        gate.preselect(norm=torch.tensor([1.0, 0, 0, 0, 0, 0]))
        loss_of(model, given).backward()
    mine = grads(model)
    model.zero_grad()
    (loss_of(model, [each[:1] for each in given]) / B).backward()
    assert largest_relative_difference(mine, grads(model)) < 1e-10


def test_as_many_rows_as_positions_are_told_apart():
    ours, theirs = copies(made("recurrent"))
    given = batch(6, rows=T)
    with kondo.gated(ours, unit="prefix", noise=0.5) as gate:
        loss_of(ours, given).backward()
    loss_of(theirs, given, factors=factors_of(gate, given, T)).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_what_cuts_rows_does_not_move_them():
    with pytest.raises(ValueError, match="balance=True moves whole rows"):
        kondo.gated(nn.Linear(2, 2), unit="prefix", scope="global", balance=True)


@pytest.mark.parametrize("options", [{"groups": 2}, {"pairs": True}], ids=told)
def test_what_is_of_rows_is_refused(options):
    with pytest.raises(ValueError, match="need unit='sample'"):
        kondo.gated(nn.Linear(2, 2), unit="prefix", rate=0.5, **options)


class Behind(Recurrent):
    """Later positions reach earlier ones by a factor that is zero at first."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.alpha = kind, nn.Parameter(torch.zeros(12 if kind == "mean" else (32, 12)))

    def forward(self, ids):
        hidden = self.gru(self.token(ids))[0]
        if self.kind == "mean":
            hidden = hidden + self.alpha * hidden.mean(1, keepdim=True)
        elif self.kind == "from the end":
            hidden = hidden + self.alpha[-ids.shape[1] :]
        else:
            hidden = hidden + self.alpha[ids.shape[1] - 1]
        return self.policy(hidden), self.value(hidden).squeeze(-1)


@pytest.mark.parametrize("kind", ["mean", "from the end", "length"])
def test_later_positions_behind_a_zero_are_told(kind):
    torch.manual_seed(0)
    model = Behind(kind).double()
    with (
        kondo.gated(model, unit="prefix", noise=0.5),
        pytest.raises(kondo.ReplayMismatchError, match="the gradient of alpha is not the same without the positions"),
    ):
        loss_of(model, batch(1)).backward()
    assert all(p.grad is None for p in model.parameters())


# What another reader found.


@pytest.mark.parametrize("unit", ["token", "prefix"])
@pytest.mark.parametrize("term", ["value", "value of the last", "z", "entropy"])
def test_terms_at_positions_where_no_action_is_count(term, unit):
    ours, theirs = copies(made("recurrent"))
    ids, _, u = batch(1)

    def loss(model):
        logits, values = model(ids)
        cut = slice(None, -1) if term == "value of the last" else slice(3, -1)  # the others have a prompt
        terms = (-u[:, 0][:, None] * log_probs(logits, ids.roll(-1, 1)))[:, cut].sum()
        if term == "z":
            return terms + 0.1 * logits.logsumexp(-1).square().sum()
        if term == "entropy":
            return terms + 0.1 * (logits.softmax(-1) * logits.log_softmax(-1)).sum()
        return terms + 0.5 * (values - u[:, :1]).square().sum()

    with kondo.gated(ours, unit=unit, rate="lossless") as gate:
        loss(ours).backward()
    loss(theirs).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    expected, total, n = grads(theirs), None, 500
    with kondo.gated(ours, unit=unit, noise=0.3) as gate:
        for _ in range(n):
            ours.zero_grad()
            loss(ours).backward()
            mine = {name: grad for name, grad in grads(ours).items() if grad is not None}
            total = mine if total is None else {name: total[name] + mine[name] for name in mine}
    assert gate.last.rate < 1
    expected = {name: expected[name] for name in total}
    assert largest_relative_difference({name: grad / n for name, grad in total.items()}, expected) < 0.2


def test_a_rule_by_rank_tells_that_it_drops_terms_where_no_action_is():
    ids, _, u = batch(1)
    model = made("recurrent")
    with (
        kondo.gated(model, unit="token", rate=0.2),
        pytest.warns(kondo.KondoWarning, match="at positions where no action is"),
    ):
        logits, values = model(ids)
        (-(u[:, :1] * log_probs(logits[:, 5:], ids[:, 5:])).sum() + values.square().sum()).backward()


class Beside(Recurrent):
    """Something of each row beside its positions."""

    def __init__(self, features=0):
        super().__init__()
        self.features = features
        self.other = nn.Linear(12, features or 1)

    def forward(self, ids):
        hidden = self.gru(self.token(ids))[0]
        if self.features:
            return self.policy(hidden), self.other(hidden[:, 0])
        return self.policy(hidden), self.other(hidden.mean(1))


def test_before_the_forward_a_pooled_value_is_refused_once_it_gets_a_gradient():
    model, (ids, _, u) = Beside().double(), batch(1)
    for uses in (False, True):
        with kondo.gated(model, unit="prefix", rate=0.2) as gate:
            gate.preselect(logp=-torch.rand(B, T).double(), advantages=u[:, :1])
            logits, value = model(ids)
            loss = -(u[:, :1] * log_probs(logits, ids)).mean()
            if not uses:
                loss.backward()
                continue
            with pytest.raises(kondo.PrefixError, match=r"\[1\] gets a gradient and has no positions"):
                (loss + value.square().mean()).backward()


@pytest.mark.parametrize("features", range(2, T))
def test_before_the_forward_features_are_no_positions(features):
    model, (ids, _, u) = Beside(features).double(), batch(1)
    with kondo.gated(model, unit="prefix", noise=0.5) as gate:
        gate.preselect(norm=torch.linspace(2, 0.1, T).expand(B, T).double() * u[:, :1].abs())
        assert model(ids)[1].shape == (B, features)


def test_before_the_forward_one_token_less_than_positions():
    ours, theirs = copies(made("recurrent"))
    given = batch(5)
    ids, mask, u = given
    with torch.no_grad():
        logp = log_probs(theirs(ids)[0][:, :-1], ids[:, 1:])
    with kondo.gated(ours, unit="prefix", noise=0.5) as gate:
        gate.preselect(logp=logp, advantages=u, mask=mask[:, 1:])
        loss_of(ours, given).backward()
    loss_of(theirs, given, factors=gate.last.factors().view(B, -1)).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_before_the_forward_flattened_positions_are_named():
    model, (ids, _, _) = Flat().double(), batch(1)
    with kondo.gated(model, unit="prefix", noise=0.5) as gate:
        gate.preselect(norm=torch.rand(B, T))
        with pytest.raises(kondo.PrefixError, match=r"so rows cannot be cut|flattened into them"):
            model(ids)


def test_a_second_call_on_the_same_rows_without_positions_is_named():
    class Two(Recurrent):
        def forward(self, ids, head="policy"):
            logits, values = super().forward(ids)
            return logits if head == "policy" else values.mean(1)

    ids, _, u = batch(1)
    refused(
        Two(),
        lambda model: -(u[:, :1] * log_probs(model(ids), ids)).mean() + model(ids, head="value").square().mean(),
        "gets a gradient and has no positions",
    )


class Flattening(Recurrent):
    """Drops tokens of all rows on one axis, or with time first."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, ids):
        hidden = self.gru(self.token(ids))[0]
        if self.kind == "flat":
            hidden = nn.functional.dropout(hidden.flatten(0, 1), 0.3, self.training).view(hidden.shape)
        else:
            hidden = nn.functional.dropout(hidden.transpose(0, 1).contiguous(), 0.3, self.training).transpose(0, 1)
        return self.policy(hidden), self.value(hidden).squeeze(-1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["flat", "time first"])
def test_dropout_where_rows_and_positions_are_elsewhere(kind, seed):
    torch.manual_seed(0)
    ours, theirs = copies(Flattening(kind).double())
    given = batch(seed, rows=8)
    torch.manual_seed(seed)
    with kondo.gated(ours, unit="prefix", noise=0.5, seed=seed, audit=0) as gate:
        loss_of(ours, given).backward()
    torch.manual_seed(seed)
    loss_of(theirs, given, factors=factors_of(gate, given, 8)).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


@pytest.mark.parametrize("length", [T, T - 3])
def test_another_sequence_that_is_as_long_is_not_cut(length):
    class Crossed(nn.Module):
        """A causal decoder that sees all of a source."""

        def __init__(self):
            super().__init__()
            self.inner, self.source = Recurrent(), nn.Embedding(V, 12)

        def forward(self, ids, source):
            hidden = self.inner.gru(self.inner.token(ids))[0]
            seen = nn.functional.scaled_dot_product_attention(hidden, *[self.source(source)] * 2)
            return self.inner.policy(hidden + seen)

    torch.manual_seed(0)
    ours, theirs = copies(Crossed().double())
    ids, mask, u = batch(2)
    source = torch.randint(V, (B, length))

    def loss(model, factors=None):
        terms = -u * log_probs(model(ids, source)[:, :-1], ids[:, 1:]) * mask[:, 1:]
        return (terms if factors is None else terms * factors).mean()

    with kondo.gated(ours, unit="prefix", noise=0.5) as gate:
        loss(ours).backward()
    loss(theirs, gate.last.factors().view(B, -1)[:, : T - 1]).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


class Actions(nn.Module):
    """Log-probs of actions, (B, T - 1), as a trainer's actor returns them of ids (B, T) and what is given of each."""

    def __init__(self):
        super().__init__()
        self.inner = Recurrent()

    def forward(self, **given):
        ids, length = given["ids"], given["of_actions"].shape[1]
        attends = given.get("attends", torch.ones_like(ids))
        logits = self.inner(ids * attends)[0]
        labels = given["of_actions"] if given.get("labels") else ids.roll(-1, 1)[:, :-1]
        logp = log_probs(logits[:, :-1], labels)[:, -length:]
        return logp if given.get("labels") else logp * given["of_actions"]


@pytest.mark.parametrize("looks", [True, False], ids=["looks", "communicates"])
@pytest.mark.parametrize("kind", ["mask", "mask first", "mask and attention", "labels"])
def test_what_is_given_of_actions_is_cut_beside_ids_that_are_one_longer(kind, looks, monkeypatch):
    monkeypatch.setattr(Engine, "communicates", not looks)
    torch.manual_seed(0)
    ours, theirs = copies(Actions().double())
    ids, mask, u = batch(3)
    given = {"ids": ids, "of_actions": mask[:, 1:]}
    if kind == "mask first":
        given = dict(reversed(given.items()))
    if kind == "mask and attention":
        given["attends"] = mask
    if kind == "labels":
        given |= {"of_actions": ids[:, 1:], "labels": True}
    runs = Runs(ours, V)

    def loss(model, factors=None):
        terms = -u * model(**given) * mask[:, 1:]
        return (terms if factors is None else terms * factors).mean()

    with kondo.gated(ours, unit="prefix", noise=0.5, logp=lambda out: out, audit=0) as gate:
        loss(ours).backward()
    factors = gate.last.factors().view(B, -1)
    loss(theirs, factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert 0 < factors.count_nonzero() < mask.sum() and max(runs.shapes)[1] <= T
    assert sum(runs.tokens) < B * T


def test_falling_sizes_of_long_rows_take_no_time():
    begins = torch.zeros(64 * 2048, dtype=torch.bool)
    begins[::2048] = True
    for sizes in (torch.linspace(2, 1, 2048).repeat(64), torch.rand(64 * 2048), torch.linspace(1, 2, 2048).repeat(64)):
        begun = time.perf_counter()
        draw.falling(sizes.double(), begins)
        assert time.perf_counter() - begun < 0.5
