"""Which axis holds the rows: readings of inputs and outputs that shapes leave in doubt, and what is said then."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kondo_hooks as kondo

from .cases import FEATURES, K
from .reference import copies, grads, largest_relative_difference

B = 12


def pick(logits, actions):
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def policy_loss(logits, actions, advantages, w=1.0):
    return (-advantages * pick(logits, actions) * w).mean()


@contextlib.contextmanager
def told():
    """The gate's warnings, but for the one of a value that learns from chosen rows."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        messages: list[str] = []
        yield messages
        found = [str(w.message) for w in seen if issubclass(w.category, kondo.KondoWarning)]
        messages += [message for message in found if "holds no policy" not in message]


def assert_same_gradient(model, reference):
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# A model may raise anything where its inputs are misread.


class Checked(nn.Module):
    """Checks the shape of its mask by an error of its own."""

    def __init__(self, error):
        super().__init__()
        self.layer, self.error = nn.Linear(FEATURES, K), error

    def forward(self, x, mask):
        if mask.shape != x.shape[:2]:
            raise self.error(f"{mask.shape}")
        return self.layer(x * mask[..., None])


class ShapeError(Exception):
    pass


@pytest.mark.parametrize("error", [AssertionError, TypeError, KeyError, ShapeError])
def test_the_next_reading_is_tried_whatever_a_model_raises(error):
    model, reference = copies(Checked(error).double())
    x, mask, actions, advantages = double(B, B, FEATURES), double(B, B), torch.randint(K, (B, B)), double(B, B)
    with kondo.gated(model, rate=0.25) as gate:
        policy_loss(model(x, mask), actions, advantages).backward()
    assert gate.stats.forwarded == 3
    policy_loss(reference(x, mask), actions, advantages, gate.last.factors()[:, None]).backward()
    assert_same_gradient(model, reference)


def test_a_models_own_error_in_the_first_run_is_its_own():
    model = Checked(ShapeError).double()
    with kondo.gated(model, rate=0.25), pytest.raises(ShapeError):
        model(double(B, 5, FEATURES), double(B, 4))


class Regrouped(nn.Module):
    """Rows that are steps of sequences, whose number it takes from the state of a cell of its own."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(FEATURES, 8), nn.Linear(8, K)

    def forward(self, x, h, c):
        state, out = (h[0], c[0]), []
        for step in x.unflatten(0, (-1, h.shape[1])):
            state = self.cell(step, state)
            out.append(state[0])
        return self.head(torch.cat(out))


def test_rows_that_are_regrouped_in_the_model_are_refused_in_the_gates_words():
    model = Regrouped()
    x, h, actions, advantages = (
        torch.randn(40, FEATURES),
        torch.zeros(1, 5, 8),
        torch.randint(K, (40,)),
        torch.randn(40),
    )
    with kondo.gated(model, rate=0.1), pytest.raises(kondo.ReplayMismatchError) as raised:
        policy_loss(model(x, h, h.clone()), actions, advantages).backward()
    for part in ("replay of 4 of 40 rows of Regrouped((40, 6), (1, 5, 8), (1, 5, 8))", "sequence one row"):
        assert part in str(raised.value)
    assert raised.value.__cause__ is not None and all(p.grad is None for p in model.parameters())


def test_a_sample_without_a_batch_axis_whose_features_look_like_rows():
    model = nn.Sequential(nn.Linear(K, 9), nn.Tanh(), nn.Linear(9, K))
    with kondo.gated(model, rate=0.3, priority="uniform"), pytest.raises(kondo.ReplayMismatchError, match=r"x\[None\]"):
        (-torch.stack([model(x).log_softmax(-1)[0] for x in torch.randn(6, K)]).sum()).backward()


# Rows on another axis than the first.


class LastStep(nn.Module):
    """(T, B, F) and the (B,) step to look at."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(FEATURES, 8), nn.Linear(8, K)

    def forward(self, x, last):
        return self.head(self.rnn(x)[0][last, torch.arange(x.shape[1])])[None]


