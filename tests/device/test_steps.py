"""What a gate does beside the table, on the emulated device: options, precision, two devices, streams."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kondo_hooks as kondo
from kondo_hooks.core.kept_rows import Part
from kondo_hooks.same.state import Autocast, products
from tests.cases import FEATURES, K, Mlp, PolicyAndValue, make_batch
from tests.device import emu
from tests.reference import grads, largest_relative_difference


@pytest.fixture(autouse=True)
def _no_races():
    emu.races()
    yield
    assert not emu.races()


def mlp(device: str = "emu:0", dropout: float = 0.0, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return Mlp(dropout).to(device, dtype)


def batch_on(device: str = "emu:0", n: int = 12, sequence: bool = False, seed: int = 0, dtype=torch.float64):
    return make_batch(n, sequence, dtype, seed).to(device)


def reinforce(logits, batch, weights=None):
    logp = logits.log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    terms = -logp * batch.advantages
    return (terms if weights is None else terms * weights.to(terms).view(-1, *[1] * (terms.dim() - 1))).mean()


def states():
    return [torch.get_rng_state(), *(emu.get_rng_state(d) for d in range(emu.DEVICES))]


def set_states(saved):
    torch.set_rng_state(saved[0])
    for device, state in enumerate(saved[1:]):
        emu.set_rng_state(state, device)


def check(model, step, rows: int = 12, tolerance: float = 1e-10, **options):
    """``step(model, weights)`` is a loss; the gated gradient is that of the masked loss, draws and all."""
    reference, before = copy.deepcopy(model), states()
    with kondo.gated(model, **options) as gate:
        step(model, None).backward()
    after = states()
    set_states(before)
    factors = gate.last.factors().cpu().double()
    if options.get("unit") != "token":
        assert len(factors) == rows
    step(reference, factors).backward()
    assert all(map(torch.equal, after, states())), "the gate moved the user's random numbers"
    assert largest_relative_difference(grads(model), grads(reference)) < tolerance
    return gate


OPTIONS = [
    {"rate": 0.25, "priority": "uniform"},
    {"rate": 0.25, "priority": "advantage"},
    {"rate": 0.5, "deterministic": False},
    {"rate": 0.5, "deterministic": False, "unbiased": True},
    {"rate": 0.25, "hard": False},
    {"rate": 0.25, "history": 3},
    {"rate": 0.25, "weight": "dg", "normalize": "kept"},
    {"price": 0.5},
    {"rate": 0.25, "micro_batch_size": 2},
    {"rate": 0.25, "seed": 5, "priority": kondo.additive(0.3)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options):
    batch = batch_on()
    check(mlp(dropout=0.3), lambda m, w: reinforce(m(batch.x), batch, w), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_in_a_window(options):
    model, batches = mlp(), [batch_on(seed=i) for i in range(3)]
    reference = copy.deepcopy(model)
    with kondo.gated(model, window=3, **options) as gate:
        for batch in batches:
            (reinforce(model(batch.x), batch) / 3).backward()
    for batch, weights in zip(batches, gate.last.factors().split(12), strict=True):
        (reinforce(reference(batch.x), batch, weights) / 3).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_tokens():
    batch = batch_on(sequence=True)

    def step(model, factors):
        weights = 1 if factors is None else factors.to("emu:0").view(12, -1)
        logp = model(batch.x).log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
        return (-logp * batch.advantages * batch.mask * weights).sum()

    check(mlp(), step, rate=0.2, unit="token")


def test_a_loss_inside_the_model():
    class WithLoss(Mlp):
        def forward(self, x, labels):
            return F.cross_entropy(super().forward(x), labels)

    torch.manual_seed(0)
    model, batch = WithLoss(0.2).to("emu:1").double(), batch_on("emu:1")
    reference, before = copy.deepcopy(model), states()
    with kondo.gated(model, rate=0.25) as gate:
        model(batch.x, batch.actions).backward()
    set_states(before)
    nll = F.cross_entropy(reference.body(batch.x), batch.actions, reduction="none")
    (nll * gate.last.factors()).mean().backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    model, batch = mlp(dropout=0.2, dtype=torch.float32), batch_on(dtype=torch.float32)
    seen = []
    model.body[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))

    def step(model, weights):
        with torch.autocast("emu", dtype):
            return reinforce(model(batch.x), batch, weights)

    with pytest.warns(kondo.KondoWarning, match="hooks"):
        check(model, step, tolerance=3e-2, rate=0.25)
    assert set(seen) == {dtype}


@pytest.mark.parametrize("overflows", [False, True])
def test_grad_scaler(overflows):
    model, batch = mlp(dtype=torch.float32), batch_on(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("emu", init_scale=2.0**18 if overflows else 2.0**8)
    before = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25) as gate:
        with torch.autocast("emu", torch.float16):
            loss = reinforce(model(batch.x) * (100 if overflows else 1), batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    moved = any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert moved != overflows
    assert (scaler.get_scale() < 2.0**18) or not overflows
    if not overflows:
        reference = copy.deepcopy(before)
        reinforce(reference(batch.x), batch, gate.last.factors()).backward()
        ours = {name: p.grad for name, p in model.named_parameters()}
        assert largest_relative_difference(ours, grads(reference)) < 3e-2


@pytest.mark.parametrize("told_on", ["emu:0", "cpu"])
def test_screen_first(told_on):
    model, batch = mlp(), batch_on()
    with torch.no_grad():
        logp = model(batch.x).log_softmax(-1).gather(1, batch.actions.unsqueeze(1)).squeeze(1)
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25) as gate:
        decision = gate.preselect(logp=logp.to(told_on), advantages=batch.advantages.to(told_on))
        reinforce(model(batch.x), batch).backward()
    assert gate.stats.forwarded == 3
    reinforce(reference(batch.x), batch, decision.factors()).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


@pytest.mark.parametrize("weight", ["pg", "dg"])
def test_screen_first_with_nothing_kept_and_with_tokens(weight):
    model, batch = mlp(), batch_on(sequence=True)
    with kondo.gated(model, price=0.3, unit="token", weight=weight) as gate:
        decision = gate.preselect(delight=batch.advantages)
        reinforce(model(batch.x), batch).backward()
    reference = copy.deepcopy(model)
    reference.zero_grad()
    logp = reference(batch.x).log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    (-logp * batch.advantages * decision.factors().view(12, -1)).mean().backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    model.zero_grad()
    with kondo.gated(model, price=1e9) as gate:
        gate.preselect(delight=batch.advantages.sum(1))
        reinforce(model(batch.x), batch).backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_marked_log_probs_of_a_gaussian():
    class Gaussian(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Linear(FEATURES, 2)

        def forward(self, x):
            return self.mean(x)

    model, batch = Gaussian().to("emu:0").double(), batch_on()
    actions = torch.randn(12, 2, dtype=torch.float64).to("emu:0")
    reference = copy.deepcopy(model)

    def loss(out, mark, weights=1.0):
        logp = mark(torch.distributions.Normal(out, 1.0).log_prob(actions).sum(-1))
        return (-logp * batch.advantages * weights).mean()

    with kondo.gated(model, rate=0.25) as gate:
        loss(model(batch.x), gate.logp).backward()
    loss(reference(batch.x), lambda t: t, gate.last.factors()).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_forced_rows_told_on_the_host():
    model, batch = mlp(), batch_on()
    with kondo.gated(model, rate=0.25) as gate:
        gate.force(torch.tensor([0, 7]))
        reinforce(model(batch.x), batch).backward()
        assert {0, 7} <= set(gate.last.kept.tolist())
        gate.force(torch.arange(12) == 5)
        reinforce(model(batch.x), batch).backward()
        assert 5 in gate.last.kept.tolist()


class TwoDevices(nn.Module):
    """The first half on emu:0, the second on emu:1; moves its inputs to itself, and returns values from both."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(dropout)).to("emu:0")
        self.second = nn.Sequential(nn.Dropout(dropout), nn.Linear(16, K)).to("emu:1")
        self.value = nn.Linear(16, 1).to("emu:0")

    def forward(self, x):
        hidden = self.first(x.to("emu:0"))
        return self.value(hidden).squeeze(-1), self.second(hidden.to("emu:1"))


