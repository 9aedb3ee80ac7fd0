"""``kondo.check``: what it finds is what a gate does, and nothing of the model changes."""

import copy
import random
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import kondo_hooks as kondo
from tests import hf


class Slow(torch.autograd.Function):
    """The identity, in as many milliseconds a row."""

    @staticmethod
    def forward(ctx, x, each, back):
        time.sleep(len(x) * each / 1e3)
        ctx.back = back
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(len(grad) * ctx.back / 1e3)
        return grad, None, None


class Policy(nn.Module):
    """Logits and values; a mask that rows share."""

    def __init__(self, each=0.0, back=0.0):
        super().__init__()
        self.logits, self.value = nn.Linear(5, 4), nn.Linear(5, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.cost = each, back

    def forward(self, x, mask):
        self.calls += 1
        x = self.dropped(x * mask)
        return {"logits": Slow.apply(self.logits(x), *self.cost), "value": self.value(x).squeeze(1)}

    def dropped(self, x):
        return nn.functional.dropout(x, 0.1, self.training)


def policy_loss(u):
    def loss(out):
        logp = out["logits"].log_softmax(-1)[:, 0]
        return -(u * logp).mean() + 0.5 * (out["value"] - u).square().mean()

    return loss


def test_it_says_what_is_read_and_changes_nothing():
    torch.manual_seed(0)
    model, x, mask, u = Policy(), torch.randn(12, 5), torch.ones(5), torch.randn(12)
    policy_loss(u)(model(x, mask)).backward()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    grads = [p.grad for p in model.parameters()]
    values = [grad.clone() for grad in grads]
    hooks = dict(vars(model))
    found = kondo.check(model, x, mask, loss=policy_loss(u))
    assert found.inputs == [("args[0]", (12, 5), 0), ("args[1]", (5,), None)]
    assert found.outputs == [("output ['logits']", (12, 4), 0), ("output ['value']", (12,), 0)]
    assert found.rows == 12 and found.whole is None and found.problem is None and found.policy
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, values, strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert dict(vars(model)).keys() == hooks.keys() and model.training
    told = str(found)
    assert "input args[1] (5,): shared by all rows" in told and "output ['value'] (12,): rows on axis 0" in told
    assert "a gradient but holds no policy" not in told  # it looks by a rule that is fair
    assert "no loss= was given" not in told


@pytest.fixture
def only_sleep(monkeypatch):
    """Time passes while something sleeps, and else never: what is measured does not depend on the machine."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def test_what_a_step_takes_is_what_was_measured(only_sleep):
    torch.manual_seed(0)
    model, x, u = Policy(each=0.5, back=1.5), torch.randn(40, 5), torch.randn(40)
    model.eval()
    u[::2] = 0

    def loss(out):
        return -(u * out["logits"].log_softmax(-1)[:, 0]).mean()

    found = kondo.check(model, x, torch.ones(5), loss=loss)
    assert found.seconds == pytest.approx(0.08) and found.seconds_screen == pytest.approx(0.02)
    assert found.seconds_row == pytest.approx(0.002)  # forward and backward
    ways = {way.name: way for way in found.ways}
    lossless, drawn = ways['rate="lossless"'], ways["noise=0.5"]
    assert lossless.kept == 0.5 and lossless.noise == pytest.approx(0)
    for way, options in ((lossless, {"rate": "lossless"}), (drawn, {"noise": 0.5})):
        with kondo.gated(model, audit=0, **options) as gate:
            taken = []
            for _ in range(5):
                begun = time.perf_counter()
                loss(model(x, torch.ones(5))).backward()
                taken.append(time.perf_counter() - begun)
        assert sorted(taken)[2] == pytest.approx(way.seconds, rel=0.1)
        assert gate.stats.noise == pytest.approx(way.noise, abs=1e-6)
        assert gate.last.rate == pytest.approx(way.kept, abs=1.5 / 40)
    assert drawn.seconds_first == pytest.approx(drawn.seconds - found.seconds_screen)
    assert found.best is not None and found.best.seconds < found.seconds
    assert "least seconds x noise: rate=" in str(found) or "least seconds x noise: noise=" in str(found)


def test_a_model_that_takes_no_time_is_better_without():
    found = kondo.check(nn.Linear(4, 2), torch.randn(16, 4))
    assert found.best is None and "least seconds x noise: no gate" in str(found)
    assert found.stands_in and "no loss= was given" in str(found)


def test_what_cannot_be_gated_is_named():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    found = kondo.check(Centred(4, 2), torch.randn(16, 4))
    assert "a row's output depends on the other rows" in found.problem
    assert "cannot be gated as it is: ReplayMismatchError: " in str(found) and not found.ways


def test_what_is_replayed_whole_is_named():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    running = model[1].running_mean.clone()
    found = kondo.check(model, torch.randn(16, 4))
    assert "BatchNorm1d in training mode" in found.whole and "all rows are replayed whenever one is kept" in str(found)
    assert torch.equal(model[1].running_mean, running)
    assert len({way.seconds for way in found.ways[1:]}) == 1  # whatever is kept


def test_how_noisy_kernels_are_is_seen():
    class Rounded(nn.Linear):
        """Rows come out a little otherwise in a smaller batch."""

        def forward(self, x):
            return super().forward(x) * (1 + 1e-5 * len(x))

    noisy = kondo.check(Rounded(4, 2), torch.randn(16, 4))
    assert 5e-5 < noisy.kernel_noise["the output"] < 2e-4 and "of its largest value" in str(noisy)
    assert kondo.check(nn.Linear(4, 2), torch.randn(16, 4)).kernel_noise["the output"] < 1e-6


def test_a_loss_that_does_not_use_the_model_is_named():
    model, weight = nn.Linear(4, 2), torch.zeros(1, requires_grad=True)
    found = kondo.check(model, torch.randn(16, 4), loss=lambda out: (weight * 2).sum())
    assert "no backward reached a call of it" in found.problem


def test_what_fails_without_a_gate_fails_as_it_does():
    model = nn.Linear(4, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        kondo.check(model, torch.randn(16, 5))
    with pytest.raises(ZeroDivisionError):
        kondo.check(model, torch.randn(16, 4), loss=lambda out: 1 / 0)
    assert model.weight.grad is None


def test_a_loss_of_the_models_own_and_named_inputs():
    model = hf.llama()
    ids = torch.randint(4, 12, (6, 8))
    found = kondo.check(model, input_ids=ids, labels=ids)
    assert found.problem is None and found.rows == 6 and not found.stands_in
    assert found.inputs[0][:2] == ("'input_ids'", (6, 8)) or found.inputs[0][1] == (6, 8)


def test_a_method_and_another_axis():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def act(self, x):
            return self.layer(x)

    found = kondo.check(Steps(), torch.randn(7, 16, 4), options={"method": "act", "batch_dim": 1, "rate": 0.1})
    assert found.model == "Steps.act" and found.rows == 16
    assert [axis for *_, axis in (*found.inputs, *found.outputs)] == [1, 1]


def test_a_wrapped_model_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="give the model before DistributedDataParallel wraps it"):
            kondo.check(nn.parallel.DistributedDataParallel(nn.Linear(4, 2)), torch.randn(8, 4))
    finally:
        dist.destroy_process_group()


def test_gradients_and_generators_beside_the_model_are_as_before():
    torch.manual_seed(0)
    model, critic = nn.Linear(4, 2), nn.Linear(4, 1)
    x = torch.randn(16, 4, requires_grad=True)
    critic(x).sum().backward()
    grads = [p.grad.clone() for p in (*critic.parameters(), x)]
    python, numbers = random.getstate(), np.random.get_state()[1].copy()

    def loss(out):
        random.random(), np.random.rand()
        return (out - critic(x)).square().mean()

    assert kondo.check(model, x.detach(), loss=loss).problem is None
    assert all(torch.equal(p.grad, grad) for p, grad in zip((*critic.parameters(), x), grads, strict=True))
    assert random.getstate() == python and np.array_equal(np.random.get_state()[1], numbers)


def test_a_model_that_is_gated_is_left_to_its_gate():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2), torch.randn(16, 4)
    with kondo.gated(model, noise=0.0, window=2) as gate:
        model(x).square().mean().backward()
        with pytest.raises(RuntimeError, match="gated"):
            kondo.check(model, x)
        model(x).square().mean().backward()
    assert gate.stats.steps == 1
    mine, model.weight.grad = model.weight.grad, None
    (2 * model(x).square().mean()).backward()
    assert torch.allclose(mine, model.weight.grad)


def test_a_fresh_model_of_transformers_stays_whole():
    model, ids = hf.llama(), torch.randint(4, 12, (6, 8))
    kondo.check(model, input_ids=ids, labels=ids, output_hidden_states=True)
    assert len(model(input_ids=ids, output_hidden_states=True).hidden_states) == model.config.num_hidden_layers + 1


def test_the_unit_is_checked_too():
    class BothWays(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.gru, self.head = nn.Embedding(9, 8), nn.GRU(8, 8, bidirectional=True), nn.Linear(16, 9)

        def forward(self, ids):
            return self.head(self.gru(self.token(ids).transpose(0, 1))[0].transpose(0, 1))

    ids = torch.randint(9, (6, 10))

    def loss(out):
        return -(torch.linspace(-1, 1, 6)[:, None] * out.log_softmax(-1).gather(-1, ids[..., None])[..., 0]).mean()

    assert kondo.check(BothWays(), ids, loss=loss).problem is None
    found = kondo.check(BothWays(), ids, loss=loss, options={"unit": "prefix"})
    assert "later positions matter" in found.problem


def test_under_no_grad_it_looks_all_the_same():
    with torch.no_grad():
        assert kondo.check(nn.Linear(4, 2), torch.randn(16, 4)).problem is None


def test_what_a_loss_raises_later_is_raised():
    calls = []

    def loss(out):
        calls.append(out)
        return out.sum() if len(calls) < 3 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        kondo.check(nn.Linear(4, 2), torch.randn(16, 4), loss=loss)


def test_a_frozen_model_is_named():
    with pytest.raises(ValueError, match=r"is everything frozen\?"):
        kondo.check(nn.Linear(4, 2).requires_grad_(False), torch.randn(16, 4))


@pytest.mark.filterwarnings("error::kondo_hooks.KondoWarning")
def test_it_warns_of_nothing_where_all_is_well():
    model, x, mask, u = Policy(), torch.randn(12, 5), torch.ones(5), torch.randn(12)
    loss = policy_loss(u)
    assert kondo.check(model, x, mask, loss=loss).problem is None
