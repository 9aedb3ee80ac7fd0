"""What people pass to a model and return from it: exact, or an error that says what to do."""

import collections
import copy
import dataclasses
import functools
import types
from array import array
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.distributions as D
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import kondo_hooks as kondo
from kondo_hooks.rows.tree import flatten, map_tensors
from tests.reference import copies, grads, kept_mask, largest_relative_difference

N, F, K = 16, 5, 4


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def assert_exact(model, call, loss, rate=0.25, steps=1, n=N, **options):
    """``loss(call(model), w)`` with a gate and with the dropped rows' terms times zero, w (n,), give one gradient."""
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=rate, priority="uniform", **options) as gate:
        for _ in range(steps):
            loss(call(model), torch.ones(n)).backward()
            w = kept_mask(gate.last.kept, n, torch.get_default_dtype())
            loss(call(reference), w).backward()
    assert 0 < gate.stats.kept < n * steps
    worst = largest_relative_difference(grads(model), grads(reference))
    assert worst < 1e-10, f"off by {worst:.1e}"
    return gate


class Net(nn.Module):
    """Logits and a value, in what ``wrap`` makes of them."""

    def __init__(self, wrap):
        super().__init__()
        self.body, self.pi, self.v = nn.Linear(F, 8), nn.Linear(8, K), nn.Linear(8, 1)
        self.wrap = wrap

    def forward(self, x):
        h = self.body(x).tanh()
        return self.wrap(self.pi(h), self.v(h)[:, 0])


class Plain:
    def __init__(self, logits, value):
        self.logits, self.value = logits, value


class Slotted:
    __slots__ = ("__private", "logits", "value")

    def __init__(self, logits, value):
        self.logits, self.value, self.__private = logits, value, None

    def __setattr__(self, name, value):
        if hasattr(self, name):
            raise AttributeError("made once")
        object.__setattr__(self, name, value)


class SlotsOfTwo(Slotted):
    __slots__ = ("more",)


class WithProperty:
    """What it shows is computed from what it holds."""

    asked = 0

    def __init__(self, logits, value):
        self._held = {"logits": logits, "value": [value]}

    @property
    def logits(self):
        type(self).asked += 1
        return self._held["logits"]

    @property
    def value(self):
        return self._held["value"][0]

    def __copy__(self):
        raise AssertionError("the class's own code is not run")

    __reduce__ = __deepcopy__ = __copy__


class ByRow(Mapping):
    """A mapping whose [] takes rows, not keys."""

    def __init__(self, **items):
        self._items = items

    def __getitem__(self, rows):
        return ByRow(**{key: value[rows] for key, value in self._items.items()})

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)

    @property
    def logits(self):
        return self._items["logits"]

    @property
    def value(self):
        return self._items["value"]


