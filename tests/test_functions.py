"""``method=(object, "name")``: what calls the model deep inside is gated as one, at its log-probs."""

import copy
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kondo_hooks as kondo
from tests.reference import copies, grads, largest_relative_difference

V, B, T = 19, 6, 8


class Body(nn.Module):
    """Hidden states of tokens."""

    def __init__(self):
        super().__init__()
        self.token, self.gru = nn.Embedding(V, 12), nn.GRU(12, 12, batch_first=True)
        self.head = nn.Linear(12, V)

    def forward(self, ids):
        return self.gru(self.token(ids))[0]


class Actor:
    """As a trainer has it: a micro-batch goes in, log-probs come out; the head runs in chunks of tokens."""

    def __init__(self, model, checkpointed=False):
        self.model, self.checkpointed, self.largest = model, checkpointed, 0

    def log_probs(self, micro_batch, temperature=1.0):
        ids = micro_batch["ids"]
        hidden = self.model(ids)[:, :-1]
        parts = []
        for h, labels in zip(hidden.split(2, 1), ids[:, 1:].split(2, 1), strict=True):
            parts.append(
                checkpoint(self._of, h, labels, temperature, use_reentrant=False)
                if self.checkpointed
                else self._of(h, labels, temperature)
            )
        return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)

    def _of(self, hidden, labels, temperature):
        logits = self.model.head(hidden) / temperature
        self.largest = max(self.largest, logits.numel())
        every = logits.log_softmax(-1)
        return every.gather(-1, labels[..., None]).squeeze(-1), -(every.exp() * every).sum(-1)


def batch():
    g = torch.Generator().manual_seed(1)
    return {"ids": torch.randint(V, (B, T), generator=g), "u": torch.randn(B, 1, generator=g, dtype=torch.float64)}


def loss_of(actor, given, factors=None):
    logp, entropy = actor.log_probs(given, temperature=0.9)
    terms = -given["u"] * logp - 0.01 * entropy
    return (terms if factors is None else terms * factors[:, None]).mean()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("rule", [{"rate": 0.34}, {"noise": 0.7}, {"rate": 0.3, "window": 2}], ids=str)
