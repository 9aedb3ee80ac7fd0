"""What a forward leaves in its modules: buffers and attributes change once a step, and what a loss takes from them is
an output like any other.
"""

import copy
import gc
import warnings
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import kondo_hooks as kondo
from kondo_hooks import private
from tests.cases import FEATURES, K, Mlp, make_batch
from tests.reference import copies, grads, kept_mask, largest_relative_difference
from tests.test_context import check, reinforce


@pytest.fixture
def batch():
    return make_batch(12, False, torch.float64)


def train(model, batch, steps=5, **options):
    """Steps without an optimizer, gated or plain."""
    with kondo.gated(model, **options) as gate:
        for _ in range(steps):
            model.zero_grad()
            reinforce(model(batch.x), batch).backward()
    return gate


# Buffers.


class Statistics(Mlp):
    """Updates a buffer from call ``start`` on, in one of three ways."""

    def __init__(self, way, start):
        super().__init__()
        self.way, self.start = way, start
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", None if way == "made" else torch.zeros(FEATURES))

    def forward(self, x):
        result = super().forward(x if self.mean is None else x / (1 + self.mean.abs()))
        if self.calls >= self.start:
            if self.way == "in place":
                self.mean.lerp_(x.mean(0), 0.1)
            elif self.mean is None:
                self.mean = x.mean(0)
            else:
                self.mean = self.mean.lerp(x.mean(0), 0.1)
        self.calls += 1
        return result


@pytest.mark.parametrize("way, start", [("replaced", 0), ("replaced", 2), ("made", 0), ("made", 2), ("in place", 0)])
def test_a_buffer_is_updated_once_a_step_whatever_call_it_first_changes_in(way, start, batch):
    model, reference = copies(Statistics(way, start).double())
    gate = train(model, batch, rate=0.25)
    train(reference, batch, steps=4, rate=1.0)
    reference.zero_grad()
    check(model, reference, batch, gate)
    torch.testing.assert_close(model.mean, reference.mean)
    assert model.calls == reference.calls == 5


def test_a_value_that_is_lost_is_told_and_not_guessed(batch):
    model, reference = copies(Statistics("in place", 2).double())
    with pytest.raises(kondo.ReplayMismatchError):
        train(model, batch, rate=0.25)
    train(reference, batch, steps=3, rate=1.0)
    torch.testing.assert_close(model.mean, reference.mean)


def test_a_buffer_that_the_first_call_registers(batch):
    class Lazy(Mlp):
        def forward(self, x):
            if not hasattr(self, "shift"):
                self.register_buffer("shift", torch.ones(FEATURES).to(x))
            result = super().forward(x - self.shift)
            self.shift = self.shift + 0.1
            return result

    model, reference = copies(Lazy().double())
    gate = train(model, batch, 1, rate=0.25)
    check(model, reference, batch, gate)
    torch.testing.assert_close(model.shift, reference.shift)


@pytest.mark.parametrize("kind", ["sparse", "csr", "inference", "meta", "quantised"])
@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|quantize|deprecat).*")
def test_buffers_of_every_kind(kind, batch):
    class Graph(Mlp):
        def __init__(self):
            super().__init__()
            self.register_buffer("adjacency", (torch.eye(FEATURES) + torch.eye(FEATURES).roll(1, 0)).double())
            if kind == "sparse":
                self.adjacency = self.adjacency.to_sparse()
            elif kind == "csr":
                self.adjacency = self.adjacency.to_sparse_csr()
            elif kind == "inference":
                with torch.inference_mode():
                    self.adjacency = self.adjacency * 1
            elif kind == "meta":
                self.register_buffer("unused", torch.empty(3, device="meta"))
            else:
                self.register_buffer("unused", torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8))

        def forward(self, x):
            return super().forward((self.adjacency @ x.mT).mT)

    model, reference = Graph().double(), Graph().double()
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if "body" in k}, strict=False)
    gate = train(model, batch, 1, rate=0.25)
    check(model, reference, batch, gate)