@pytest.mark.parametrize("steps", [5, B])
def test_a_vector_of_rows_beside_rows_on_the_second_axis(steps):
    model, reference = copies(LastStep().double())
    x, last = double(steps, B, FEATURES), torch.randint(steps, (B,))
    actions, advantages = torch.randint(K, (B,)), double(B)
    with kondo.gated(model, rate=0.25, batch_dim=1) as gate:
        policy_loss(model(x, last)[0], actions, advantages).backward()
    assert gate.stats.forwarded == 3
    policy_loss(reference(x, last)[0], actions, advantages, gate.last.factors()).backward()
    assert_same_gradient(model, reference)


class Stacked(nn.Module):
    """Each layer's output, (layers, B, H)."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(layers))

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x).tanh()
            outputs.append(x)
        return torch.stack(outputs)


@pytest.mark.parametrize("layers", [2, B])
@pytest.mark.parametrize("keep", [3, B])
def test_layers_first_after_a_screen(layers, keep):
    model, reference = copies(Stacked(layers).double())
    x, weights, kept = double(B, FEATURES), double(layers, B, FEATURES), torch.zeros(B)
    kept[:keep] = 1
    with kondo.gated(model, rate=0.5) as gate:
        gate.preselect(kept=kept)
        (model(x) * weights).sum().backward()
    (reference(x) * weights * kept[:, None]).sum().backward()
    assert_same_gradient(model, reference)


# Losses of the model's own, of one kept row.


class InnerTagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head, self.kind = nn.GRU(FEATURES, 8, batch_first=kind != "time first"), nn.Linear(8, K), kind

    def forward(self, x, y):
        if self.kind == "time first":
            logits = self.head(self.rnn(x.transpose(0, 1))[0]).transpose(0, 1)
        else:
            logits = self.head(self.rnn(x)[0])
        return F.cross_entropy(logits.reshape(-1, K), y.reshape(-1)), logits


@pytest.mark.parametrize("kind", ["batch first", "time first"])
@pytest.mark.parametrize("k", [1, 2])
def test_an_inner_loss_of_one_row(kind, k):
    model, reference = copies(InnerTagger(kind).double())
    x, y = double(B, 5, FEATURES), torch.randint(K, (B, 5))
    with kondo.gated(model, rate=k / B) as gate:
        model(x, y)[0].backward()
    assert gate.stats.forwarded == k
    nll = F.cross_entropy(reference(x, y)[1].transpose(1, 2), y, reduction="none")
    (nll * gate.last.factors()[:, None]).mean().backward()
    assert_same_gradient(model, reference)


# A default device other than the data's.


@pytest.fixture
def meta_by_default():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # torch 2.8 would go on to ask it for its device


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.25},
        {"rate": 0.25, "priority": "uniform"},
        {"rate": 0.25, "deterministic": False},
        {"rate": 0.25, "weight": "dg"},
        {"rate": 0.25, "history": 4},
        {"price": 0.0, "hard": False},
        {"rate": 0.25, "window": 2},
        {"rate": 0.25, "micro_batch_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [False, True], ids=["hook", "screen"])
def test_a_default_device_is_none_of_the_gates_business(meta_by_default, options, first):
    model = nn.Sequential(nn.Linear(FEATURES, 8, device="cpu"), nn.Dropout(0.2), nn.Linear(8, K, device="cpu"))
    model, reference = copies(model.double().eval())
    x, advantages = (torch.randn(B, n, dtype=torch.float64, device="cpu") for n in (FEATURES, 1))
    actions, advantages = torch.randint(K, (B,), device="cpu"), advantages[:, 0]
    with kondo.gated(model, **options) as gate:
        for _ in range(options.get("window", 1)):
            if first and "window" not in options:
                gate.preselect(logp=pick(reference(x), actions).detach(), advantages=advantages)
            policy_loss(model(x), actions, advantages).backward()
    for w in gate.last.factors().view(-1, B):
        policy_loss(reference(x), actions, advantages, w).backward()
    assert_same_gradient(model, reference)


# Rows of outputs, where everything is replayed.


class Sequence(nn.Module):
    """Batch norm, so that every replay is a whole one; outputs in several orders of their axes."""

    def __init__(self, order, **options):
        super().__init__()
        self.layer, self.norm, self.order = nn.Linear(FEATURES, K), nn.BatchNorm1d(K, **options), order

    def forward(self, x):
        y = self.norm(self.layer(x).transpose(1, 2)).transpose(1, 2)
        y = y.transpose(0, 1) if self.order.startswith("time") else y
        return y.flatten(0, 1) if self.order.endswith("flat") else y


def sequence_loss(y, order, actions, advantages, w=None):
    """One advantage a row, and the rows' weights where the rows are."""
    terms = -pick(y.reshape(*actions.shape, K), actions)
    weights = advantages if w is None else advantages * w
    return (terms * (weights if order.startswith("time") else weights[:, None])).mean()


