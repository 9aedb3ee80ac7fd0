"""Windows in one process: several backwards as one population, what waits for it, and what is never lost."""

import copy
import warnings

import pytest
import torch
from torch import nn

import kondo_hooks as kondo
from kondo_hooks import api
from kondo_hooks.core.compact import RankOne
from kondo_hooks.delight.loss_code import Picked
from kondo_hooks.ranks.agreement import Ranks
from kondo_hooks.ranks.engines import OnRanks
from tests.cases import FEATURES, K, Mlp, make_batch
from tests.reference import grads, kept_mask, largest_relative_difference


def micro_batches(n: int, rows: int = 12, seed: int = 0):
    return [make_batch(rows, False, torch.float64, seed + i) for i in range(n)]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return Mlp().double()


def reinforce(logits, batch, weights=1.0):
    logp = logits.log_softmax(-1).gather(1, batch.actions.unsqueeze(1)).squeeze(1)
    return (-weights * batch.advantages * logp).mean()


def run(model, batches, **options):
    with kondo.gated(model, **options) as gate:
        for batch in batches:
            (reinforce(model(batch.x), batch) / len(batches)).backward()
    return gate


def masked(model, batches, kept):
    reference = copy.deepcopy(model)
    for p in reference.parameters():
        p.grad = None
    mask = kept_mask(kept, sum(len(b.x) for b in batches), torch.float64)
    for batch, weights in zip(batches, mask.split([len(b.x) for b in batches]), strict=True):
        (reinforce(reference(batch.x), batch, weights) / len(batches)).backward()
    return grads(reference)


OPTIONS = [
    {"rate": 0.1},
    {"price": 0.5},
    {"rate": 0.1, "unit": "token"},
    {"rate": 0.1, "history": 2},
    {"rate": 0.1, "priority": "uniform"},
    {"rate": 0.1, "deterministic": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_the_window_is_one_population_and_its_gradient_that_of_a_masked_backward(options, micro_batch_size):
    model, batches = mlp(), micro_batches(4)
    gate = run(model, batches, window=4, micro_batch_size=micro_batch_size, **options)
    assert gate.stats.steps == 1
    assert len(gate.last.delight) == 48
    if options == {"rate": 0.1}:
        delight = gate.last.delight
        assert gate.last.kept.tolist() == delight.sort(descending=True, stable=True).indices[:5].sort().values.tolist()
        assert gate.stats.forwarded == 5
    assert largest_relative_difference(grads(model), masked(model, batches, gate.last.kept)) < 1e-10


def test_kept_rows_are_replayed_in_passes_of_at_most_micro_batch_size_rows():
    model, sizes = mlp(), []
    model.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])) if torch.is_grad_enabled() else None)
    run(model, micro_batches(4), window=4, rate=0.25, micro_batch_size=5, audit=0)
    assert sum(sizes) == 12 and max(sizes) <= 5 and max(sizes) - min(sizes) <= 1


def test_decisions_come_every_window_backwards_and_leave_the_other_steps_without_gradient():
    model, batches = mlp(), micro_batches(4)
    with kondo.gated(model, rate=0.25, window=2) as gate:
        for i, batch in enumerate(batches):
            reinforce(model(batch.x), batch).backward()
            assert gate.stats.steps == (i + 1) // 2
            assert all((p.grad is None) == (i == 0) for p in model.parameters())


def test_flush_decides_on_a_window_that_is_not_full():
    model, batches = mlp(), micro_batches(3)
    with kondo.gated(model, rate=0.25, window=8) as gate:
        for batch in batches:
            (reinforce(model(batch.x), batch) / 3).backward()
        assert gate.flush() == 3
        assert gate.flush() == 0
    assert len(gate.last.kept) == 9
    assert largest_relative_difference(grads(model), masked(model, batches, gate.last.kept)) < 1e-10