@pytest.mark.parametrize("updates", [False, True])
def test_a_scripted_submodule_with_a_buffer(updates, batch):
    class Norm(nn.Module):
        updates: torch.jit.Final[bool]

        def __init__(self):
            super().__init__()
            self.updates = updates
            self.register_buffer("mean", torch.zeros(FEATURES).double())

        def forward(self, x):
            result = x - self.mean
            if self.updates:
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
                self.mean += 0.01
            return result

    plain = nn.Sequential(Norm(), nn.Linear(FEATURES, K)).double()
    model = nn.Sequential(torch.jit.script(Norm()), nn.Linear(FEATURES, K)).double()
    model.load_state_dict(plain.state_dict())
    gate = train(model, batch, 1, rate=0.25)
    check(model, plain, batch, gate)
    torch.testing.assert_close(model[0].mean, plain[0].mean)


# What a loss takes from the module.


def exact(model, batch, loss, steps=2, between=None, told=False, **options):
    """Gated steps against masked full backwards, ``loss(model, weights)`` called like the user's step."""
    reference = copy.deepcopy(model)
    with warnings.catch_warnings():
        if not told:
            warnings.simplefilter("error", kondo.KondoWarning)
            warnings.filterwarnings("ignore", ".*holds no policy")
        with kondo.gated(model, **{"rate": 0.25, **options}) as gate:
            for _ in range(steps):
                model.zero_grad()
                loss(model, None).backward()
                reference.zero_grad()
                loss(reference, gate.last.factors().to(batch.x.dtype)).backward()
                assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    assert gate.stats.forwarded < gate.stats.rows
    return gate, reference


def policy(logits, batch, w=None):
    return reinforce(logits, batch, w)


def weighted(values, w):
    return (values if w is None else values * w).mean()


class Inner:
    """An object of the user's, with slots."""

    __slots__ = ("note", "values")

    def __init__(self, values):
        self.values, self.note = values, "last"


class Leaves(Mlp):
    """Leaves the mean square of its first layer's rows in one of many places."""

    def __init__(self, place):
        super().__init__()
        self.place, self.kept, self.log = place, [], {"rows": []}
        self.space, self.recent = SimpleNamespace(inner={}), deque(maxlen=2)

    def forward(self, x):
        rows = self.body[0](x).pow(2).mean(1)
        if self.place == "attribute":
            self.rows = rows
        elif self.place == "submodule":
            self.body[0].rows = rows
        elif self.place == "list":
            self.kept.append(rows)
        elif self.place == "dict of lists":
            self.log["rows"].append((rows, "a name"))
        elif self.place == "namespace":
            self.space.inner["rows"] = rows
        elif self.place == "deque":
            self.recent.append(rows)
        elif self.place == "object":
            self.held = Inner(rows)
        elif self.place == "tuple":
            self.pair = (x.detach(), {"rows": rows})
        else:
            self.rows = torch.distributions.Normal(rows, 1.0)
        return super().forward(x)

    def left(self):
        return {
            "attribute": lambda: self.rows,
            "submodule": lambda: self.body[0].rows,
            "list": lambda: self.kept.pop(),
            "dict of lists": lambda: self.log["rows"].pop()[0],
            "namespace": lambda: self.space.inner["rows"],
            "deque": lambda: self.recent[-1],
            "object": lambda: self.held.values,
            "tuple": lambda: self.pair[1]["rows"],
            "distribution": lambda: self.rows.loc,
        }[self.place]()


PLACES = ["attribute", "submodule", "list", "dict of lists", "namespace", "deque", "object", "tuple", "distribution"]


@pytest.mark.parametrize("place", PLACES)
def test_what_a_forward_leaves_in_the_module_has_its_gradient(place, batch):
    exact(Leaves(place).double(), batch, lambda m, w: policy(m(batch.x), batch, w) + weighted(m.left(), w), steps=3)


@pytest.mark.parametrize("place", PLACES)
def test_what_the_user_took_away_stays_away_and_what_was_left_is_left_once(place, batch):
    model, reference = copies(Leaves(place).double())
    for m, rate in ((model, 0.25), (reference, 1.0)):
        with kondo.gated(m, rate=rate):
            for _ in range(3):
                loss = policy(m(batch.x), batch)
                m.log["rows"].clear()
                loss.backward()
    for name in ("kept", "recent"):
        assert len(getattr(model, name)) == len(getattr(reference, name))
    assert model.log == reference.log == {"rows": []}
    assert vars(model).keys() == vars(reference).keys()