class Bunch(dict):
    """Keys as attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    logits: torch.Tensor
    value: torch.Tensor
    sizes: tuple = (1, 2)


def _cyclic(logits, value):
    out = types.SimpleNamespace(logits=logits)
    out.inner = types.SimpleNamespace(parent=out, value=value)
    out.value = None
    return out


WRAPS = {
    "namespace": lambda logits, value: types.SimpleNamespace(logits=logits, value=value),
    "plain": Plain,
    "slots": Slotted,
    "slots_inherited": SlotsOfTwo,
    "properties": WithProperty,
    "mapping_by_row": lambda logits, value: ByRow(logits=logits, value=value),
    "bunch": lambda logits, value: Bunch(logits=logits, value=value),
    "frozen_slots": FrozenSlots,
    "read_only": lambda logits, value: Plain(logits, types.SimpleNamespace(v=(value, 3))),
    "cyclic": _cyclic,
}


def policy_and_value_loss(out, w):
    value = out.inner.parent.inner.value if hasattr(out, "inner") else out.value
    value = value.v[0] if hasattr(value, "v") else value
    return ((out.logits.log_softmax(-1)[:, 1] * 0.3 - (value - 1).pow(2)) * w).mean()


@pytest.mark.parametrize("name", WRAPS)
def test_outputs_in_objects_of_any_kind(name):
    x = torch.randn(N, F)
    assert_exact(Net(WRAPS[name]), lambda m: m(x), policy_and_value_loss)


@pytest.mark.parametrize("name", WRAPS)
def test_inputs_in_objects_of_any_kind(name):
    class Reads(Net):
        def forward(self, batch):
            value = batch.inner.parent.inner.value if hasattr(batch, "inner") else batch.value
            value = value.v[0] if hasattr(value, "v") else value
            assert len(value) == len(batch.logits)
            return super().forward(batch.logits) * value[:, None]

    batch = WRAPS[name](torch.randn(N, F), torch.rand(N))
    model = Reads(lambda logits, value: logits + value[:, None])
    assert_exact(model, lambda m: m(batch), lambda y, w: (y.log_softmax(-1)[:, 0] * w).mean())


def test_an_object_stays_one_object_and_a_tensor_one_tensor():
    def wrap(logits, value):
        shared = Plain(logits, value)
        return {"a": shared, "b": [shared, logits], "c": (logits, value)}

    def loss(out, w):
        assert out["a"] is out["b"][0] and out["a"].logits is out["b"][1] is out["c"][0]
        terms = out["a"].logits.log_softmax(-1)[:, 1] + out["b"][1].pow(2).sum(-1) + out["c"][0][:, 2]
        return (terms * w).mean() + (out["c"][1] * w).mean()

    x = torch.randn(N, F)
    assert_exact(Net(wrap), lambda m: m(x), loss)


def _normal(logits, value):
    return D.Normal(logits, value.exp()[:, None].expand_as(logits))


DISTRIBUTIONS = {
    "normal": (_normal, lambda n: torch.zeros(n, K), lambda t: t.sum(-1)),
    "categorical": (lambda p, v: D.Categorical(logits=p), lambda n: torch.arange(n) % K, lambda t: t),
    "categorical_of_probs": (
        lambda p, v: D.Categorical(probs=p.softmax(-1)),
        lambda n: torch.arange(n) % K,
        lambda t: t,
    ),
    "bernoulli": (lambda p, v: D.Bernoulli(logits=p), lambda n: torch.ones(n, K), lambda t: t.sum(-1)),
    "independent": (lambda p, v: D.Independent(_normal(p, v), 1), lambda n: torch.zeros(n, K), lambda t: t),
    "beta": (lambda p, v: D.Beta(p.exp(), p.exp() + 1), lambda n: torch.full((n, K), 0.3), lambda t: t.sum(-1)),
    "dirichlet": (lambda p, v: D.Dirichlet(p.exp()), lambda n: torch.full((n, K), 1 / K), lambda t: t),
    "multivariate": (
        lambda p, v: D.MultivariateNormal(p, scale_tril=torch.diag_embed(p.exp())),
        lambda n: torch.zeros(n, K),
        lambda t: t,
    ),
    "relaxed": (
        lambda p, v: D.RelaxedOneHotCategorical(torch.tensor(0.7), logits=p),
        lambda n: torch.full((n, K), 1 / K),
        lambda t: t,
    ),
    "transformed": (
        lambda p, v: D.TransformedDistribution(_normal(p, v), [D.AffineTransform(0.5, 2.0), D.TanhTransform(1)]),
        lambda n: torch.full((n, K), 0.1),
        lambda t: t.sum(-1),
    ),
    "mixture": (
        lambda p, v: D.MixtureSameFamily(D.Categorical(logits=p), D.Normal(p * 2, p.exp())),
        lambda n: torch.zeros(n),
        lambda t: t,
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("asked_inside", [False, True])
def test_distributions_are_outputs(name, asked_inside):
    make, action, reduce = DISTRIBUTIONS[name]

    def wrap(logits, value):
        distribution = make(logits, value)
        if asked_inside:  # what is computed when it is asked for, is kept in the object
            _ = distribution.mean if name != "relaxed" and name != "transformed" else None
            _ = distribution.log_prob(action(len(logits)))
        return distribution

    def loss(d, w):
        terms = reduce(d.log_prob(action(N))) * 0.3
        if name in ("normal", "categorical", "independent", "beta", "bernoulli"):
            terms = terms + 0.1 * reduce(d.entropy())
        return (terms * w).mean()

    x = torch.randn(N, F)
    model = Net(wrap)
    kind = type(model(x))
    with kondo.gated(model, rate=0.5):
        assert type(model(x)) is kind
    assert_exact(model, lambda m: m(x), loss)


def test_a_cached_transform_knows_its_own_sample_again():
    def wrap(logits, value):
        squashed = D.TransformedDistribution(_normal(logits, value), D.TanhTransform(cache_size=1))
        return squashed, squashed.rsample()

    def loss(out, w):
        distribution, action = out
        assert distribution.transforms[0]._cached_x_y[1] is action
        return (distribution.log_prob(action).sum(-1) * w).mean()

    x = torch.randn(N, F)
    model, reference = Net(wrap), None
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25, priority="uniform") as gate:
        torch.manual_seed(5)
        loss(model(x), torch.ones(N)).backward()
    torch.manual_seed(5)
    loss(reference(x), kept_mask(gate.last.kept, N, torch.float64)).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_objects_in_which_nothing_of_the_batch_stands_are_passed_on_themselves():
    class Settings:
        def __init__(self):
            self.sizes, self.more = [1, 2], {"a": 1}

    settings = Settings()
    assert map_tensors(lambda path, t: t + 1, (torch.ones(1), settings))[1] is settings
    seen = []

    class Reads(Net):
        def forward(self, x, settings):
            seen.append(settings)
            return super().forward(x)

    x = torch.randn(N, F)
    assert_exact(
        Reads(lambda logits, value: logits), lambda m: m(x, settings), lambda y, w: (y.log_softmax(-1)[:, 0] * w).mean()
    )
    assert all(s is settings for s in seen) and len(seen) >= 3


def test_modules_functions_and_generators_are_not_gone_into():
    layer = nn.Linear(2, 2)
    tree = {"layer": layer, "f": layer.forward, "g": torch.Generator(), "t": torch.ones(1), "type": nn.Linear}
    assert flatten(tree)[0] == ["['t']"]


def test_a_resource_is_not_copied():
    closed = []

    class File:
        def __init__(self, t):
            self.t = t

        def __del__(self):
            closed.append(self)

    file = File(torch.ones(1))
    map_tensors(lambda path, t: t + 1, [file])
    assert not closed


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda logits, value: (logits, lambda: value), "function"),
        (lambda logits, value: functools.partial(torch.add, logits), "partial"),
        (lambda logits, value: (t for t in (logits, value)), "generator"),
        (lambda logits, value: {"logits": logits, "it": iter([value])}, "list_iterator"),
        (lambda logits, value: {logits, value}, "set"),
        (lambda logits, value: Plain(logits, value).__eq__, "method-wrapper"),
    ],
)
def test_tensors_out_of_reach_are_an_error_that_names_the_type(wrap, name):
    model = Net(wrap)
    with (
        kondo.gated(model, rate=0.5),
        pytest.raises(RuntimeError, match=f"gated: the model returned a {name}, which holds"),
    ):
        model(torch.randn(N, F))


def test_what_holds_nothing_new_is_no_error():
    model = Net(lambda logits, value: (logits, model.pi, model.pi.forward, functools.partial(print, 1), object()))
    x = torch.randn(N, F)
    assert_exact(model, lambda m: m(x)[0], lambda y, w: (y.log_softmax(-1)[:, 0] * w).mean())


# What the model writes into its arguments.


class Writes(nn.Module):
    """Dict in, dict out."""

    def __init__(self, returns):
        super().__init__()
        self.f, self.g = nn.Linear(F, 8), nn.Linear(8, K)
        self.returns = returns

    def forward(self, batch):
        assert "hidden" not in batch and len(batch["trace"]) == 0
        batch["hidden"] = self.f(batch["obs"]).tanh()
        batch["trace"].append(batch["hidden"])
        batch["inner"]["logits"] = self.g(batch["hidden"])
        return self.returns(batch)


class Counted(collections.UserDict):
    pass


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, Counted, Bunch])
@pytest.mark.parametrize("returns", [lambda b: b, lambda b: b["inner"]["logits"], lambda b: None], ids=range(3))
def test_what_the_model_writes_into_its_input_is_an_output(kind, returns):
    x = torch.randn(N, F)

    def call(model):
        batch = kind(obs=x, trace=[], inner={})
        out = model(batch)
        if returns(batch) is batch:
            assert out is batch
        elif out is not None:
            assert out is batch["inner"]["logits"]
        assert batch["obs"] is x and batch["trace"][0] is batch["hidden"] and len(batch["trace"]) == 1
        return batch

    def loss(batch, w):
        terms = batch["inner"]["logits"].log_softmax(-1)[:, 1] + batch["trace"][0].pow(2).sum(-1)
        return (terms * w).mean()

    assert_exact(Writes(returns), call, loss, steps=3)


def test_what_the_model_writes_into_an_object_is_an_output():
    class Model(Writes):
        def forward(self, batch):
            batch.hidden = self.f(batch.obs).tanh()
            return self.g(batch.hidden)

    x = torch.randn(N, F)

    def call(model):
        batch = types.SimpleNamespace(obs=x)
        return model(batch), batch

    def loss(out, w):
        return ((out[0].log_softmax(-1)[:, 1] + out[1].hidden.pow(2).sum(-1)) * w).mean()

    assert_exact(Model(None), call, loss)


def test_what_the_model_writes_into_an_object_made_for_it_is_an_output():
    class Cache:
        def __init__(self):
            self.layers, self.last = [], types.SimpleNamespace(value=None)

    class Model(Writes):
        def forward(self, x, cache):
            assert not cache.layers and cache.last.value is None
            cache.layers.append(self.f(x).tanh())
            cache.last.value = self.g(cache.layers[-1])

    x = torch.randn(N, F)

    def call(model):
        cache = Cache()
        model(x, cache)
        return cache

    def loss(cache, w):
        assert len(cache.layers) == 1 and len(cache.layers[0]) == N
        return ((cache.last.value.log_softmax(-1)[:, 1] + cache.layers[0].pow(2).sum(-1)) * w).mean()

    model = Model(None)
    assert_exact(model, call, loss, steps=2)
    with kondo.gated(model, rate=0.25, priority="uniform"):
        cache = call(model)
        loss(cache, torch.ones(N)).backward()
        loss(cache, torch.ones(N))  # what a replay writes, it writes elsewhere


@pytest.mark.parametrize("inside", ["array", "list"])
def test_arrays_and_lists_inside_of_objects(inside):
    class Batch:
        def __init__(self):
            texts = ["a" * (i % 5) for i in range(N)]
            self.obs = np.random.default_rng(0).normal(size=(N, F)) if inside == "array" else texts

    batch = Batch()

    def read(batch):
        if inside == "array":
            return torch.as_tensor(batch.obs)
        return torch.tensor([[float(len(text))] * F for text in batch.obs])

    model = Policy(read)
    assert_exact(model, lambda m: m(batch), nll)
    assert list(model.seen[:2]) == [N, N // 4] and len(batch.obs) == N


def test_the_users_dict_ends_as_the_model_leaves_it():
    class Pops(nn.Linear):
        def forward(self, batch):
            x = batch.pop("x")
            batch["x2"] = x + 1
            batch["seen"] += 1
            return super().forward(x)

    model, batch, x = Pops(F, K), {"seen": 0}, torch.randn(N, F)
    batch["x"] = x
    with kondo.gated(model, rate=0.25, priority="uniform"):
        model(batch).log_softmax(-1)[:, 0].sum().backward()
    assert batch.keys() == {"seen", "x2"} and batch["seen"] == 1 and batch["x2"].shape == x.shape


def test_what_is_written_does_not_keep_the_graph_alive():
    import gc
    import weakref

    model = Writes(lambda batch: batch)
    with kondo.gated(model, rate=0.25, priority="uniform"):
        batch = {"obs": torch.randn(N, F), "trace": [], "inner": {}}
        out = model(batch)
        gone = weakref.ref(out["hidden"])
        out["inner"]["logits"].log_softmax(-1)[:, 0].sum().backward()
        del batch, out
        gc.collect()
        assert gone() is None


def test_a_returned_input_and_a_returned_buffer_are_constants():
    class Model(Net):
        def __init__(self):
            super().__init__(None)
            self.register_buffer("scale", torch.rand(K))

        def forward(self, x):
            return x, self.pi(self.body(x).tanh()), self.scale

    x = torch.randn(N, F)

    def loss(out, w):
        assert out[0] is x
        return ((out[1] * out[2]).log_softmax(-1)[:, 0] * out[0][:, 0] * w).mean()

    assert_exact(Model(), lambda m: m(x), loss)


# What is no plain tensor.


class Policy(nn.Module):
    """Logits of (n, F) features, which ``read`` takes from whatever is passed."""

    def __init__(self, read, write=lambda logits, given: logits):
        super().__init__()
        self.body, self.pi = nn.Linear(F, 8), nn.Linear(8, K)
        self.read, self.write = read, write
        self.seen = array("q")  # a list would be put back after a replay

    def forward(self, *args, **kwargs):
        x = self.read(*args, **kwargs)
        self.seen.append(len(x))
        return self.write(self.pi(self.body(x).tanh()), args)


def nll(logits, w):
    return (logits.log_softmax(-1)[:, 1] * torch.linspace(-1, 1, N) * w).mean()


ARRAYS = {
    "float": lambda: np.random.default_rng(0).normal(size=(N, F)),
    "strided": lambda: np.random.default_rng(0).normal(size=(F, N)).T[:, ::-1],
    "read_only": lambda: np.broadcast_to(np.linspace(0, 1, N)[:, None], (N, F)),
    "int": lambda: np.arange(N * F).reshape(N, F) % 3,
    "uint8": lambda: (np.arange(N * F).reshape(N, F) % 3).astype(np.uint8),
    "uint16": lambda: (np.arange(N * F).reshape(N, F) % 3).astype(np.uint16),
    "bool": lambda: np.arange(N * F).reshape(N, F) % 3 == 0,
    "big_endian": lambda: np.arange(N * F).reshape(N, F).astype(">f4") % 3,
    "object": lambda: np.array([[float(i % 5), 2.0] for i in range(N)] + [None], dtype=object)[:-1],
    "text": lambda: np.array([str(i % 5) for i in range(N)]),
    "dates": lambda: np.arange(N).astype("datetime64[D]"),
    "records": lambda: np.array([(i % 3, i % 5) for i in range(N)], dtype=[("a", "i4"), ("b", "f8")]),
}


def _features(array):
    """(n, F) of any of the arrays."""
    if array.dtype == object:
        array = np.array([row[0] + row[1] for row in array])
    elif array.dtype.kind == "U" or array.dtype.kind == "M":
        array = array.astype(float)
    elif array.dtype.names:
        array = array["a"] + array["b"]
    x = torch.tensor(np.ascontiguousarray(array).astype(np.float64))
    return x if x.dim() == 2 else x[:, None].expand(-1, F) / N


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_cut_into_rows_and_stay_arrays(name):
    array = ARRAYS[name]()

    def read(batch):
        assert type(batch["obs"]) is np.ndarray and batch["obs"].dtype == array.dtype
        return _features(batch["obs"])

    model = Policy(read)
    assert_exact(model, lambda m: m({"obs": array}), nll)
    assert list(model.seen[:2]) == [N, N // 4]


def test_an_array_that_is_written_into_after_the_call_is_replayed_as_it_was():
    array = np.random.default_rng(0).normal(size=(N, F))
    model = Policy(torch.as_tensor)
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25, priority="uniform") as gate:
        y = model(array)
        z = nll(reference(array.copy()), torch.ones(N)), array.copy()
        array[:] = 0
        nll(y, torch.ones(N)).backward()
    nll(reference(z[1]), kept_mask(gate.last.kept, N, torch.float64)).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_returned_arrays_are_left_alone():
    x = torch.randn(N, F)
    model = Policy(lambda x: x, lambda logits, given: (logits, logits.detach().numpy()))

    def loss(out, w):
        assert type(out[1]) is np.ndarray
        return nll(out[0], w)

    assert_exact(model, lambda m: m(x), loss)


def _texts():
    return [torch.randn(3 + i % 4, F) for i in range(N)]


LISTS = {
    "tensors": (_texts, lambda row: row.mean(0)),
    "tensors_of_one_length": (lambda: [torch.randn(3, F) for _ in range(N)], lambda row: row.mean(0)),
    "scalars": (lambda: list(torch.randn(N)), lambda row: row.expand(F)),
    "tuple_of_tensors": (lambda: tuple(_texts()), lambda row: row.sum(0)),
    "strings": (lambda: [f"text {i}" for i in range(N)], lambda row: torch.full((F,), float(row[5:]) / N)),
    "lengths": (lambda: [i % 5 for i in range(N)], lambda row: torch.full((F,), row / 5)),
    "tokens": (lambda: [[1] * (i % 5) for i in range(N)], lambda row: torch.full((F,), len(row) / 5)),
    "chats": (
        lambda: [{"role": "user", "n": [i]} for i in range(N)],
        lambda row: torch.full((F,), row["n"][0] / N),
    ),
    "samples": (
        lambda: [{"x": torch.randn(F), "boxes": torch.randn(i % 3, 4)} for i in range(N)],
        lambda row: row["x"] + row["boxes"].sum(),
    ),
    "objects": (lambda: [types.SimpleNamespace(i=i) for i in range(N)], lambda row: torch.full((F,), row.i / N)),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("beside_a_tensor", [False, True])
def test_lists_with_an_entry_a_row_are_cut_into_rows(name, beside_a_tensor):
    make, one = LISTS[name]
    rows, x = make(), torch.randn(N, F)

    def read(rows, x=0):
        assert type(rows) is type(make()) and len(rows) in (N, N // 2, N // 4)
        return torch.stack([one(row) for row in rows]) + x

    call = (lambda m: m(rows, x=x)) if beside_a_tensor else (lambda m: m(rows))
    model = Policy(read)
    assert_exact(model, call, nll, steps=2)
    assert list(model.seen[:2]) == [N, N // 4]


@pytest.mark.parametrize("shared", [[1.5] * N, ["a"] * N, list(range(N))], ids=["floats", "strings", "range"])
def test_a_list_that_only_looks_like_rows_is_shared(shared):
    def read(x, names):
        assert len(names) == N
        return x * (len(names) / N)

    x = torch.randn(N, F)
    assert_exact(Policy(read), lambda m: m(x, shared), nll)


def test_lists_of_several_calls_go_through_the_model_together():
    def read(texts, names):
        return torch.stack([text.mean(0) + len(name) for text, name in zip(texts, names, strict=True)])

    model = Policy(read)
    reference = copy.deepcopy(model)
    batches = [(_texts(), ["x" * (i % 3) for i in range(N)]) for _ in range(3)]
    with kondo.gated(model, rate=0.25, priority="uniform", window=3, audit=0) as gate:
        for batch in batches:
            nll(model(*batch), torch.ones(N)).backward()
    w = kept_mask(gate.last.kept, 3 * N, torch.float64).view(3, N)
    for batch, mask in zip(batches, w, strict=True):
        nll(reference(*batch), mask).backward()
    assert [n for n in model.seen if n != 2] == [N, N, N, 3 * N // 4], "two rows tell how lists are read"
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_a_list_of_layers_is_no_list_of_rows():
    layers = [torch.randn(N, F) for _ in range(N)]
    assert_exact(Policy(lambda layers: sum(layers) / N), lambda m: m(layers), nll)


def test_outputs_in_a_list_with_an_entry_a_row():
    def write(logits, given):
        return [row.expand(len(text), -1) * text[:, :1] for row, text in zip(logits, given[0], strict=True)]

    def loss(rows, w):
        assert isinstance(rows, list) and [len(row) for row in rows] == [len(text) for text in texts]
        terms = torch.stack([row.log_softmax(-1)[:, 1].sum() for row in rows])
        return (terms * w).mean()

    texts = _texts()
    model = Policy(lambda texts: torch.stack([text.mean(0) for text in texts]), write)
    assert_exact(model, lambda m: m(texts), loss)
    longest = max(range(N), key=lambda i: len(texts[i]))
    with kondo.gated(model, rate=0.5, priority="uniform") as gate:
        gate.force(torch.tensor([(longest + 1) % N]))
        loss(model(texts), torch.ones(N)).backward()


def test_a_list_of_other_things_a_row_says_what_to_do():
    def write(logits, given):
        return [{"logits": row, "n": i} for i, row in enumerate(logits)]

    model = Policy(lambda x: x, write)
    with (
        kondo.gated(model, rate=0.25, priority="uniform"),
        pytest.raises(RuntimeError, match=r"gated: .*(stack|batch axis)"),
    ):
        torch.stack([row["logits"].log_softmax(-1)[0] for row in model(torch.randn(N, F))]).mean().backward()


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("returned", ["packed", "hidden"])
@pytest.mark.parametrize("window", [1, 2])
def test_packed_sequences(enforce_sorted, returned, window):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.pi = nn.GRU(F, 8), nn.Linear(8, K)

        def forward(self, packed):
            out, hidden = self.rnn(packed)
            if returned == "hidden":
                return self.pi(hidden[0])
            return out._replace(data=self.pi(out.data))

    def texts(seed):
        rows = [torch.randn(2 + (i + seed) % 5, F) for i in range(N)]
        return sorted(rows, key=len, reverse=True) if enforce_sorted else rows

    batches = [pack_sequence(texts(seed), enforce_sorted=enforce_sorted) for seed in range(2)]

    def loss(out, w):
        if returned == "hidden":
            return nll(out, w)
        assert type(out) is PackedSequence
        padded, lengths = pad_packed_sequence(out, batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return ((padded.log_softmax(-1)[..., 1] * mask).sum(1) * w).mean()

    model = Recurrent()
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25, priority="uniform", window=window) as gate:
        masks = []
        for step, batch in enumerate(batches):
            loss(model(batch), torch.ones(N)).backward()
            if (step + 1) % window == 0:
                masks += kept_mask(gate.last.kept, N * window, torch.float64).view(window, N)
    for batch, mask in zip(batches, masks, strict=True):
        loss(reference(batch), mask).backward()
    assert gate.stats.forwarded == N // 2
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


@pytest.mark.parametrize("returns_jagged", [False, True])
def test_jagged_tensors(returns_jagged):
    def read(a, b):
        return a + b  # of one raggedness

    class Jagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pi = nn.Linear(F, 8), nn.Linear(8, K)

        def forward(self, a, b):
            logits = self.pi(self.body(a + b).tanh())
            return logits if returns_jagged else logits.to_padded_tensor(0.0).sum(1)

    a = torch.nested.nested_tensor([torch.randn(2 + i % 5, F) for i in range(N)], layout=torch.jagged)
    b = torch.nested.nested_tensor_from_jagged(torch.randn_like(a.values()), a.offsets())

    def loss(out, w):
        if not returns_jagged:
            return nll(out, w)
        assert out.is_nested and out.layout is torch.jagged
        lengths = out.offsets().diff()
        return (out.values().log_softmax(-1)[:, 1] * w.repeat_interleave(lengths)).sum() / N

    assert_exact(Jagged(), lambda m: m(a, b), loss)


@pytest.mark.parametrize("layout", ["coo", "uncoalesced", "csr", "csc"])
@pytest.mark.parametrize("rows", [True, False])
def test_sparse_inputs(layout, rows):
    dense = torch.randn(N if rows else 7, F) * (torch.rand(N if rows else 7, F) > 0.5)
    sparse = {
        "coo": lambda: dense.to_sparse(),
        "uncoalesced": lambda: torch.cat([dense.to_sparse()._indices()] * 2, 1),
        "csr": lambda: dense.to_sparse_csr(),
        "csc": lambda: dense.to_sparse_csc(),
    }[layout]()
    if layout == "uncoalesced":
        sparse = torch.sparse_coo_tensor(sparse, torch.cat([dense.to_sparse()._values()] * 2), dense.shape)

    def read(x, adjacency):
        assert adjacency.layout is sparse.layout
        dense = adjacency.to_dense()
        return x * dense if rows else x + dense.sum(0)

    x = torch.randn(N, F)
    assert_exact(Policy(read), lambda m: m(x, sparse), nll)


def test_a_sparse_output_is_an_error_that_says_to_return_it_dense():
    model = Policy(lambda x: x, lambda logits, given: logits.to_sparse())
    with kondo.gated(model, rate=0.5), pytest.raises(RuntimeError, match=r"gated: .*to_dense"):
        model(torch.randn(N, F))


def test_inputs_made_in_inference_mode():
    with torch.inference_mode():
        x = torch.randn(N, F)

    model = Policy(lambda x: x * 1.0, lambda logits, given: (logits, given[0]))
    assert_exact(model, lambda m: m(x), lambda out, w: nll(out[0], w))


def test_a_nested_input_that_wants_a_gradient_is_an_error():
    nested = torch.nested.nested_tensor([torch.randn(2, F)] * N, layout=torch.jagged, requires_grad=True)
    model = Policy(lambda a: a.to_padded_tensor(0.0).sum(1))
    with kondo.gated(model, rate=0.5), pytest.raises(RuntimeError, match="gated: an input is a nested tensor"):
        model(nested)


# Calls without a batch axis.


@pytest.mark.parametrize("k", [F, 2 * F])
def test_an_episode_without_a_batch_axis_says_what_to_write(k):
    model = nn.Linear(F, k)
    with torch.no_grad():
        model.weight.zero_()  # outputs would agree
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match=r"gated: .*x\[None\]"):
        loss = sum(-model(torch.randn(F)).log_softmax(-1)[1] for _ in range(4))
        loss.backward()
    assert model.weight.grad is None


def test_features_and_outputs_of_other_sizes_say_what_to_write():
    model = nn.Linear(F, K)
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match=r"gated: .*x\[None\]"):
        sum(-model(torch.randn(F)).log_softmax(-1)[1] for _ in range(4)).backward()
    assert model.weight.grad is None


def test_rows_of_one_number_each_are_rows():
    class Scalars(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))

        def forward(self, x):
            return self.layer(x[:, None])[:, 0]

    model = Scalars().eval()
    assert_exact(model, lambda m: m(torch.linspace(-1, 1, N)), lambda y, w: (y * w).mean())


# A mapping that knows its batch size.


class Sized(collections.abc.MutableMapping):
    """Tensors of one batch size, checked when they are set; [] by a key or by rows."""

    def __init__(self, items, batch_size):
        self._items, self._batch_size = {}, torch.Size(batch_size)
        self.update(items)

    def __getitem__(self, key):
        if isinstance(key, str):
            return self._items[key]
        rows = {name: value[key] for name, value in self._items.items()}
        return Sized(rows, next(iter(rows.values())).shape[:1])

    def __setitem__(self, key, value):
        assert (
            value._batch_size if isinstance(value, Sized) else value.shape[: len(self._batch_size)]
        ) == self._batch_size
        self._items[key] = value

    def __delitem__(self, key):
        del self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class IntoMapping(nn.Linear):
    def forward(self, batch):
        batch["logits"] = super().forward(batch["next"]["obs"])
        return batch


def assert_dict_in_dict_out_is_exact(model, make):
    def call(m):
        batch = make()
        out = m(batch)
        assert out is batch
        return out

    gate = assert_exact(model, call, lambda out, w: nll(out["logits"], w), steps=2)
    assert gate.stats.forwarded == N // 2


def test_a_mapping_that_checks_the_batch_size_of_what_is_written_into_it():
    x = torch.randn(N, F)
    assert_dict_in_dict_out_is_exact(IntoMapping(F, K), lambda: Sized({"next": Sized({"obs": x}, [N])}, [N]))


@pytest.mark.parametrize("kind", [int, lambda n: torch.Size([n])], ids=["int", "size"])
def test_objects_that_count_their_rows_go_together(kind):
    class Rows:
        def __init__(self, x):
            self.x, self._batch_size = x, kind(len(x))

    runs = []

    class Model(nn.Linear):
        def forward(self, rows):
            assert rows._batch_size == kind(len(rows.x))
            if torch.is_grad_enabled():
                runs.append(len(rows.x))
            return super().forward(rows.x)

    model = Model(3, 4)
    with kondo.gated(model, rate=0.5, window=2, audit=0) as gate:
        for n in (4, 6):
            logp = model(Rows(torch.randn(n, 3))).log_softmax(-1)[:, 0]
            (-torch.randn(n) * logp).sum().backward()
    assert gate.stats.kept == 5 and runs[-1] == 5


def test_tensordict():
    tensordict = pytest.importorskip("tensordict")
    from tensordict.nn import TensorDictModule

    x = torch.randn(N, F)
    model = TensorDictModule(nn.Linear(F, K), in_keys=[("next", "obs")], out_keys=["logits"])

    def make():
        inner = tensordict.TensorDict({"obs": x}, batch_size=[N])
        return tensordict.TensorDict({"next": inner}, batch_size=[N])

    assert_dict_in_dict_out_is_exact(model, make)


def test_a_constant_that_the_model_returns_needs_no_rows():
    scale = torch.rand(K)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.pi = nn.Linear(F, K)

        def forward(self, x):
            base = D.Normal(self.pi(x), torch.ones(K))
            return D.TransformedDistribution(base, [D.AffineTransform(scale * 2, scale)])

    x = torch.randn(N, F)
    assert_exact(Scaled(), lambda m: m(x), lambda d, w: (d.log_prob(torch.zeros(N, K)).sum(-1) * w).mean())


def test_a_model_that_writes_into_its_input_is_told_so():
    class Scales(nn.Linear):
        def forward(self, x):
            x /= 2
            return super().forward(x)

    model = Scales(F, K)
    error = pytest.raises(RuntimeError, match=r"gated: the model writes into its input args\[0\] in place")
    with kondo.gated(model, rate=0.25, priority="uniform"), error:
        nll(model(torch.randn(N, F)), torch.ones(N)).backward()
    assert model.weight.grad is None


# Lists with an entry a row, after preselect().


class OfLists(nn.Module):
    def __init__(self, returns_list=False):
        super().__init__()
        self.layer, self.returns_list = nn.Linear(4, 5), returns_list

    def forward(self, x, more):
        logits = self.layer(x + torch.stack([rows.sum(0) for rows in more]))
        return list(logits) if self.returns_list else logits


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_lists_with_an_entry_a_row_are_cut_after_a_screen(rows):
    model, reference = copies(OfLists().double())
    x, actions, advantages = torch.randn(rows, 4).double(), torch.randint(3, (rows,)), torch.randn(rows).double()
    more = [torch.randn(i + 1, 4).double() for i in range(rows)]

    def loss(model, w):
        return (w * advantages * model(x, more).log_softmax(-1).gather(1, actions[:, None]).squeeze(1)).mean()

    for _ in range(2):
        model.zero_grad()
        with kondo.gated(model, rate=0.4) as gate:
            weights = gate.preselect(delight=torch.rand(rows)).factors()
            loss(model, 1.0).backward()
        assert gate.stats.forwarded == gate.stats.kept
    loss(reference, weights).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


class OfLayers(nn.Module):
    """A model that returns something of each of its layers, as many as rows are kept."""

    def __init__(self, of_layer):
        super().__init__()
        self.layers, self.of_layer = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), of_layer

    def forward(self, x):
        found = []
        for layer in self.layers:
            x = layer(x).tanh()
            found.append(self.of_layer(x))
        return x, tuple(found)


@pytest.mark.parametrize(
    "of_layer",
    [
        lambda x: x.detach().square().mean(),
        lambda x: torch.ones(5) * x.detach().mean(),
        lambda x: x.repeat_interleave(2, 0),
        lambda x: x,
    ],
    ids=["a number", "a vector", "rows of tokens", "rows"],
)
def test_a_tuple_of_layers_is_none_of_rows_though_as_many_are_kept(of_layer):
    model, reference = copies(OfLayers(of_layer).double())
    x, actions, advantages = torch.randn(12, 4).double(), torch.randint(4, (12,)), torch.randn(12).double()

    def loss(model, w):
        return (w * advantages * model(x)[0].log_softmax(-1).gather(1, actions[:, None]).squeeze(1)).mean()

    for rate in (3 / 12, 4 / 12):
        model.zero_grad(), reference.zero_grad()
        with kondo.gated(model, rate=rate) as gate:
            weights = gate.preselect(delight=torch.rand(12)).factors()
            loss(model, 1.0).backward()
        assert gate.stats.forwarded == round(12 * rate)
        loss(reference, weights).backward()
        assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_a_list_with_an_entry_a_row_is_refused_after_a_screen():
    model = OfLists(returns_list=True)
    with kondo.gated(model, rate=0.4) as gate:
        gate.preselect(delight=torch.rand(7))
        with pytest.raises(RuntimeError, match="a list with an entry a row"):
            model(torch.randn(7, 4), [torch.randn(2, 4)] * 7)