def test_a_step_while_backwards_wait_is_an_error_and_another_models_step_is_none():
    model, critic = mlp(), nn.Linear(FEATURES, 1).double()
    own, other = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(critic.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with kondo.gated(model, rate=0.25, window=2) as gate:
        batch = micro_batches(1)[0]
        reinforce(model(batch.x), batch).backward()
        critic(batch.x).sum().backward()
        other.step()
        with pytest.raises(RuntimeError, match=r"1 of window=2 backwards wait.*flush"):
            own.step()
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
        gate.flush()
        own.step()


def test_a_context_that_ends_while_backwards_wait_says_so():
    model, batch = mlp(), micro_batches(1)[0]
    with (
        pytest.raises(RuntimeError, match=r"ended while 1 of window=2 backwards waited"),
        kondo.gated(model, rate=0.25, window=2),
    ):
        reinforce(model(batch.x), batch).backward()
    assert "_compiled_call_impl" not in model.__dict__
    with pytest.raises(ZeroDivisionError), kondo.gated(model, rate=0.25, window=2):
        reinforce(model(batch.x), batch).backward()
        raise ZeroDivisionError


def test_inputs_that_want_a_gradient_are_refused_in_a_window():
    model, batch = mlp(), micro_batches(1)[0]
    with (
        kondo.gated(model, rate=0.25, window=2),
        pytest.raises(RuntimeError, match="no input of the model"),
    ):
        reinforce(model(batch.x.requires_grad_()), batch).backward()


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"window": True},
        {"window": "always"},
        {"window": 2.0},
        {"scope": "world"},
        {"micro_batch_size": 0},
        {"balance": True},
        {"balance": 1, "scope": "global"},
    ],
    ids=str,
)
def test_bad_arguments_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kondo.gated(mlp(), rate=0.1, **options)


def test_auto_needs_a_host_that_accumulates():
    from accelerate.state import GradientState

    GradientState._reset_state()
    with pytest.raises(ValueError, match=r"window='auto'.*number of backwards"):
        kondo.gated(mlp(), rate=0.1, window="auto")