def test_the_log_prob_is_asked_from_a_distribution_in_the_module(batch):
    class Actor(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.value = Mlp(), nn.Linear(FEATURES, 1)

        def forward(self, x):
            self.dist = torch.distributions.Categorical(logits=self.net(x))
            return self.dist.sample()

        def log_prob(self, actions):
            return self.dist.log_prob(actions)

    def loss(m, w):
        m(batch.x)
        terms = -m.log_prob(batch.actions) * batch.advantages - 0.1 * m.dist.entropy()
        assert m.dist._param is m.dist.logits
        return weighted(terms, w)

    model = Actor().double()
    gate, _ = exact(model, batch, loss, told=True)
    with torch.no_grad():
        model(batch.x)
        delight = -model.log_prob(batch.actions) * batch.advantages
    torch.testing.assert_close(gate.last.delight, delight)


def test_a_tensor_that_is_returned_and_left_is_one(batch):
    class Both(Mlp):
        def forward(self, x):
            self.logits = super().forward(x)
            return {"logits": self.logits, "again": self.logits}

    def loss(m, w):
        out = m(batch.x)
        assert out["logits"] is m.logits is out["again"]
        return policy(out["logits"], batch, w) + weighted(m.logits.pow(2).mean(1), w)

    exact(Both().double(), batch, loss)


@pytest.mark.parametrize("form", ["list", "dict", "attribute"])
def test_a_routers_loss_in_the_module_is_taken_apart(form, batch):
    class Router(Mlp):
        def __init__(self):
            super().__init__()
            self.router, self.losses = nn.Linear(FEATURES, 3), [] if form == "list" else {}

        def forward(self, x):
            z = self.router(x).logsumexp(-1).pow(2).mean()
            if form == "list":
                self.losses.append(z)
            elif form == "dict":
                self.losses["z"] = z
            else:
                self.z = z
            return super().forward(x)

        def total(self):
            if form == "attribute":
                return self.z
            losses = list(self.losses.values() if form == "dict" else self.losses)
            self.losses.clear()
            return sum(losses)

    def loss(m, w):
        logits = m(batch.x)
        if w is None:
            return policy(logits, batch) + m.total()
        m.total()
        return policy(logits, batch, w) + weighted(m.router(batch.x).logsumexp(-1).pow(2), w)

    exact(Router().double(), batch, loss, steps=3)


class Balanced(Mlp):
    def __init__(self):
        super().__init__()
        self.router, self.losses = nn.Linear(FEATURES, 3), []

    def forward(self, x):
        self.losses.append(self.router(x).softmax(-1).mean(0).pow(2).sum())
        return super().forward(x)


def test_a_balancing_loss_in_the_module_is_an_error_only_where_it_is_used(batch):
    model = Balanced().double()
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match="no row for each sample"):
        (policy(model(batch.x), batch) + sum(model.losses)).backward()
    model, logged = Balanced().double(), []

    def loss(m, w):
        logits = m(batch.x)
        logged.append(float(sum(m.losses).detach()))
        m.losses.clear()
        return policy(logits, batch, w)

    exact(model, batch, loss)
    assert len(set(logged)) == 1


def test_a_balancing_loss_in_the_module_on_the_kept_rows(batch):
    model = Balanced().double()
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25, shared_loss="kept") as gate:
        (policy(model(batch.x), batch) + sum(model.losses)).backward()
    assert len(model.losses) == 1
    (policy(reference(batch.x), batch, gate.last.factors().double())).backward()
    reference.losses.clear()
    reference(batch.x[gate.last.kept])
    reference.losses[0].backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_what_is_detached_stays_detached_from_the_first_step_on(batch):
    class Logs(Mlp):
        def forward(self, x):
            hidden = self.body[0](x)
            self.spread, self.norm = hidden.std(1).detach(), hidden.norm().item()
            self.cache = torch.arange(len(x)).double() if not hasattr(self, "cache") else self.cache
            return super().forward(x)

    def loss(m, w):
        logits = m(batch.x)
        assert not m.spread.requires_grad and not m.cache.requires_grad
        m.spread.numpy()
        return policy(logits, batch, w)

    exact(Logs().double(), batch, loss)


def test_a_model_whose_attributes_lead_to_the_node_is_freed(batch):
    class Left(Mlp):
        def forward(self, x):
            self.hidden = self.body[0](x)
            self.also = [self.hidden.sum(1)]
            return super().forward(x)

    model = Left().double()
    with kondo.gated(model, rate=0.25):
        for _ in range(2):
            (policy(model(batch.x), batch) + model.also[0].mean()).backward()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("window", [1, 2])