def two_device_loss(out, batch, weights=None):
    value, logits = out
    loss = reinforce(logits, batch.to("emu:1"), weights)
    errors = (value - batch.returns.to("emu:0")) ** 2
    return loss + (errors if weights is None else errors * weights.to("emu:0")).mean().to("emu:1")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("inputs_on", ["cpu", "emu:0", "emu:1"])
def test_a_model_on_two_devices(inputs_on, dropout):
    torch.manual_seed(2)  # both devices draw alike from here
    model, batch = TwoDevices(dropout).double(), batch_on(inputs_on)
    gate = check(model, lambda m, w: two_device_loss(m(batch.x), batch, w), rate=0.25)
    assert gate.stats.forwarded == 3


@pytest.mark.parametrize(
    "options", [{"window": 2}, {"micro_batch_size": 2}, {"unit": "token"}, {"weight": "dg"}], ids=str
)
def test_a_model_on_two_devices_with_options(options):
    model, batch = TwoDevices().double(), batch_on("cpu")
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25, **options) as gate:
        for _ in range(options.get("window", 1)):
            two_device_loss(model(batch.x), batch).backward()
    for factors in gate.last.factors().split(12):
        two_device_loss(reference(batch.x), batch, factors).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


@pytest.mark.parametrize("inputs_on", ["cpu", "emu:1"])
def test_screen_first_on_two_devices(inputs_on):
    model, batch = TwoDevices().double(), batch_on(inputs_on)
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25, weight="dg") as gate:
        decision = gate.preselect(delight=batch.advantages)
        two_device_loss(model(batch.x), batch).backward()
    two_device_loss(reference(batch.x), batch, decision.factors()).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