@pytest.mark.parametrize(
    ("order", "steps"), [("batch", 5), ("batch", B), ("batch flat", 5), ("batch flat", B), ("time", B)]
)
def test_rows_of_outputs_are_found_where_everything_is_replayed(order, steps):
    model, reference = copies(Sequence(order).double())
    x, advantages = double(B, steps, FEATURES), double(B)
    actions = torch.randint(K, (steps, B) if order == "time" else (B, steps))
    before = model.norm.running_mean.clone(), int(model.norm.num_batches_tracked)
    with told() as messages, kondo.gated(model, rate=0.25) as gate:
        for n in range(2):
            model.zero_grad()
            sequence_loss(model(x), order, actions, advantages).backward()
            assert int(model.norm.num_batches_tracked) == before[1] + n + 1
    assert len(messages) == 1 and "batch" in messages[0] and len(gate.last.kept) == 3
    sequence_loss(reference(x), order, actions, advantages, gate.last.factors()).backward()
    assert_same_gradient(model, reference)


@pytest.mark.parametrize("steps", [5, B])
@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
def test_rows_that_are_no_blocks_are_refused_where_everything_is_replayed(options, steps):
    model = Sequence("time flat", **options).double()
    with kondo.gated(model, rate=0.25), pytest.raises(ValueError, match=r"rows on an axis of their own.*batch_dim="):
        model(double(B, steps, FEATURES))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, K)

    def forward(self, x):
        return self.layer(x).transpose(0, 1)


@pytest.mark.parametrize("options", [{"rate": 0.25}, {"price": 0.0, "hard": False, "temperature": 1.0}], ids=str)
def test_time_first_outputs_of_as_many_steps_as_rows(options):
    model, reference = copies(TimeFirst().double())
    x, actions, advantages = double(B, B, FEATURES), torch.randint(K, (B, B)), double(B)
    with kondo.gated(model, **options) as gate:
        sequence_loss(model(x), "time", actions, advantages).backward()
    sequence_loss(reference(x), "time", actions, advantages, gate.last.factors()).backward()
    assert_same_gradient(model, reference)


# Shared inputs of the batch's size.


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, B), nn.Linear(B, K)

    def forward(self, x, scale):
        return self.second((self.first(x) * scale).tanh())


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_shared_vector_of_the_batchs_size(window):
    model, reference = copies(Scaled().double())
    data = [(double(B, FEATURES), double(B), torch.randint(K, (B,)), double(B)) for _ in range(window)]
    with kondo.gated(model, rate=0.25, window=window) as gate:
        for x, scale, *rest in data:
            policy_loss(model(x, scale), *rest).backward()
    assert gate.stats.forwarded == 3 * window
    for (x, scale, *rest), w in zip(data, gate.last.factors().view(-1, B), strict=True):
        policy_loss(reference(x, scale), *rest, w).backward()
    assert_same_gradient(model, reference)


def test_a_shared_vector_of_the_batchs_size_after_a_screen():
    model, reference = copies(Scaled().double())
    x, scale, actions, advantages = double(B, FEATURES), double(B), torch.randint(K, (B,)), double(B)
    kept = torch.arange(B) % 4 == 0
    with kondo.gated(model, rate=0.25) as gate:
        gate.preselect(kept=kept)
        policy_loss(model(x, scale), actions, advantages).backward()
    policy_loss(reference(x, scale), actions, advantages, kept).backward()
    assert_same_gradient(model, reference)