def test_auto_follows_accelerate_also_at_the_ragged_end_of_an_epoch():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    model = mlp()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    batches = micro_batches(6)
    loader = torch.utils.data.DataLoader(range(6), batch_size=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    with kondo.gated(prepared, rate=0.1, window="auto") as gate:
        for index in loader:
            batch = batches[int(index)]
            with accelerator.accumulate(prepared):
                accelerator.backward(reinforce(prepared(batch.x), batch))
                optimizer.step()
                optimizer.zero_grad()
            seen.append((gate.stats.steps, None if gate.last is None else len(gate.last.delight)))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert seen == [(0, None)] * 3 + [(1, 48), (1, 48), (2, 24)]


class Wide(nn.Module):
    """A policy over many actions: its logits are what waiting costs."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, vocabulary)

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_waits_is_a_running_top_k_in_the_form_of_rank_one(dtype):
    torch.manual_seed(0)
    vocabulary, length, rows, window = 500, 6, 32, 8
    model = Wide(vocabulary).to(dtype)
    reference = copy.deepcopy(model)
    data = [
        (torch.randint(0, 11, (rows, length)), torch.randint(0, vocabulary, (rows, length)), torch.randn(rows, 1))
        for _ in range(window)
    ]

    def loss_of(logits, actions, advantages, weights=1.0):
        logits = logits if dtype == torch.float64 else logits.float()
        logp = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return (-weights * advantages * logp).mean()

    with kondo.gated(model, rate=1 / 32, window=window) as gate:
        for ids, actions, advantages in data:
            loss_of(model(ids), actions, advantages).backward()
    mask = kept_mask(gate.last.kept, window * rows, torch.float32).view(window, rows, 1)
    for (ids, actions, advantages), weights in zip(data, mask, strict=True):
        loss_of(reference(ids), actions, advantages, weights).backward()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    assert largest_relative_difference(grads(model), grads(reference)) < tolerance
    # Eight rows of ids, and of coefficients, actions and log-probs, against one micro-batch of logits and gradients.
    kept_bytes = 9 * length * 40
    assert gate.stats.waiting_bytes <= kept_bytes
    assert gate.stats.waiting_bytes < rows * length * vocabulary * dtype.itemsize / 50


def test_random_rows_wait_in_the_form_of_rank_one_too():
    torch.manual_seed(0)
    model = Wide(500)
    with kondo.gated(model, rate=0.1, window=3, priority="uniform") as gate:
        for _ in range(3):
            ids, actions = torch.randint(0, 11, (16, 4)), torch.randint(0, 500, (16, 4))
            logp = model(ids).log_softmax(-1).gather(-1, actions.unsqueeze(-1))
            (-logp.squeeze(-1) * torch.randn(16, 1)).mean().backward()
    assert gate.stats.waiting_bytes < 2 * 16 * 4 * 500 * 4 / 20


def test_a_loss_that_is_no_policy_gradient_keeps_its_whole_gradient_while_it_waits():
    model, batches = mlp(), micro_batches(3)

    def loss_of(logits, batch, weights=1.0):
        logp = logits.log_softmax(-1)
        chosen = logp.gather(1, batch.actions.unsqueeze(1)).squeeze(1)
        return (weights * (-batch.advantages * chosen + 0.5 * (logp.exp() * logp).sum(-1))).mean()

    reference = copy.deepcopy(model)
    with kondo.gated(model, rate=0.2, window=3) as gate:
        for batch in batches:
            loss_of(model(batch.x), batch).backward()
    mask = kept_mask(gate.last.kept, 36, torch.float64).view(3, 12)
    for batch, weights in zip(batches, mask, strict=True):
        loss_of(reference(batch.x), batch, weights).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("actions", [7, 50_000])
def test_what_a_hook_changes_is_told_from_rounding(dtype, actions):
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(6, actions, generator=g)).to(dtype).requires_grad_()
    index = torch.cat([torch.randint(actions, (5, 1), generator=g), logits[5:].argmax(-1, keepdim=True)])
    logp = logits.float().log_softmax(-1).gather(-1, index)
    sent = 0.1 * torch.randn(6, 1, generator=g) * (128 if dtype == torch.float16 else 1)
    logp.backward(sent)
    picked = Picked(index, logp.detach(), 0, sent)
    form = RankOne.of_picked(picked, logits.grad)
    assert form is not None
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(form.grad(logits), logits.grad, rtol=tolerance, atol=tolerance)
    for change in (lambda g: 0.9 * g, lambda g: g.clamp(max=0), lambda g: g + 0.1 * float(sent.abs().mean()) / actions):
        assert RankOne.of_picked(picked, change(logits.grad)) is None


@pytest.mark.parametrize("several", [False, True], ids=["a row", "positions"])
def test_what_the_loss_code_tells_needs_no_look_at_the_logits(monkeypatch, several):
    def refuse(*_):
        raise AssertionError("the logits were looked at")

    monkeypatch.setattr(RankOne, "of", refuse)
    torch.manual_seed(0)
    model = Wide(50).double()
    reference = copy.deepcopy(model)
    shape = (12, 5) if several else (12,)
    batches = [
        (torch.randint(0, 11, shape), torch.randint(0, 50, shape), torch.randn(12).double().view(12, *[1] * several))
        for _ in range(3)
    ]

    def loss_of(model, ids, actions, u):
        logits = model(ids)
        if several:
            logits, actions = logits[:, :-1], actions[:, 1:]
        return -(u * logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)).sum()

    with kondo.gated(model, rate=0.25, window=3) as gate:
        for batch in batches:
            loss_of(model, *batch).backward()
    mask = kept_mask(gate.last.kept, 36, torch.float64).view(3, 12, *[1] * several)
    for (ids, actions, u), weights in zip(batches, mask, strict=True):
        loss_of(reference, ids, actions, u * weights).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-12


def _some_actions(g):
    return torch.cat([torch.zeros_like(g[..., :3]), g[..., 3:]], -1)


@pytest.mark.parametrize(
    "hook",
    [lambda g: 0.5 * g, lambda g: g.clamp(-1e-3, 1e-3), lambda g: g + 1e-5, _some_actions],
    ids=["scaled", "clamped", "shifted", "without some actions"],
)
@pytest.mark.parametrize("on", ["logits", "log_softmax"])
def test_a_hook_on_the_way_to_the_logits_is_in_what_waits(hook, on):
    model, batches = mlp(), micro_batches(3)
    reference = copy.deepcopy(model)

    def loss_of(model, batch, weights=1.0):
        logits = model(batch.x)
        logp = logits.log_softmax(-1)
        (logits if on == "logits" else logp).register_hook(hook)
        chosen = logp.gather(1, batch.actions.unsqueeze(1)).squeeze(1)
        return -(weights * batch.advantages * chosen).mean()

    def of_rows(weights):
        """A gradient that a hook has made of nothing is a dropped row's, and goes with it."""
        return lambda g: hook(g) * weights.view(-1, 1)

    with kondo.gated(model, rate=0.2, window=3) as gate:
        for batch in batches:
            loss_of(model, batch).backward()
    mask = kept_mask(gate.last.kept, 36, torch.float64).view(3, 12)
    for batch, weights in zip(batches, mask, strict=True):
        logits = reference(batch.x)
        logp = logits.log_softmax(-1)
        if on == "logits":
            logits.register_hook(of_rows(weights))
        else:
            logits.register_hook(lambda g, weights=weights: g * weights.view(-1, 1))
            logp.register_hook(hook)
        chosen = logp.gather(1, batch.actions.unsqueeze(1)).squeeze(1)
        (-(batch.advantages * chosen).mean()).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-9


def test_rank_one_is_refused_where_it_is_not_exact():
    logits = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    action = torch.randint(0, 9, (3, 4))
    logp = logits.log_softmax(-1)
    (logp.gather(-1, action.unsqueeze(-1)).squeeze(-1) * torch.randn(3, 4)).sum().backward(retain_graph=True)
    form = RankOne.of(logits.detach(), logits.grad, torch.arange(len(logits)))
    assert form is not None
    torch.testing.assert_close(form.grad(logits), logits.grad)
    (1e-6 * (logp.exp() * logp).sum()).backward()
    assert RankOne.of(logits.detach(), logits.grad, torch.arange(len(logits))) is None


@pytest.mark.parametrize("sharpness", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_one_takes_rounding_and_no_small_term_for_it(dtype, sharpness):
    def form(extra, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = (sharpness * torch.randn(8, 32, 50, generator=generator)).to(dtype).requires_grad_()
        logp = logits.float().log_softmax(-1)
        action = torch.randint(0, 50, (8, 32, 1), generator=generator)
        loss = -(logp.gather(-1, action) * torch.randn(8, 1, 1, generator=generator)).sum()
        (loss + extra(logits.float(), logp)).backward()
        return RankOne.of(logits.detach(), logits.grad, torch.arange(len(logits)))

    terms = {
        "z": lambda y, logp: 1e-3 * y.logsumexp(-1).square().sum(),
        "entropy": lambda y, logp: 1e-2 * (logp.exp() * logp).sum(),
        "teacher": lambda y, logp: -1e-2 * (y.detach().flip(-1).softmax(-1) * logp).sum(),
    }
    for seed in range(5):
        assert form(lambda y, logp: 0, seed) is not None
        assert not [name for name, term in terms.items() if form(term, seed) is not None]


def test_a_larger_backward_than_expected_keeps_what_is_still_held_and_says_so():
    model = mlp()
    batches = [*micro_batches(2, rows=4), *micro_batches(1, rows=400, seed=9)]
    # What came first is worth most, and was let go when no large backward was in sight.
    for batch in batches[:2]:
        batch.advantages.fill_(100.0)
    batches[2].advantages.fill_(1e-3)
    with (
        pytest.warns(kondo.KondoWarning, match="more rows than expected"),
        kondo.gated(model, rate=0.1, window=3) as gate,
    ):
        for batch in batches:
            reinforce(model(batch.x), batch).backward()
    assert 0 < gate.stats.kept == gate.stats.forwarded < 41


def test_a_doubtful_input_waits_whole_until_it_was_read():
    """The batch has as many rows as features: which axis holds them is found out by the first replay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, K)).double()
    batches = [make_batch(6, False, torch.float64, i) for i in range(6)]
    with kondo.gated(model, rate=0.2, window=3):
        for batch in batches:
            (reinforce(model(batch.x), batch) / 3).backward()


def test_state_is_kept_over_a_window():
    model, batches = mlp(), micro_batches(8)
    options = {"rate": 0.2, "window": 2, "priority": "uniform"}
    whole = run(copy.deepcopy(model), batches, **options)
    first = run(copy.deepcopy(model), batches[:4], **options)
    with kondo.gated(model, **options) as second:
        second.load_state_dict(first.state_dict())
        for batch in batches[4:]:
            reinforce(model(batch.x), batch).backward()
    assert second.last.kept.tolist() == whole.last.kept.tolist()
    assert second.stats.kept == whole.stats.kept


def test_a_closure_may_bring_the_last_backward_and_must():
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, actions = torch.randn(8, 4), torch.randint(3, (8,))

    def closure():
        loss = torch.nn.functional.cross_entropy(model(x), actions)
        loss.backward()
        return loss

    refused = pytest.raises(RuntimeError, match="1 of window=2 backwards wait")
    with refused, kondo.gated(model, rate=0.25, window=2) as gate:
        closure()
        optimizer.step(closure)
        assert gate.stats.steps == 1
        optimizer.step(closure)


def _forced_late(rows, **options):
    model = Wide(40).double()
    reference = copy.deepcopy(model)
    g = torch.Generator().manual_seed(0)
    data = [
        (
            torch.randint(0, 11, (8, 3), generator=g),
            torch.randint(0, 40, (8, 3), generator=g),
            torch.randn(8, 1, generator=g),
        )
        for _ in range(2)
    ]

    def loss_of(logits, actions, advantages, weights=1.0):
        logp = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return (-weights * advantages.double() * logp).mean()

    with warnings.catch_warnings(record=True) as told, kondo.gated(model, window=2, **options) as gate:
        warnings.simplefilter("always")
        for i, (ids, actions, advantages) in enumerate(data):
            if i == 1:
                gate.force(torch.tensor(rows))
            loss_of(model(ids), actions, advantages).backward()
    weights = gate.last.factors().view(2, 8, 1)
    for (ids, actions, advantages), w in zip(data, weights, strict=True):
        loss_of(reference(ids), actions, advantages, w).backward()
    return largest_relative_difference(grads(model), grads(reference)), [str(w.message) for w in told]


@pytest.mark.parametrize(
    "options", [{"rate": 0.25}, {"rate": 0.1}, {"rate": 0.1, "priority": "uniform"}, {"price": 0.3}], ids=str
)
@pytest.mark.parametrize("rows", [[6, 7, 1], [0, 1, 2, 3, 4, 5, 6, 7]], ids=len)
def test_rows_that_are_forced_when_they_have_been_let_go_are_told(options, rows):
    apart, told = _forced_late(rows, **options)
    assert apart < 1e-10 or any("no longer held" in message for message in told)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("options", [{"priority": "uniform"}, {"deterministic": False}, {}], ids=str)
def test_a_decision_that_fails_is_as_if_it_had_not_been(window, options):
    """The random stream and the forced rows are there for the next one."""
    g = torch.Generator().manual_seed(0)
    x, actions, u = (
        torch.randn(16, 6, generator=g),
        torch.randint(0, 4, (16, 1), generator=g),
        torch.randn(16, generator=g),
    )

    def kept(fails):
        torch.manual_seed(0)
        model = nn.Linear(6, 4)

        def backward(u):
            (-(model(x).log_softmax(-1).gather(1, actions)[:, 0] * u).mean()).backward()

        with kondo.gated(model, rate=0.25, window=window, seed=3, **options) as gate:
            gate.force(torch.tensor([2, 7]))
            if fails:
                for _ in range(window - 1):
                    backward(u)
                with pytest.raises(ValueError, match="NaN"):
                    backward(torch.where(torch.arange(16) == 5, torch.nan, u))
                model.zero_grad()
            for _ in range(window):
                backward(u)
            return gate.last.kept.tolist()

    assert kept(True) == kept(False)


class Routed(nn.Module):
    """Log-probs of tokens (B, T), and beside them what a router makes of these, (B * T, E)."""

    def __init__(self, flat):
        super().__init__()
        self.token, self.router, self.head, self.flat = nn.Embedding(K, 6), nn.Linear(6, 3), nn.Linear(6, K), flat

    def forward(self, ids):
        x = self.token(ids)
        routed = self.router(x.flatten(0, 1))
        x = x * routed.softmax(-1).amax(-1).view(*ids.shape, 1)
        logp = self.head(x).log_softmax(-1).gather(-1, (ids[..., None] + 1) % K)[..., 0]
        return {"log_probs": logp, "seen": routed if self.flat == "routed" else (routed, x.view(1, -1, 6))}


@pytest.mark.parametrize("flat", ["routed", "both"])
@pytest.mark.parametrize("communicates", [False, True])
def test_what_gets_no_gradient_may_be_flattened_in_micro_batches_of_several_lengths(communicates, flat, monkeypatch):
    class Talks(OnRanks):
        pass

    Talks.communicates = communicates
    monkeypatch.setattr(api, "find_engine", lambda model, *_: Talks([model], Ranks()))
    torch.manual_seed(0)
    ours = Routed(flat).double()
    theirs = copy.deepcopy(ours)
    batches = [(torch.randint(K, (4, length)), torch.randn(4, 1, dtype=torch.float64)) for length in (5, 7, 6)]

    def loss(model, ids, u, factors=1.0):
        return -(u * model(ids)["log_probs"] * factors).sum()

    with kondo.gated(ours, rate=0.4, window=3) as gate:
        for ids, u in batches:
            loss(ours, ids, u).backward()
    for (ids, u), factors in zip(batches, gate.last.factors().view(3, 4, 1), strict=True):
        loss(theirs, ids, u, factors).backward()
    assert gate.stats.kept < gate.stats.rows
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_what_gets_a_gradient_may_not_where_every_pass_communicates(monkeypatch):
    class Talks(OnRanks):
        communicates = True

    monkeypatch.setattr(api, "find_engine", lambda model, *_: Talks([model], Ranks()))
    torch.manual_seed(0)
    model = Routed("routed").double()
    with (
        pytest.raises(kondo.ReplayMismatchError, match="flattened into one axis"),
        kondo.gated(model, rate=1 / 2, window=2),
    ):
        for length in (5, 7):
            out = model(torch.randint(K, (4, length)))
            (out["log_probs"] * torch.randn(4, 1)).sum().add(out["seen"].square().sum()).backward()
