"""Rows that are tied where the outputs do not show it are found at the first step; healthy models pass, untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kondo_hooks as kondo
from tests.cases import LOSSES, MODELS, make_batch
from tests.reference import copies, grads, kept_mask, largest_relative_difference

K = 7


def loss_of(y, actions, advantages, w=1.0):
    return (-y.log_softmax(-1).gather(-1, actions[:, None])[:, 0] * advantages * w).mean()


def batch(n=16):
    return torch.randn(n, 6), torch.randint(K, (n,)), torch.randn(n)


class Zeroed(nn.Module):
    """A branch that ties rows, behind something that is zero."""

    def __init__(self, tie, gate):
        super().__init__()
        self.body, self.branch, self.tie, self.gate = nn.Linear(6, K), nn.Linear(6, K), tie, gate
        self.gamma = nn.Parameter(torch.zeros(K))
        self.up, self.down = nn.Linear(K, 2, bias=False), nn.Linear(2, K, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        branch = self.branch(self.tie(x))
        return self.body(x) + (self.gamma * branch if self.gate == "layer scale" else self.down(self.up(branch)))


class Straight(torch.autograd.Function):
    """Rounds; its backward depends on the number of rows."""

    @staticmethod
    def forward(ctx, x, step):
        ctx.save_for_backward(x, step)
        return (x / step).round() * step

    @staticmethod
    def backward(ctx, g):
        x, step = ctx.saved_tensors
        return g, (g * ((x / step).round() - x / step)).sum() / len(x)


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.step = nn.Linear(6, 12), nn.Linear(12, K), nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        return self.b(Straight.apply(self.a(x), self.step))


TIES = {
    "mean": lambda x: x - x.mean(0),
    "standardised": lambda x: (x - x.mean(0)) / (x.std(0) + 1e-5),
    "neighbour": lambda x: x - x.roll(1, 0),
    "first": lambda x: x - x[:1],
    "last": lambda x: x - x[-1:],
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "rank": lambda x: x * x[:, :1].argsort(0).float(),
}
TIED = {
    f"{gate}, {name}": lambda t=t, gate=gate: Zeroed(t, gate)
    for gate in ("layer scale", "lora")
    for name, t in TIES.items()
}
TIED["backward by the number of rows"] = Quantized


@pytest.mark.parametrize("model", TIED)
def test_rows_tied_behind_a_zero_are_told_at_the_first_step(model):
    model = TIED[model]()
    with pytest.raises(kondo.ReplayMismatchError, match="No gradient was changed"), kondo.gated(model, rate=0.25):
        loss_of(model(batch()[0]), *batch()[1:]).backward()
    assert all(p.grad is None for p in model.parameters())


def test_without_an_audit_nothing_is_said_and_with_a_later_one_it_is():
    model = TIED["layer scale, mean"]()
    with kondo.gated(model, rate=0.25, audit=0):
        loss_of(model(batch()[0]), *batch()[1:]).backward()
    healthy = nn.Linear(6, K)
    tie = False

    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.gamma = nn.Linear(6, K), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.body(x) + self.gamma * (healthy(x).detach() - tie * x.mean() * torch.arange(K))

    model = Later()
    with pytest.raises(kondo.ReplayMismatchError, match="gamma"), kondo.gated(model, rate=0.25, audit=3) as gate:
        for n in range(5):
            tie = n > 0
            x, a, advantages = batch()
            loss_of(model(x), a, advantages).backward()
    assert gate.stats.steps == 3


@pytest.mark.parametrize("loss_case", LOSSES[:1] + LOSSES[6:8], ids=lambda c: c.name)
@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
def test_a_look_at_every_decision_changes_nothing(case, loss_case):
    torch.manual_seed(1)
    model, reference = copies(case.build().double().train())

    def steps(model, audit):
        torch.manual_seed(2)
        with kondo.gated(model, rate=0.25, audit=audit) as gate:
            for seed in range(3):
                b = make_batch(12, case.sequence, torch.float64, seed)
                out = case.call(model, b)
                loss_case.loss(case.logits(out, b), case.value(out) if case.value else None, b, None).backward()
        return gate, torch.get_rng_state()

    (ours, stream), (theirs, expected) = steps(model, 1), steps(reference, 0)
    counted, without = ({k: v for k, v in vars(gate.stats).items() if "seconds" not in k} for gate in (ours, theirs))
    assert torch.equal(stream, expected) and counted == pytest.approx(without, nan_ok=True)
    assert largest_relative_difference(grads(model), grads(reference)) == 0
    for a, b in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_models_are_looked_at_too(reentrant):
    model, tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, K)), TIED["layer scale, mean"]()

    def run(m):
        x, a, advantages = batch()
        with kondo.gated(m, rate=0.25, method="checkpointed") as gate:
            loss_of(m.checkpointed(x), a, advantages).backward()
        return x, a, advantages, gate

    for m in (model, tied):
        m.checkpointed = lambda x, m=m: checkpoint(
            m, x + 0 * sum(p.sum() for p in m.parameters()), use_reentrant=reentrant
        )
    x, a, advantages, gate = run(model)
    reference = copy.deepcopy(model)
    reference.zero_grad()
    loss_of(reference(x), a, advantages, kept_mask(gate.last.kept, 16, torch.float32)).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    with pytest.raises(kondo.ReplayMismatchError):
        run(tied)


def test_calls_of_one_row_are_each_others_company():
    model = TIED["layer scale, mean"]()
    x, a, advantages = batch()
    with pytest.raises(kondo.ReplayMismatchError), kondo.gated(model, rate=0.25):
        sum(loss_of(model(x[i : i + 1]), a[i : i + 1], advantages[i : i + 1]) for i in range(16)).backward()


@pytest.mark.parametrize("name, value", [("tolerance", -1.0), ("tolerance", "x"), ("audit", -1), ("audit", True)])
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        kondo.gated(nn.Linear(2, 2), **{name: value})


def test_tolerance_is_what_the_user_says():
    class Coupled(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.01 * x.mean()

    model = Coupled(6, K)
    x, a, advantages = batch()
    with kondo.gated(model, rate=0.25, tolerance=0.5, audit=0) as gate:
        loss_of(model(x), a, advantages).backward()
    assert gate.stats.steps == 1
    with pytest.raises(kondo.ReplayMismatchError), kondo.gated(model, rate=0.25, audit=0):
        loss_of(model(x), a, advantages).backward()


@pytest.mark.parametrize("audit", [None, 1])
def test_a_frozen_model_with_something_trainable_before_it_is_asked_for_no_gradient(audit):
    """A soft prompt, or an encoder before a frozen language model."""
    model, prompt = nn.Linear(6, K).requires_grad_(False), nn.Parameter(torch.zeros(6))
    x, actions, advantages = batch()
    with kondo.gated(model, rate=0.25, audit=audit) as gate:
        loss_of(model(x + prompt), actions, advantages).backward()
    ours, prompt.grad = prompt.grad, None
    loss_of(model(x + prompt), actions, advantages, gate.last.factors()).backward()
    torch.testing.assert_close(ours, prompt.grad)