@pytest.mark.parametrize("loss_on", ["cpu", "emu:0"])
def test_the_loss_on_another_device_than_the_outputs(loss_on):
    model, batch = mlp("emu:1"), batch_on(loss_on)
    check(model, lambda m, w: reinforce(m(batch.x.to("emu:1")).to(loss_on), batch, w), rate=0.25)


def test_the_outputs_on_another_device_than_the_inputs():
    class Moves(Mlp):
        def forward(self, x):
            return super().forward(x).to("cpu")

    torch.manual_seed(0)
    model, batch = Moves(0.2).double().to("emu:0"), batch_on("cpu")
    check(model, lambda m, w: reinforce(m(batch.x.to("emu:0")), batch, w), rate=0.25)


def test_dropout_on_another_device_than_inputs_and_outputs():
    class Detour(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(FEATURES, 16), nn.Linear(16, K)

        def forward(self, x):
            hidden = F.dropout(self.first(x).to("emu:1"), 0.5, self.training)
            return self.last(F.dropout(hidden.to("emu:0"), 0.5, self.training))

    torch.manual_seed(0)
    model, batch = Detour().double().to("emu:0"), batch_on()
    gate = check(model, lambda m, w: reinforce(m(batch.x), batch, w), rate=0.25, audit=0)
    assert gate.stats.forwarded == 3


@pytest.mark.parametrize("default", ["emu:0", "emu:1", "cpu"])
@pytest.mark.parametrize("model_on", ["emu:0", "cpu"])
@pytest.mark.parametrize("options", [{}, *OPTIONS[:3], {"window": 2}, {"unit": "token"}], ids=str)
def test_default_device(default, model_on, options):
    model, batch = mlp(model_on, dropout=0.2), batch_on(model_on)
    reference, before = copy.deepcopy(model), states()
    torch.set_default_device(default)
    try:
        with kondo.gated(model, **{"rate": 0.25, **options}) as gate:
            for _ in range(options.get("window", 1)):
                reinforce(model(batch.x), batch).backward()
        torch.set_default_device(None)
        factors = gate.last.factors()
        set_states(before)
        for weights in factors.split(12):
            reinforce(reference(batch.x), batch, weights).backward()
        assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
        torch.set_default_device(default)
        with kondo.gated(model, rate=0.25) as gate:
            gate.preselect(delight=batch.advantages)
            reinforce(model(batch.x), batch).backward()
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(Mlp):
        def forward(self, x):
            if reentrant:
                x = x.detach().requires_grad_()
            return checkpoint(self.body, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    model, batch = Checkpointed(0.3).double().to("emu:0"), batch_on()
    check(model, lambda m, w: reinforce(m(batch.x), batch, w), rate=0.25)


def test_gradient_of_an_input():
    model, batch = mlp(), batch_on()
    reference = copy.deepcopy(model)
    ours, theirs = (batch.x.clone().requires_grad_() for _ in range(2))
    with kondo.gated(model, rate=0.25) as gate:
        reinforce(model(ours), batch).backward()
    reinforce(reference(theirs), batch, gate.last.factors()).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_autograd_grad_and_backward_with_inputs():
    model, batch = mlp(), batch_on()
    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.25) as gate:
        ours = torch.autograd.grad(reinforce(model(batch.x), batch), list(model.parameters()))
        loss = reinforce(model(batch.x), batch)
        loss.backward(inputs=[model.body[0].weight])
    reinforce(reference(batch.x), batch, gate.last.factors()).backward()
    for a, p in zip(ours, reference.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)
    torch.testing.assert_close(model.body[0].weight.grad, reference.body[0].weight.grad)
    assert model.body[0].bias.grad is None


def test_rows_travel_to_another_rank_and_back():
    model, batch = PolicyAndValue().double().to("emu:1"), batch_on("emu:1")
    with kondo.gated(model, rate=0.5, window=2) as gate:
        logits, value, *_ = model(batch.x)
        (reinforce(logits, batch) + (value - batch.returns).pow(2).mean()).backward()
        (part,) = [a.held for a in gate._step.window.arrivals]
        sent = [t.cpu() for t in part.to_tensors()]
        back = Part.from_tensors(part, sent)
        for ours, theirs in zip(back.held.inputs, part.held.inputs, strict=True):
            assert ours.device == theirs.device and torch.equal(ours, theirs)
        for i, grad in enumerate(part.grads):
            if isinstance(grad, torch.Tensor):
                assert back.grads[i].device == grad.device and torch.equal(back.grads[i], grad)
        logits, value, *_ = model(batch.x)
        (reinforce(logits, batch) + (value - batch.returns).pow(2).mean()).backward()


@pytest.mark.parametrize("options", [{}, {"history": 4}, {"priority": "uniform"}], ids=str)
def test_state_is_loaded_with_map_location(options):
    model, batch = mlp(), batch_on()

    def step(gate):
        reinforce(model(batch.x), batch).backward()
        return gate.last.kept.tolist()

    with kondo.gated(model, rate=0.25, **options) as gate:
        step(gate)
        saved = io.BytesIO()
        torch.save(gate.state_dict(), saved)
        expected = [step(gate) for _ in range(3)]
    for device in ("emu:1", "emu:0", "cpu"):
        saved.seek(0)
        with kondo.gated(model, rate=0.25, **options) as gate:
            gate.load_state_dict(torch.load(saved, map_location=device))
            assert [step(gate) for _ in range(3)] == expected


STREAMED = [{}, {"window": 2}, {"micro_batch_size": 2}, {"unit": "token"}, {"priority": "uniform"}, {"screen": True}]


@pytest.mark.parametrize("options", STREAMED, ids=str)
@pytest.mark.parametrize("loss_on_side", [False, True])
def test_a_forward_on_another_stream_than_its_backward(options, loss_on_side):
    model, batch = mlp(dropout=0.2), batch_on(sequence=True)
    side, main = torch.Stream("emu:0"), torch.accelerator.current_stream("emu:0")
    screens = options.get("screen", False)
    options = {"rate": 0.25, **{name: value for name, value in options.items() if name != "screen"}}
    with kondo.gated(model, **options) as gate:
        for _ in range(4):
            side.wait_stream(main)
            with side:
                if screens:
                    gate.preselect(delight=batch.advantages.sum(1))
                out = model(batch.x)
                loss = reinforce(out, batch) / 3 if loss_on_side else None
            if loss is None:
                main.wait_stream(side)
                loss = reinforce(out, batch) / 3
            loss.backward()
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(0.5)  # as the optimizer does, on the caller's stream
            del out, loss


@pytest.mark.parametrize("switch", ["old", "new"])
def test_switches_for_the_precision_of_products(switch):
    cuda, host = torch.device("cuda"), torch.device("cpu")
    autocast = Autocast.current([host])
    precise = autocast.tolerance(torch.zeros(2))
    try:
        if switch == "new":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            with pytest.raises(RuntimeError, match="mix"):
                torch.get_float32_matmul_precision()
        else:
            torch.set_float32_matmul_precision("medium")
        assert products(cuda) == "tf32"
        assert autocast.tolerance(torch.zeros(2)) > precise
        assert autocast.tolerance(torch.zeros(2, dtype=torch.float64)) < precise
        batch = batch_on()
        check(mlp(), lambda m, w: reinforce(m(batch.x), batch, w), rate=0.25)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
    assert autocast.tolerance(torch.zeros(2)) == precise


def test_an_rnn_with_dropout_runs_without_cudnn():
    seen = []

    class Rnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(FEATURES, 8, 2, batch_first=True, dropout=0.3), nn.Linear(8, K)

        def forward(self, x):
            seen.append(torch.backends.cudnn.enabled)
            return self.head(self.rnn(x)[0])

    torch.manual_seed(0)
    model, batch = Rnn().double().to("emu:1"), batch_on("emu:1", sequence=True)
    gate = check(model, lambda m, w: reinforce(m(batch.x), batch, w), rate=0.25, audit=0)
    assert gate.stats.forwarded == 3
    assert seen == [False, False, True]  # the screen, the replay, and the reference outside of the gate
    seen.clear()
    with kondo.gated(model.eval(), rate=0.25, audit=0):
        reinforce(model(batch.x), batch).backward()
    assert seen == [True, True] and torch.backends.cudnn.enabled