class Extra(nn.Module):
    """Another input than the one that holds rows: not used, behind a factor, or only looked at."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.side, self.use = nn.Linear(FEATURES, K), nn.Linear(B, K), use
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x, extra):
        y = self.layer(x)
        if self.use == "behind zero":
            return y + self.gain * self.side(torch.as_tensor(extra).to(x).mean(0))  # shared, though it looks like rows
        return y + 0 * extra.shape[0] if self.use == "shape" else y


@pytest.mark.parametrize("use", ["none", "shape"])
@pytest.mark.parametrize(
    "extra",
    [
        torch.randn(B, B),
        torch.ones(B, B).tril().bool(),
        torch.randn(B),
        torch.randn(B).numpy(),
        torch.randn(B, B).numpy(),
        torch.randn(B).numpy() > 0,
    ],
    ids=["f", "b", "v", "array of (B,)", "array of (B, B)", "array of bool"],
)
def test_an_unused_input_does_not_make_replays_whole(use, extra):
    model, reference = copies(Extra(use).double())
    x, actions, advantages = double(B, FEATURES), torch.randint(K, (B,)), double(B)
    with told() as messages, kondo.gated(model, rate=0.25) as gate:
        for _ in range(3):
            policy_loss(model(x, extra), actions, advantages).backward()
    assert gate.stats.forwarded == 9 and not messages
    for _ in range(3):
        policy_loss(reference(x, extra), actions, advantages, gate.last.factors()).backward()
    assert_same_gradient(model, reference)


@pytest.mark.parametrize(
    "look",
    [
        lambda a: float(a[0]),
        lambda a: 0.0 if (a == a[0]).all() else 1.0,
        lambda a: 1.0 if a.any() else 0.0,
        lambda a: a.sum(),
        lambda a: torch.from_numpy(a).sum(),
    ],
    ids=["float", "equal", "any", "sum", "from_numpy"],
)
def test_an_array_that_is_read_behind_a_zero_stays_in_doubt(look):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gain = nn.Linear(FEATURES, K), nn.Parameter(torch.zeros(()))

        def forward(self, x, extra):
            return self.layer(x) + self.gain * look(extra)

    model, reference = copies(Reads().double())
    x, extra, actions, advantages = double(B, FEATURES), double(B).numpy(), torch.randint(K, (B,)), double(B)
    with told() as messages, kondo.gated(model, rate=0.25, audit=0) as gate:
        policy_loss(model(x, extra), actions, advantages).backward()
    assert gate.stats.forwarded == B and any("cannot be told" in message for message in messages)
    policy_loss(reference(x, extra), actions, advantages, gate.last.factors()).backward()
    assert_same_gradient(model, reference)


@pytest.mark.parametrize("is_array", [False, True])
def test_an_input_behind_a_zero_is_told_once_and_looked_at_again(is_array):
    model, reference = copies(Extra("behind zero").double())
    x, extra, actions, advantages = double(B, FEATURES), double(B, B), torch.randint(K, (B,)), double(B)
    extra = extra.numpy() if is_array else extra
    runs = []
    model.layer.register_forward_pre_hook(lambda *_: runs.append(1))

    def step(m, w=1.0):
        m.zero_grad()
        policy_loss(m(x, extra), actions, advantages, w).backward()

    with told() as messages, kondo.gated(model, rate=0.25, audit=0) as gate:
        for n in range(1, 7):
            step(model)
            assert gate.stats.forwarded == B * n
        assert len(runs) < 6 * (5 if is_array else 4)
        step(reference, gate.last.factors())
        assert_same_gradient(model, reference)
        for m in (model, reference):
            torch.nn.init.constant_(m.gain, 0.5)
        for _ in range(6):
            step(model)
            step(reference, gate.last.factors())
            assert_same_gradient(model, reference)
        before = gate.stats.forwarded
        step(model)
        assert gate.stats.forwarded == before + 3
    assert len([m for m in messages if "cannot be told" in m and "(12, 12)" in m]) == 1
    assert not [m for m in messages if "cannot be told" not in m and "forward hooks" not in m]


class Squeezing(nn.Module):
    """Takes a batch of one row for no batch."""

    def __init__(self):
        super().__init__()
        self.policy, self.value = nn.Linear(FEATURES, K), nn.Linear(FEATURES, 1)

    def forward(self, x):
        return self.policy(x).squeeze(), self.value(x).squeeze()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("window", [1, 2])
def test_a_model_that_squeezes_one_row_away(k, window):
    model, reference = copies(Squeezing().double())
    data = [(double(B, FEATURES), torch.randint(K, (B,)), double(B)) for _ in range(window)]

    def loss(m, x, actions, advantages, w=1.0):
        logits, value = m(x)
        return policy_loss(logits, actions, advantages, w) + (value**2 * w).mean()

    with kondo.gated(model, rate=k / B / window, window=window) as gate:
        for batch in data:
            loss(model, *batch).backward()
    assert len(gate.last.kept) == k
    for batch, w in zip(data, gate.last.factors().view(-1, B), strict=True):
        loss(reference, *batch, w).backward()
    assert_same_gradient(model, reference)


# Positions: unit="token".


T = 5


class TokenModel(nn.Module):
    """A policy over the positions, and another output."""

    def __init__(self, other):
        super().__init__()
        self.body, self.policy = nn.GRU(FEATURES, 8, batch_first=True), nn.Linear(8, K)
        self.more, self.other = nn.ModuleDict({str(n): nn.Linear(8, n) for n in (1, 3, T, 9)}), other

    def forward(self, x):
        h = self.body(x)[0]
        more, pooled = self.more, h.mean(1)
        return self.policy(h), {
            "value": lambda: more["1"](h)[..., 0],
            "features": lambda: more["3"](h),
            "pooled, fewer": lambda: more["3"](pooled),
            "pooled, as many": lambda: more[str(T)](pooled),
            "pooled, more": lambda: more["9"](pooled),
            "transposed": lambda: more["3"](h).transpose(1, 2),
            "scalar": lambda: more["1"](pooled)[:, 0],
            "attention": lambda: (h @ h.transpose(1, 2)).unsqueeze(1).expand(-1, 2, -1, -1),
        }[self.other]()


def token_loss(m, x, actions, advantages, w=None, r=None):
    logits, other = m(x)
    policy, rest = -pick(logits, actions) * advantages, other**2
    if w is not None:
        policy, rest = policy * w, rest * r.view(*r.shape, *[1] * (rest.dim() - r.dim()))
    return policy.mean() + rest.mean()


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(
    ("other", "by_position"),
    [
        ("value", True),
        ("features", True),
        ("pooled, fewer", False),
        ("pooled, as many", False),
        ("pooled, more", False),
        ("transposed", False),
        ("scalar", False),
        ("attention", False),
    ],
)
def test_kept_tokens_cut_outputs_by_position_where_they_have_positions(other, by_position, window):
    model, reference = copies(TokenModel(other).double())
    data = [(double(B, T, FEATURES), torch.randint(K, (B, T)), double(B, T)) for _ in range(window)]
    with told() as messages, kondo.gated(model, rate=0.2, unit="token", window=window) as gate:
        for batch in data:
            token_loss(model, *batch).backward()
    for batch, w in zip(data, gate.last.factors().view(-1, B, T), strict=True):
        token_loss(reference, *batch, w, w if by_position else w.amax(1)).backward()
    assert_same_gradient(model, reference)
    assert not messages


def test_an_output_with_the_positions_on_two_axes_is_told_of_once():
    class Maps(TokenModel):
        def forward(self, x):
            h = self.body(x)[0]
            return self.policy(h), h @ h.transpose(1, 2)

    model, reference = copies(Maps("value").double())
    batch = double(B, T, FEATURES), torch.randint(K, (B, T)), double(B, T)
    with told() as messages, kondo.gated(model, rate=0.2, unit="token") as gate:
        for _ in range(2):
            model.zero_grad()
            token_loss(model, *batch).backward()
    w = gate.last.factors().view(B, T)
    token_loss(reference, *batch, w, w.amax(1)).backward()
    assert_same_gradient(model, reference)
    (message,) = messages
    assert "(5, 5)" in message and "unit='token'" in message


def test_a_model_of_one_length_is_told_of():
    class Fixed(TokenModel):
        def forward(self, x):
            return super().forward(x.reshape(-1, T, FEATURES))

    with told() as messages, kondo.gated(Fixed("value").double(), rate=0.2, unit="token") as gate:
        token_loss(gate.model, double(B, T, FEATURES), torch.randint(K, (B, T)), double(B, T)).backward()
    assert len(messages) == 1 and "first axis is taken for the tokens" in messages[0]


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("shape", [(T, K), (T,), (K,), (T, 2, 3)])
def test_kept_bits_are_kept_one_by_one(shape, window):
    model, reference = copies(nn.Linear(FEATURES, torch.Size(shape).numel()).double())
    data = [(double(B, FEATURES), torch.randint(2, (B, *shape)).double(), double(B)) for _ in range(window)]

    def bits_loss(m, x, bits, advantages, w=1.0):
        logp = torch.distributions.Bernoulli(logits=m(x).view(bits.shape)).log_prob(bits)
        return (-logp * advantages.view(-1, *[1] * len(shape)) * w).sum() / B

    def out(m):
        m.register_forward_hook(lambda _m, _i, y: y.view(-1, *shape))
        return m

    model, reference = out(model), out(reference)
    with kondo.gated(model, rate=0.1, unit="token", window=window) as gate:
        for batch in data:
            bits_loss(model, *batch).backward()
    for batch, w in zip(data, gate.last.factors().view(-1, B, *shape), strict=True):
        bits_loss(reference, *batch, w).backward()
    assert_same_gradient(model, reference)


def test_actions_of_several_parts_are_kept_one_by_one():
    class Parts(nn.Linear):
        def forward(self, x):
            return super().forward(x).unflatten(-1, (3, K))

    model, reference = copies(Parts(FEATURES, 3 * K).double())
    x, actions, advantages = double(B, T, FEATURES), torch.randint(K, (B, T, 3)), double(B, T, 3)
    with kondo.gated(model, rate=0.1, unit="token") as gate:
        policy_loss(model(x), actions, advantages).backward()
    policy_loss(reference(x), actions, advantages, gate.last.factors().view(B, T, 3)).backward()
    assert_same_gradient(model, reference)


@pytest.mark.parametrize("case", ["classes first", "several a position", "shifted bits"])
def test_tokens_whose_positions_are_not_known_are_refused(case):
    class Out(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y.transpose(1, 2) if case == "classes first" else y

    model = Out(FEATURES, K).double()
    with kondo.gated(model, rate=0.2, unit="token"), pytest.raises(kondo.DelightError, match="unit='token'"):
        y = model(double(B, T, FEATURES))
        if case == "classes first":
            loss = F.cross_entropy(y, torch.randint(K, (B, T)), reduction="none")
        elif case == "several a position":
            loss = -y.log_softmax(-1).gather(-1, torch.randint(K, (B, T, 2)))
        else:
            bits = torch.randint(2, (B, T - 1, K)).double()
            loss = F.binary_cross_entropy_with_logits(y[:, 1:], bits, reduction="none")
        (loss * torch.randn(B, *[1] * (loss.dim() - 1)).double()).mean().backward()


# How many rows there are, where the inputs have several sizes on that axis.


class Recurrent(nn.Module):
    """A policy and a value of an LSTM, which returns its states beside them."""

    def __init__(self, layers, state_first):
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, 8, layers, batch_first=True)
        self.policy, self.value = nn.Linear(8, K), nn.Linear(8, 1)
        self.state_first = state_first

    def forward(self, *inputs):
        states, x = inputs if self.state_first else inputs[::-1]
        h, states = self.lstm(x, states)
        return self.policy(h), self.value(h).squeeze(-1), states


@pytest.mark.parametrize("state_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("rows", [5, 2])
def test_recurrent_states_do_not_outvote_the_rows(rows, layers, state_first):
    model, reference = copies(Recurrent(layers, state_first).double())
    x, states = double(rows, 4, FEATURES), (double(layers, rows, 8), double(layers, rows, 8))
    actions, advantages, returns = torch.randint(K, (rows, 4)), double(rows, 4), double(rows, 4)

    def loss(model, w=1.0):
        logits, value, _ = model(*((states, x) if state_first else (x, states)))
        return policy_loss(logits, actions, advantages, w) + (w * (value - returns).square()).mean()

    with told() as said, kondo.gated(model, rate=0.5) as gate:
        loss(model).backward()
    assert gate.stats.rows == rows and not said
    loss(reference, gate.last.factors()[:, None]).backward()
    assert_same_gradient(model, reference)


class Layout(nn.Module):
    """A policy by position, given back as ``layout`` has it, with masks that it may leave unused."""

    def __init__(self, layout, uses=True):
        super().__init__()
        self.layer, self.layout, self.uses = nn.Linear(FEATURES, K), layout, uses

    def forward(self, mask, x):
        logits = self.layer(x)
        if self.uses:
            logits = torch.einsum("ts,bsk->btk", mask, logits)
        return self.layout(logits)


@pytest.mark.parametrize(
    ("rows", "length", "uses"), [(5, 3, True), (3, 5, True), (5, 3, False), (3, 5, False), (4, 4, False)]
)
def test_a_mask_before_the_rows_does_not_outvote_them(rows, length, uses):
    model, reference = copies(Layout(lambda logits: logits.transpose(0, 1), uses).double())
    mask, x = double(length, length).tril(), double(rows, length, FEATURES)
    actions, advantages = torch.randint(K, (length, rows)), double(length, rows)
    with told() as said, kondo.gated(model, rate=0.5) as gate:
        policy_loss(model(mask, x), actions, advantages).backward()
    assert gate.stats.rows == rows and not said
    policy_loss(reference(mask, x), actions, advantages, gate.last.factors()).backward()
    assert_same_gradient(model, reference)


def test_sizes_of_which_no_run_shows_the_rows_are_told():
    model = Layout(lambda logits: logits.transpose(0, 1).flatten(0, 1), uses=False).double()
    x, actions, advantages = double(2, 3, FEATURES), torch.randint(K, (6,)), double(6)
    with told() as said, kondo.gated(model, rate=0.5), contextlib.suppress(RuntimeError):
        policy_loss(model(double(3, 3), x), actions, advantages).backward()
    assert "sizes 3, 2 on axis 0" in said[0]


# Positions are no rows.


def test_positions_that_are_as_many_as_rows_are_not_taken_for_rows():
    """The model treats both alike, and an input that nobody reads has its rows where they are expected."""
    model = Layout(lambda logits: logits.transpose(0, 1).flatten(0, 1), uses=False).double()
    x, actions, advantages = double(4, 4, FEATURES), torch.randint(K, (16,)), double(16)
    with kondo.gated(model, rate=0.25), pytest.raises(ValueError, match="flattened with another axis"):
        policy_loss(model(double(4, 4), x), actions, advantages).backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_lone_row_of_two_is_not_the_whole_batch():
    """A model of time-first terms, whose loss is its own: one row beside a copy has as many as the batch."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(FEATURES, K)

        def forward(self, x, actions, advantages, w):
            logits = self.layer(x).transpose(0, 1)
            return (-advantages.t() * pick(logits, actions.t()) * w).mean()

    model = Inner().double()
    x, actions, advantages = double(2, 2, FEATURES), torch.randint(K, (2, 2)), double(2, 2)
    with kondo.gated(model, rate=0.5), pytest.raises(kondo.ReplayMismatchError):
        model(x, actions, advantages, 1.0).backward()