def test_several_calls_are_packed_whatever_they_leave(window):
    batch, halves = make_batch(10, False, torch.float64), (slice(0, 5), slice(5, 10))

    class Left(Mlp):
        def forward(self, x):
            self.last = SimpleNamespace(hidden=self.body[0](x))
            return super().forward(x)

    model, reference = copies(Left().double())
    sizes = []
    net = model.body[0].forward
    model.body[0].forward = lambda x: (sizes.append(len(x)) if torch.is_grad_enabled() else None, net(x))[1]
    with kondo.gated(model, rate=0.25, window=window) as gate:
        for _ in range(2):
            model.zero_grad() if window == 1 else None
            total = 0
            for half in halves:
                part = batch.rows(half)
                total = total + policy(model(part.x), part) + model.last.hidden.pow(2).mean()
            sizes.clear()
            total.backward()
    w = gate.last.factors().double().reshape(-1, 2, 5)
    for backward in w:
        for half, weights in zip(halves, backward, strict=True):
            part = batch.rows(half)
            logits = reference(part.x)
            terms = policy(logits, part, weights) + weighted(reference.last.hidden.pow(2).mean(1), weights)
            terms.backward()
    assert len(sizes) <= 2 * window  # the first call found nothing in the attribute; the others are one batch
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


# What a forward reads.


def test_counters_and_running_values_in_attributes_change_once_a_step(batch):
    class Counts(Mlp):
        def __init__(self):
            super().__init__()
            self.calls, self.mean, self.seen, self.stats = 0, None, torch.zeros(FEATURES).double(), {"n": 0}

        def forward(self, x):
            scale = 1 + 0.1 * self.calls + self.seen.abs()
            self.calls += 1
            self.stats["n"] += len(x)
            self.mean = float(x.mean()) if self.mean is None else 0.9 * self.mean + 0.1 * float(x.mean())
            self.seen += x.mean(0)
            return super().forward(x / scale)

    model = Counts().double()
    _, reference = exact(model, batch, lambda m, w: policy(m(batch.x), batch, w), steps=3)
    assert (model.calls, model.stats, model.mean) == (3, {"n": 36}, reference.mean)
    torch.testing.assert_close(model.seen, reference.seen)


@pytest.mark.parametrize("held", ["attribute", "tuple", "dict"])
def test_a_hidden_state_in_an_attribute_is_cut_into_rows(held, batch):
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head, self.state = nn.GRUCell(FEATURES, 8), nn.Linear(8, K), None

        def forward(self, x):
            h = self.state[0] if held == "tuple" and self.state is not None else self.state
            h = h["h"] if held == "dict" and h is not None else h
            h = self.cell(x, x.new_zeros(len(x), 8) if h is None else h)
            keep = h.detach()
            self.state = keep if held == "attribute" else (keep, 1) if held == "tuple" else {"h": keep}
            return self.head(h)

    def loss(m, w):
        return policy(m(batch.x), batch, w) + policy(m(batch.x.flip(1)), batch, w)

    def halves(m, w):
        first, second = (None, None) if w is None else (w[:12], w[12:])
        return policy(m(batch.x), batch, first) + policy(m(batch.x.flip(1)), batch, second)

    exact(Stateful().double(), batch, halves, steps=3)


@pytest.mark.parametrize("kind", ["string", "number", "module", "parameter", "inside a submodule", "in a dict"])
def test_what_the_user_switches_between_call_and_backward_is_as_it_was(kind, batch):
    class Adapters(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.on, self.options = Mlp(), "a", {"on": "a"}
            self.a, self.b = (nn.Sequential(nn.Linear(FEATURES, 2), nn.Linear(2, K, bias=False)) for _ in range(2))
            for adapter in (self.a, self.b):
                nn.init.zeros_(adapter[1].weight)
            self.base.scale, self.active = 1.0, 0

        def forward(self, x):
            name = self.options["on"] if kind == "in a dict" else self.on
            name = "ab"[self.active] if kind == "number" else name
            return self.base(x) * self.base.scale + getattr(self, name)(x)

        def switch(self, back):
            if kind == "string":
                self.on = "a" if back else "b"
            elif kind == "number":
                self.active = 0 if back else 1
            elif kind == "in a dict":
                self.options["on"] = "a" if back else "b"
            elif kind == "inside a submodule":
                self.base.scale = 1.0 if back else 0.0
            elif kind == "module":
                self.a, self.b = self.b, self.a
            else:
                self.a[1].weight, self.b[1].weight = self.b[1].weight, self.a[1].weight

    def loss(m, w):
        result = policy(m(batch.x), batch, w)
        m.switch(False)
        return result

    model = Adapters().double()
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25) as gate:
        loss(model, None).backward()
        model.switch(True)
    loss(reference, gate.last.factors().double()).backward()
    reference.switch(True)
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