def test_a_function_that_calls_the_model_inside(rule, checkpointed):
    torch.manual_seed(0)
    ours, theirs = copies(Body().double())
    actor, reference, given = Actor(ours, checkpointed), Actor(theirs, checkpointed), batch()
    with kondo.gated(ours, method=(actor, "log_probs"), logp=0, **rule) as gate:
        for _ in range(rule.get("window", 1)):
            loss_of(actor, given).backward()
    assert "log_probs" not in vars(actor)
    for factors in gate.last.factors().split(B):
        loss_of(reference, given, factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert 0 < gate.stats.forwarded < gate.stats.rows_screened
    assert actor.largest <= B * 2 * V  # nobody held the logits of all tokens


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_head_outside_of_the_gated_call_is_told(checkpointed):
    """The gradient of its weight has the dropped rows, too; gated around both, as above, it has not."""
    torch.manual_seed(0)
    model = Body().double()
    actor, given = Actor(model, checkpointed), batch()
    with (
        pytest.warns(kondo.KondoWarning, match=r"parameter head\.(weight|bias) together with its outputs"),
        kondo.gated(model, rate=0.34) as gate,
    ):
        logp = gate.logp(actor.log_probs(given)[0])
        (-given["u"] * logp).mean().backward()


def test_tokens_and_preselect_of_a_function():
    torch.manual_seed(0)
    ours, theirs = copies(Body().double())
    actor, reference, given = Actor(ours), Actor(theirs), batch()
    for options in ({"unit": "token", "noise": 0.5}, {"rate": 0.34}):
        ours.zero_grad(), theirs.zero_grad()
        with kondo.gated(ours, method=(actor, "log_probs"), logp=0, **options) as gate:
            if "rate" in options:
                with torch.no_grad():
                    gate.preselect(logp=actor.log_probs(given)[0], advantages=given["u"])
            loss_of(actor, given).backward()
        factors = gate.last.factors().view(B, -1)
        logp, entropy = reference.log_probs(given, temperature=0.9)
        ((-given["u"] * logp - 0.01 * entropy) * factors).mean().backward()
        assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


class Ragged(Actor):
    """Takes rows of several lengths, as a jagged tensor among others."""

    def log_probs(self, micro_batch, padded=True):
        lengths = micro_batch["ids"].offsets().diff()
        ids = torch.nested.to_padded_tensor(micro_batch["ids"], 0)
        logp, entropy = super().log_probs({"ids": ids})
        real = torch.arange(ids.shape[1] - 1) < lengths[:, None] - 1
        logp = logp * real
        if padded:
            return F.pad(logp, (0, T - 1 - logp.shape[1])), F.pad(entropy * real, (0, T - 1 - logp.shape[1]))
        return torch.nested.as_nested_tensor(
            [row[:n] for row, n in zip(logp, lengths, strict=True)], layout=torch.jagged
        )


@pytest.mark.parametrize("decided_first", [False, True])
def test_jagged_rows_among_others_of_a_dictionary(decided_first):
    torch.manual_seed(0)
    ours, theirs = copies(Body().double())
    actor, reference, u = Ragged(ours), Ragged(theirs), batch()["u"]
    ids = torch.nested.as_nested_tensor([row[: 3 + i] for i, row in enumerate(batch()["ids"])], layout=torch.jagged)
    given = {"ids": ids, "u": u, "name": "micro-batch"}
    with kondo.gated(ours, method=(actor, "log_probs"), logp=0, rate=0.34) as gate:
        if decided_first:
            with torch.no_grad():
                gate.preselect(logp=actor.log_probs(given)[0], advantages=u)
        logp, entropy = actor.log_probs(given)
        (-u * logp - 0.01 * entropy).mean().backward()
    logp, entropy = reference.log_probs(given)
    ((-u * logp - 0.01 * entropy) * gate.last.factors()[:, None]).mean().backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert gate.stats.kept == 2


def test_jagged_outputs_after_preselect_are_refused_by_name():
    model = Body().double()
    actor, u = Ragged(model), batch()["u"]
    ids = torch.nested.as_nested_tensor([row[: 3 + i] for i, row in enumerate(batch()["ids"])], layout=torch.jagged)
    with kondo.gated(model, method=(actor, "log_probs"), rate=0.34) as gate:
        gate.preselect(delight=u[:, 0])
        with pytest.raises(RuntimeError, match="packed or jagged, where the dropped rows have no place"):
            actor.log_probs({"ids": ids}, padded=False)


def test_a_function_of_a_python_module_that_is_given_the_model():
    library = types.ModuleType("library")

    def forward(model, ids):
        return model.head(model(ids))[:, -1].log_softmax(-1)

    library.forward = forward
    torch.manual_seed(0)
    ours, theirs = copies(Body().double())
    given = batch()
    a = given["ids"][:, 0]

    def loss(run, model, factors=1.0):
        return (-given["u"][:, 0] * run(model, given["ids"]).gather(1, a[:, None])[:, 0] * factors).mean()

    with kondo.gated(ours, method=(library, "forward"), rate=0.34) as gate:
        loss(library.forward, ours).backward()
    assert library.forward is forward
    loss(forward, theirs, gate.last.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_the_object_is_left_as_it_was_and_its_copies_are_not_gated():
    model = Body().double()
    actor = Actor(model)
    before = dict(vars(actor))
    with kondo.gated(model, method=(actor, "log_probs"), rate=0.5):
        assert copy.deepcopy(actor).log_probs.__func__ is Actor.log_probs
        assert pickle.loads(pickle.dumps(actor)).largest == 0
    assert vars(actor) == before


def test_a_function_that_is_never_called_is_named():
    model = Body().double()
    actor = Actor(model)
    with (
        pytest.warns(kondo.KondoWarning, match=r"Actor\.log_probs was never called"),
        kondo.gated(model, method=(actor, "log_probs"), rate=0.5),
    ):
        model(batch()["ids"]).sum().backward()


class Slotted:
    __slots__ = ("model",)

    def log_probs(self, given):
        return given


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ((Actor(None), "nothing"), "an object and the name"),
        ((Actor(None), 3), "an object and the name"),
        ((Actor(None),), "an object and the name"),
        ((Actor, "log_probs"), "cannot be replaced"),
        ((Slotted(), "log_probs"), "cannot be replaced"),
        ("nothing", "no method of Body"),
    ],
    ids=["no name", "a number", "no pair", "a class", "slots", "no method"],
)
def test_what_cannot_be_gated_is_named(method, match):
    with pytest.raises(ValueError, match=match):
        kondo.gated(Body(), method=method)


def test_check_takes_a_function():
    model = Body()
    actor, given = Actor(model), batch()
    found = kondo.check(
        model, given, loss=lambda out: (-given["u"] * out[0]).mean(), options={"method": (actor, "log_probs")}
    )
    assert found.problem is None and found.rows == B and found.model == "Body.log_probs"


def test_rows_that_ranks_share_are_refused_where_they_are_in_parts(monkeypatch):
    """verl's Ulysses, which is only known to be on while its engine trains; a function of whole rows is gated."""
    ulysses = types.ModuleType("verl.utils.ulysses")
    ulysses.get_ulysses_sequence_parallel_world_size = lambda: 2
    monkeypatch.setitem(sys.modules, "verl.utils.ulysses", ulysses)
    model = Body().double()
    actor, given = Actor(model), batch()
    for method in (None, "forward"):
        with (
            pytest.raises(RuntimeError, match=r"ulysses_sequence_parallel_size .* method=.* tensor_parallel_group="),
            kondo.gated(model, method=method, rate=0.34),
        ):
            (model(given["ids"]) if method is None else model.forward(given["ids"])).sum().backward()
    with kondo.gated(model, method=(actor, "log_probs"), logp=0, rate=0.34) as gate:
        loss_of(actor, given).backward()
    assert gate.stats.kept == 2
    ulysses.get_ulysses_sequence_parallel_world_size = lambda: 1
    with kondo.gated(model, rate=0.34, logits=0) as gate:
        model.head(model(given["ids"])).log_softmax(-1)[:, -1, 0].sum().backward()