@pytest.mark.parametrize("length", [2, 3])
def test_classes_before_positions_are_no_tokens(length):
    """(B, K, T) logits whose gradient would be cut along the classes."""
    model = nn.Sequential(nn.Linear(FEATURES, K)).double()
    x, actions, advantages = double(B, length, FEATURES), torch.randint(K, (B * length,)), double(B * length)

    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model

        def forward(self, x):
            return self.layer(x).transpose(1, 2)

    with kondo.gated(model := Classes(), rate=0.25, unit="token"), pytest.raises(kondo.DelightError, match="positions"):
        policy_loss(model(x).transpose(1, 2).flatten(0, 1), actions, advantages).backward()


def test_features_as_many_as_positions_are_cut_by_position():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy, self.features = nn.Linear(FEATURES, K), nn.Linear(FEATURES, 4)

        def forward(self, x):
            return self.policy(x), self.features(x)

    model, reference = copies(Both().double())
    x, actions, advantages = double(B, 4, FEATURES), torch.randint(K, (B, 4)), double(B, 4)

    def loss(model, w=1.0):
        logits, features = model(x)
        return policy_loss(logits, actions, advantages, w) + (features.square().mean(-1) * w).mean()

    with told() as said, kondo.gated(model, rate=0.25, unit="token") as gate:
        loss(model).backward()
    assert not said
    loss(reference, gate.last.factors().view(B, 4)).backward()
    assert_same_gradient(model, reference)