# Layers that are made late.


def test_lazily_made_layers(batch):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.LazyLinear(8), None

        def forward(self, x):
            hidden = self.first(x).tanh()
            if self.head is None:
                self.head = nn.Linear(8, K).to(x)
            return self.head(hidden)

    model = Late().double()
    with kondo.gated(model, rate=0.25) as gate:
        policy(model(batch.x), batch).backward()
        reference = copy.deepcopy(model)
        reference.zero_grad()
        policy(reference(batch.x), batch, gate.last.factors().double()).backward()
        assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
        policy(model(batch.x), batch).backward()


# After screen() the kept rows run alone, and what they leave has all rows again.


class LeavesRows(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer, self.make = nn.Linear(FEATURES, K), make

    def forward(self, x):
        self.left = {"policy": [self.make(self.layer(x))]}
        return self.layer(x).sum(-1)


@pytest.mark.parametrize("kept", ["some", "none", "all"])
@pytest.mark.parametrize("kind", ["tensor", "Categorical", "Normal", "Independent"])
def test_what_is_left_after_a_screen_has_all_rows(kind, kept, batch):
    make = {
        "tensor": lambda y: y,
        "Categorical": lambda y: torch.distributions.Categorical(logits=y),
        "Normal": lambda y: torch.distributions.Normal(y, torch.ones(K)),
        "Independent": lambda y: torch.distributions.Independent(torch.distributions.Normal(y, y.exp()), 1),
    }[kind]
    values = torch.randn(12, K, dtype=torch.float64)

    def loss(model, w):
        model(batch.x)
        left = model.left["policy"][0]
        if kind == "tensor":
            logp = left.log_softmax(-1).gather(-1, batch.actions[:, None]).squeeze(-1)
        else:
            logp = left.log_prob(batch.actions if kind == "Categorical" else values)
        return (w * (logp.sum(-1) if logp.dim() > 1 else logp) * batch.advantages).mean()

    model, reference = copies(LeavesRows(make).double())
    delight = {"some": torch.rand(12), "none": -torch.ones(12), "all": torch.ones(12)}[kept]
    with kondo.gated(model, price=0.5) as gate:
        for _ in range(2):  # the second call finds what the first has left
            model.zero_grad()
            weights = gate.preselect(delight=delight).factors()
            loss(model, 1.0).backward()
    loss(reference, weights).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_warmup_ends_where_a_loss_takes_its_tensors_from_attributes(batch):
    model = LeavesRows(lambda y: y).double()
    with kondo.gated(model, rate=0.25, warmup_steps=2) as gate:
        for _ in range(3):
            model.zero_grad()
            model(batch.x)
            reinforce(model.left["policy"][0], batch).backward()
    assert gate.stats.steps == 3 and gate.stats.forwarded == 3 + 12 + 12


# Views of parameters, objects of the module's own, what an earlier call left, buffers.


class Gaussian(nn.Module):
    """Keeps its distribution, whose scale is a view of a parameter."""

    def __init__(self, view):
        super().__init__()
        self.layer, self.std, self.view = nn.Linear(FEATURES, 3), nn.Parameter(torch.rand(3) + 0.5), view

    def forward(self, x):
        mean = self.layer(x)
        self.distribution = torch.distributions.Normal(mean, self.view(self.std, mean))
        return mean.detach()


@pytest.mark.parametrize("route", ["hook", "screen", "micro-batches"])
@pytest.mark.parametrize(
    "view",
    [lambda std, mean: std.expand_as(mean), lambda std, mean: std, lambda std, mean: std[None] * 1],
    ids=["expanded", "broadcast", "computed"],
)
def test_a_view_of_a_parameter_that_is_left_is_an_output(view, route, batch):
    model, reference = copies(Gaussian(view).double())
    actions = torch.randn(12, 3, dtype=torch.float64)

    def loss(model, w=1.0):
        model(batch.x)
        return -(model.distribution.log_prob(actions).sum(-1) * batch.advantages * w).mean()

    options = {"micro_batch_size": 1} if route == "micro-batches" else {}
    with kondo.gated(model, rate=0.25, **options) as gate:
        weights = gate.preselect(delight=torch.rand(12)).factors() if route == "screen" else None
        loss(model).backward()
    loss(reference, gate.last.factors() if weights is None else weights).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_an_object_that_the_module_keeps_may_be_returned(batch):
    class Holder:
        pass

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.holder = nn.Linear(FEATURES, K), Holder()

        def forward(self, x):
            self.holder.distribution = torch.distributions.Categorical(logits=self.layer(x))
            return self.holder

    def loss(model, w=1.0):
        return -(model(batch.x).distribution.log_prob(batch.actions) * batch.advantages * w).mean()

    model, reference = copies(Keeps().double())
    with kondo.gated(model, rate=0.25) as gate:
        loss(model).backward()
    loss(reference, gate.last.factors()).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


class Shares(nn.Module):
    """Features of the policy's call that the value's call takes from the module."""

    def __init__(self, detach):
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(FEATURES, 8), nn.Linear(8, K), nn.Linear(8, 1)
        self.detach, self.kept = detach, None

    def act(self, x, role):
        if role == "policy":
            self.kept = h = self.body(x).tanh()
            return self.policy(h)
        h, self.kept = self.kept, None
        return self.value(h.detach() if self.detach else h).squeeze(-1)


@pytest.mark.parametrize("read", [True, False])
def test_reading_what_an_earlier_call_left_with_its_graph_is_told(read, batch):
    model = Shares(False).double() if read else Leaves("attribute").double()
    with warnings.catch_warnings(record=True) as seen, kondo.gated(model, rate=0.25, method="act" if read else None):
        warnings.simplefilter("always")
        for _ in range(2):
            if read:
                logits, value = model.act(batch.x, "policy"), model.act(batch.x, "value")
                (reinforce(logits, batch) + value.square().mean()).backward()
            else:
                reinforce(model(batch.x), batch).backward()
    told = [str(w.message) for w in seen if "reads the attribute" in str(w.message)]
    assert len(told) == read


def test_a_graph_in_a_buffer_is_told(batch):
    class Buffered(Mlp):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(12, K))

        def forward(self, x):
            self.last = super().forward(x)
            return self.last * 2

    model = Buffered().double()
    with pytest.warns(kondo.KondoWarning, match="into its buffer last"), kondo.gated(model, rate=0.25):
        (reinforce(model(batch.x), batch) + model.last.square().mean()).backward()


def test_a_state_of_all_rows_after_a_screen_is_an_error_of_the_gate(batch):
    class State(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.state = nn.Linear(FEATURES, K), torch.zeros(12, K, dtype=torch.float64)

        def forward(self, x):
            self.state = (self.layer(x) + self.state.detach()).tanh()
            return self.state

    model = State().double()
    with kondo.gated(model, rate=0.25) as gate:
        gate.preselect(delight=torch.rand(12))
        with pytest.raises(RuntimeError, match=r"after preselect.* 3 of the 12 rows .*If it keeps a state"):
            model(batch.x)


# Children.


class Cached(Mlp):
    """Remembers features while it samples, as decoders do: in a module that is put in for that and taken out again."""

    def __init__(self):
        super().__init__()
        self.cache = None

    def forward(self, x):
        return super().forward(x if self.cache is None else self.cache(x))

    def sample(self, x, leaves):
        cache = nn.Module()
        cache.register_buffer("seen", torch.zeros_like(x))
        cache.forward = lambda x: x + cache.seen
        self.cache = cache
        with torch.no_grad():
            self(x)
        if leaves == "a name without a child":
            self.cache = None
        elif leaves == "nothing":
            del self.cache
            self.cache = None


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"window": "step"}, {"first": True}], ids=str)
@pytest.mark.parametrize("leaves", ["a name without a child", "nothing"])
def test_a_child_that_is_taken_out_again_is_no_other_model(batch, leaves, options):
    ours, theirs = copies(Cached().double())
    options = dict(options)
    first = options.pop("first", False)
    with kondo.gated(ours, rate=0.25, **options) as gate:
        for _ in range(2):
            ours.sample(batch.x, leaves)
            if first:
                gate.preselect(delight=torch.rand(12))
            reinforce(ours(batch.x), batch).backward()
            ours.sample(batch.x, leaves)
            if not options:
                for factors in gate.last.factors().split(12):
                    reinforce(theirs(batch.x), batch, factors).backward()
    if options:
        for factors in gate.last.factors().split(12):
            reinforce(theirs(batch.x), batch, factors).backward()
    assert gate.stats.kept == 6
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_a_child_that_stays_is_refused_by_name(batch):
    model = Cached().double()
    with kondo.gated(model, rate=0.25):
        model.sample(batch.x, "the child")
        with pytest.raises(RuntimeError, match="submodules of the model were replaced inside"):
            model(batch.x)