# Rows that are shorter together than the batch was.


class Packs(nn.Module):
    """A recurrent policy whose outputs are as long as the longest row that it is given."""

    def __init__(self):
        super().__init__()
        self.gru, self.policy = nn.GRU(FEATURES, 8, batch_first=True), nn.Linear(8, K)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.policy(nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0])


@pytest.mark.parametrize("longest", [True, False], ids=["the longest is kept", "shorter ones are kept"])
@pytest.mark.parametrize("options", [{}, {"window": 2}, {"micro_batch_size": 1}], ids=str)
def test_kept_rows_may_be_shorter_than_the_batch(options, longest):
    model, reference = copies(Packs().double())
    x, lengths = double(B, 6, FEATURES), torch.tensor([6, 1, 2, 3] * 3)
    actions, valid = torch.randint(K, (B, 6)), torch.arange(6) < lengths[:, None]
    advantages = double(B, 1).abs() * torch.where(lengths == (6 if longest else 2), 100.0, 1e-3)[:, None]

    def loss(model, w=1.0):
        return (-advantages * pick(model(x, lengths), actions) * valid * w).mean()

    with kondo.gated(model, rate=0.25, **options) as gate:
        for _ in range(options.get("window", 1)):
            loss(model).backward()
    assert set(lengths[gate.last.kept % B].tolist()) == ({6} if longest else {2})
    for w in gate.last.factors().view(-1, B):
        loss(reference, w[:, None]).backward()
    assert_same_gradient(model, reference)