@pytest.fixture
def _one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("kind", [DistributedDataParallel, FullyShardedDataParallel])
@pytest.mark.parametrize("derived", [False, True])
def test_what_a_wrapper_notes_in_itself_is_its_own_affair(kind, derived):
    """FSDP notes in each forward with a graph what its backward looks at, also where a trainer derives from it."""
    net, reference = copies(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double())
    wrapper = type("Derived", (kind,), {}) if derived else kind
    options = {"device_id": torch.device("cpu")} if kind is FullyShardedDataParallel else {}
    model = wrapper(net, **options)
    g = torch.Generator().manual_seed(0)
    x, u = torch.randn(8, 3, generator=g, dtype=torch.float64), torch.randn(8, generator=g, dtype=torch.float64)

    def loss(m, w=1):
        return -(m(x).log_softmax(-1)[:, 0] * u * w).mean()

    with kondo.gated(model, rate=0.25, window="step") as gate:
        loss(model).backward()
        ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    loss(reference, kept_mask(gate.last.kept, 8, torch.float64)).backward()
    torch.testing.assert_close(ours, torch.cat([p.grad.flatten() for p in reference.parameters()]))


@pytest.mark.parametrize("version", [(2, 8), (2, 13)])
def test_a_forward_with_a_state_is_screened_once_whatever_the_version(batch, version, monkeypatch):
    """Before torch 2.11 the gate has a hook of its own on the module."""
    monkeypatch.setattr(private, "_version", lambda: version)

    class Counting(Mlp):
        def __init__(self):
            super().__init__()
            self.calls = []

        def forward(self, x):
            self.calls.append(x.mean().detach())
            return super().forward(x) * len(self.calls)

    ours, theirs = copies(Counting().double())
    with kondo.gated(ours, rate=0.25) as gate:
        for _ in range(2):
            reinforce(ours(batch.x), batch).backward()
            reinforce(theirs(batch.x), batch, gate.last.factors()).backward()
    assert len(ours.calls) == 2 and not ours._forward_pre_hooks
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


@pytest.mark.parametrize("window", [3, 1])
def test_a_buffer_that_is_written_over_with_what_it_holds_changes_nothing(window):
    """DDP's broadcast of buffers does that before every forward; by itself a last call then writes other values."""
    runs, more = [], [0.0]

    class Rewrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)
            self.register_buffer("shift", torch.linspace(-1, 1, 3))

        def forward(self, x):
            runs.append(torch.is_grad_enabled())
            self.shift.copy_(self.shift + more[0])
            return self.linear(x) + self.shift

    model, reference = copies(Rewrites().double())
    g = torch.Generator().manual_seed(0)

    def loss(logits, actions, u):
        return -(u * logits.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)).mean()

    factors, batches = [], []
    with kondo.gated(model, rate=0.5, window=window, audit=0) as gate:
        for i in range(3):
            x, u = torch.randn(6, 5, generator=g).double(), torch.randn(6, generator=g).double()
            batches.append((x, torch.randint(3, (6,), generator=g), u))
            more[0] = float(window == 1 and i == 2)
            loss(model(x), *batches[-1][1:]).backward()
            factors += gate.last.factors().split(6) if (i + 1) % window == 0 else []
    assert sum(runs) == 3 // window
    for i, ((x, actions, u), w) in enumerate(zip(batches, factors, strict=True)):
        loss(reference.linear(x) + reference.shift + (window == 1 and i == 2), actions, u * w).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    torch.testing.assert_close(model.shift, reference.shift + more[0])