# After screen() there is no full batch to see what has rows.


class Beside(nn.Module):
    """Returns, beside the policy, something that has as many entries as rows are kept."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, 4)

    def forward(self, x):
        return self.layer(x), self.layer.bias * 2


def test_a_shared_output_as_long_as_rows_are_kept_is_no_output_of_rows():
    model = Beside().double()
    x, actions, advantages = double(16, FEATURES), torch.randint(4, (16,)), double(16)
    for loss_of in (lambda logits, bias: 0.0, lambda logits, bias: bias.square().mean()):
        with kondo.gated(model, rate=0.25) as gate:
            gate.preselect(delight=torch.rand(16))
            logits, bias = model(x)
            assert bias.shape == (4,) and logits.shape == (16, 4)
            loss = policy_loss(logits, actions, advantages) + loss_of(logits, bias)
            refused = isinstance(loss_of(logits, bias), torch.Tensor)
            with pytest.raises(RuntimeError, match="no batch axis") if refused else contextlib.nullcontext():
                loss.backward()


def test_rows_that_are_trimmed_to_as_many_positions_as_rows_are_kept():
    class Trims(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(FEATURES, K)

        def forward(self, x, mask):
            return self.layer(x[:, : int(mask.sum(1).max())])

    model = Trims().double()
    mask = torch.arange(6) < torch.tensor([3] * 3 + [6] * 9)[:, None]
    with kondo.gated(model, rate=0.25) as gate:
        gate.preselect(kept=torch.arange(B) < 3)
        assert model(double(B, 6, FEATURES), mask).shape == (B, 3, K)


@pytest.mark.parametrize("layout", ["packed", "jagged"])
def test_packed_outputs_after_a_screen_are_refused(layout):
    class OnData(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(FEATURES, K)

        def forward(self, x):
            if layout == "jagged":
                return self.layer(x)
            return nn.utils.rnn.PackedSequence(self.layer(x.data), *x[1:])

    rows = [torch.randn(1 + i % 3, FEATURES) for i in range(B)]
    if layout == "packed":
        x = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    else:
        x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with kondo.gated(OnData(), rate=0.25) as gate:
        gate.preselect(delight=torch.rand(B))
        with pytest.raises(RuntimeError, match="packed or jagged"):
            gate.model(x)
