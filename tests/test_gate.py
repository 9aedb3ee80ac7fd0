"""KondoGate and KondoTrainer against the PyPI package kondo-gate 0.1.0, whose API they are."""

import copy
import dataclasses
import inspect
import math
import pickle

import kondo_gate as peer
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kondo_hooks as kondo
from tests.cases import gpt2, llama, make_batch

NAMES = [
    "KondoGate",
    "KondoGateConfig",
    "KondoGateOutput",
    "KondoTrainer",
    "dg_loss",
    "expected_confidence_baseline",
    "pg_loss",
]
FIELDS = [f.name for f in dataclasses.fields(peer.KondoGateOutput)]


def gates(seed=0, **config):
    return (
        peer.KondoGate(peer.KondoGateConfig(**config)),
        kondo.KondoGate(kondo.KondoGateConfig(**config), seed=seed),
    )


def make_inputs(shape, seed=0, dtype=torch.float32, classes=5):
    """Logits (*shape, classes), actions, advantages and a mask with one empty row: no two delights are equal."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, classes, generator=g, dtype=torch.float64).to(dtype)
    actions = torch.randint(0, classes, shape, generator=g)
    advantages = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    mask = (torch.rand(shape, generator=g) < 0.7).long()
    if len(shape) == 2:
        mask[0], mask[1:, 0] = 0, 1
    return logits, actions, advantages, mask


def assert_same_output(theirs, ours):
    for name in FIELDS:
        a, b = getattr(theirs, name), getattr(ours, name)
        if a is None:
            assert b is None, name
        else:
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def rounding_decides(n, rate):
    """Whether the quantile lies on a sample but for rounding: then their count depends on the values' rounding.

    From torch 2.14 on ``quantile`` may round where its position is whole, too.
    """
    position = torch.quantile(torch.arange(n, dtype=torch.float32), 1.0 - rate).item()
    return n > 1 and 0 < rate < 1 and abs(position - round(position)) < 1e-4


# The API.


def assert_extends(ours, theirs):
    """Same parameters in the same order with the same defaults; whatever else there is, is keyword-only."""
    a, b = (list(inspect.signature(f).parameters.values()) for f in (theirs, ours))
    assert [(p.name, p.default, p.kind) for p in a] == [(p.name, p.default, p.kind) for p in b[: len(a)]]
    for extra in b[len(a) :]:
        assert extra.kind is inspect.Parameter.KEYWORD_ONLY and extra.default is not inspect.Parameter.empty


def test_every_public_name_of_the_peer_is_there():
    public = [n for n, v in vars(peer).items() if getattr(v, "__module__", "") == peer.__name__ and n[0] != "_"]
    assert sorted(public) == NAMES
    assert set(NAMES) <= set(kondo.__all__)


@pytest.mark.parametrize("name", ["dg_loss", "expected_confidence_baseline", "pg_loss"])
def test_functions_take_the_same_arguments(name):
    assert_extends(getattr(kondo, name), getattr(peer, name))


@pytest.mark.parametrize("name", ["KondoGate", "KondoTrainer"])
def test_classes_have_the_same_methods_with_the_same_arguments(name):
    theirs, ours = getattr(peer, name), getattr(kondo, name)
    methods = [n for n, v in vars(theirs).items() if inspect.isfunction(v) and (n[0] != "_" or n == "__init__")]
    assert "__init__" in methods and len(methods) >= 2
    for method in methods:
        assert_extends(getattr(ours, method), getattr(theirs, method))


@pytest.mark.parametrize("name", ["KondoGateConfig", "KondoGateOutput"])
def test_dataclasses_have_the_same_fields_and_defaults(name):
    theirs, ours = (dataclasses.fields(getattr(m, name)) for m in (peer, kondo))
    assert [(f.name, f.default) for f in theirs] == [(f.name, f.default) for f in ours]


def test_default_config_is_the_peers():
    assert dataclasses.asdict(kondo.KondoGate().config) == dataclasses.asdict(peer.KondoGate().config)


# The gate.

SHAPES = st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 12), st.integers(1, 7)))


def compare_forward(theirs, ours, shape, seed, masked, dtype=torch.float32):
    logits, actions, advantages, mask = make_inputs(shape, seed, dtype)
    attention_mask = mask if masked else None
    results, leaves = [], []
    for gate in (theirs, ours):
        leaf = logits.clone().requires_grad_()
        result = gate(logits=leaf, actions=actions, advantages=advantages, attention_mask=attention_mask)
        result.gated_policy_loss.backward()
        results.append(result)
        leaves.append(leaf.grad)
    assert_same_output(*results)
    torch.testing.assert_close(leaves[1], leaves[0], rtol=1e-6, atol=1e-8)


def samples(shape, masked):
    return shape[0] if masked else math.prod(shape)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=SHAPES,
    masked=st.booleans(),
    rate=st.one_of(st.floats(0.001, 1.0), st.sampled_from([i / 20 for i in range(1, 21)])),
    seed=st.integers(0, 100),
)
def test_top_k_matches_the_peer_value_by_value(shape, masked, rate, seed):
    masked = masked and len(shape) == 2
    assume(not rounding_decides(samples(shape, masked), rate))
    compare_forward(*gates(gate_rate=rate), shape, seed, masked)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=SHAPES,
    masked=st.booleans(),
    price=st.floats(-2.0, 2.0),
    seed=st.integers(0, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_fixed_price_matches_the_peer_value_by_value(shape, masked, price, seed, dtype):
    assume(abs(price) > 1e-6)  # zero is the delight of the empty row
    compare_forward(*gates(gate_rate=None, price=price), shape, seed, masked and len(shape) == 2, dtype)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=SHAPES,
    masked=st.booleans(),
    cost=st.one_of(
        st.builds(lambda r: {"gate_rate": r}, st.floats(0.01, 1.0)),
        st.builds(lambda p: {"gate_rate": None, "price": p}, st.floats(-1.0, 1.0)),
    ),
    temperature=st.floats(0.01, 10.0),
    seed=st.integers(0, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_soft_gate_matches_the_peer_value_by_value(shape, masked, cost, temperature, seed, dtype):
    pair = gates(**cost, hard=False, temperature=temperature)
    compare_forward(*pair, shape, seed, masked and len(shape) == 2, dtype)


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_masks_of_any_dtype(kind):
    logits, actions, advantages, mask = make_inputs((9, 4))
    theirs, ours = (gate(logits, actions, advantages, mask.to(kind)) for gate in gates(gate_rate=0.4))
    assert_same_output(theirs, ours)


def test_a_mask_over_single_samples_is_ignored_as_by_the_peer():
    logits, actions, advantages, _ = make_inputs((9,))
    theirs, ours = (gate(logits, actions, advantages, torch.zeros(9)) for gate in gates(gate_rate=0.4))
    assert_same_output(theirs, ours)


def test_with_a_mask_the_gate_is_one_a_row_and_without_one_a_token():
    logits, actions, advantages, mask = make_inputs((9, 4))
    gate = kondo.KondoGate(kondo.KondoGateConfig(gate_rate=0.25))
    assert gate(logits, actions, advantages, mask).gate_weights.shape == (9,)
    assert gate(logits, actions, advantages).gate_weights.shape == (9, 4)


@pytest.mark.parametrize("shape", [(11,), (5, 3)])
@pytest.mark.parametrize("given_delight", [False, True])
def test_compute_gate_matches_the_peer(shape, given_delight):
    g = torch.Generator().manual_seed(3)
    logp, advantages, other = (torch.randn(shape, generator=g) for _ in range(3))
    delight = other if given_delight else None
    for config in ({"gate_rate": 0.3}, {"gate_rate": None, "price": 0.1}, {"hard": False}):
        theirs, ours = (gate.compute_gate(logp, advantages, delight=delight) for gate in gates(**config))
        assert_same_output(theirs, ours)
        assert ours.gate_weights.shape == shape


@pytest.mark.parametrize("config", [{"gate_rate": 0.4}, {"gate_rate": None, "price": 0.1}], ids=str)
def test_soft_weights_carry_the_graph_of_a_given_delight_as_the_peers_do(config):
    zeros, found = torch.zeros(7), []
    for gate in gates(**config, hard=False):
        delight = torch.linspace(-1, 1, 7, requires_grad=True)
        result = gate.compute_gate(zeros, zeros, delight)
        assert not result.actual_gate_rate.requires_grad
        found.append(torch.autograd.grad(result.gate_weights.square().sum(), delight)[0])
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0])


def test_compute_delight_matches_the_peer_and_carries_no_graph():
    logp = torch.randn(4, 3, requires_grad=True)
    advantages = torch.randn(4, 3, requires_grad=True)
    theirs, ours = (gate.compute_delight(logp, advantages) for gate in gates())
    assert torch.equal(theirs, ours) and not ours.requires_grad


def test_the_number_kept_is_the_peers_over_batch_sizes_and_rates():
    g = torch.Generator().manual_seed(0)
    compared = 0
    for n in range(1, 61, 3):
        for rate in [i / 25 for i in range(1, 26)]:
            delight, zeros = torch.randn(n, generator=g), torch.zeros(n)
            theirs, ours = (gate.compute_gate(zeros, zeros, delight).gate_weights for gate in gates(gate_rate=rate))
            if rounding_decides(n, rate):
                assert abs(theirs.sum() - ours.sum()) <= 1
            else:
                assert torch.equal(theirs, ours), (n, rate)
                compared += 1
    assert compared > 400


def test_bernoulli_gate_keeps_with_the_peers_probabilities():
    g = torch.Generator().manual_seed(1)
    logp, advantages = torch.randn(6, generator=g), torch.randn(6, generator=g)
    theirs, ours = gates(gate_rate=0.4, temperature=0.7, deterministic=False)
    p = theirs.compute_gate(logp, advantages).gate_probs.double()
    draws, counts = 3000, torch.zeros(6, dtype=torch.float64)
    for _ in range(draws):
        result = ours.compute_gate(logp, advantages)
        assert set(result.gate_weights.tolist()) <= {0.0, 1.0}
        assert result.actual_gate_rate == result.gate_weights.mean()
        counts += result.gate_weights
    torch.testing.assert_close(result.gate_probs.double(), p)
    z = (counts / draws - p) / (p * (1 - p) / draws).sqrt()
    assert z.abs().max() < 4.5


def test_bernoulli_draws_come_from_the_gates_own_generator():
    zeros = torch.zeros(50)
    config = {"gate_rate": None, "price": 0.0, "deterministic": False}
    before = torch.get_rng_state()
    first = gates(seed=1, **config)[1].compute_gate(zeros, zeros).gate_weights
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert torch.equal(first, gates(seed=1, **config)[1].compute_gate(zeros, zeros).gate_weights)
    assert not torch.equal(first, gates(seed=2, **config)[1].compute_gate(zeros, zeros).gate_weights)


def test_bernoulli_loss_and_gradient_are_those_of_the_gate_it_drew():
    logits, actions, advantages, _ = make_inputs((12,), dtype=torch.float64)
    logits.requires_grad_()
    gate = gates(gate_rate=0.4, deterministic=False)[1]
    result = gate(logits, actions, advantages)
    (found,) = torch.autograd.grad(result.gated_policy_loss, logits)
    logp = logits.log_softmax(-1)[torch.arange(12), actions]
    (expected,) = torch.autograd.grad(-(logp * advantages * result.gate_weights).mean(), logits)
    assert 0 < result.gate_weights.sum() < 12
    torch.testing.assert_close(found, expected)


def test_a_gate_can_be_copied_and_pickled():
    gate = gates(gate_rate=None, price=0.0, deterministic=False)[1]
    zeros = torch.zeros(50)
    gate.compute_gate(zeros, zeros)
    others = [copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))]
    expected = gate.compute_gate(zeros, zeros).gate_weights
    assert all(torch.equal(other.compute_gate(zeros, zeros).gate_weights, expected) for other in others)


# Where the peer is wrong.


@pytest.mark.parametrize(("n", "rate", "k"), [(10, 0.3, 3), (100, 0.03, 3), (8, 0.03, 1), (1, 0.03, 1)])
def test_equal_delights_keep_exactly_k_by_index_where_the_peer_keeps_all(n, rate, k):
    theirs, ours = (g.compute_gate(torch.zeros(n), torch.ones(n)).gate_weights for g in gates(gate_rate=rate))
    assert theirs.sum() == n
    assert ours.tolist() == [1.0] * k + [0.0] * (n - k)


def test_ties_at_the_threshold_are_cut_by_index():
    delight = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.0, 1.0, -1.0])
    theirs, ours = (g.compute_gate(delight, delight, delight).gate_weights for g in gates(gate_rate=0.3))
    assert theirs.sum() == 5
    assert ours.nonzero().flatten().tolist() == [0, 2, 3]


def test_a_price_must_be_beaten_where_the_peer_keeps_what_equals_it():
    delight = torch.tensor([0.0, 0.5, -0.5])
    theirs, ours = (g.compute_gate(delight, delight, delight).gate_weights for g in gates(gate_rate=None, price=0.0))
    assert theirs.tolist() == [1.0, 1.0, 0.0] and ours.tolist() == [0.0, 1.0, 0.0]


def test_in_double_precision_the_sample_at_the_quantile_is_not_lost_to_rounding():
    lost = 0
    for seed in range(20):
        delight = torch.randn(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        theirs, ours = (g.compute_gate(delight, delight, delight).gate_weights for g in gates(gate_rate=0.5))
        assert ours.sum() == 1
        lost += int(theirs.sum() == 0)
    assert lost > 0


# Losses.


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shape=SHAPES, eta=st.floats(0.05, 5.0), seed=st.integers(0, 100))
def test_losses_and_baseline_match_the_peer_and_so_do_their_gradients(shape, eta, seed):
    logits, actions, advantages, _ = make_inputs(shape, seed)
    found = []
    for module in (peer, kondo):
        leaf = logits.clone().requires_grad_()
        pg = module.pg_loss(leaf, actions, advantages)
        dg, weights = module.dg_loss(leaf, actions, advantages, eta=eta)
        base = module.expected_confidence_baseline(leaf.softmax(-1))
        assert not weights.requires_grad
        gradients = [torch.autograd.grad(t.sum(), leaf, retain_graph=True)[0] for t in (pg, dg, base)]
        found.append([pg, dg, weights, base, *gradients])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_losses_send_no_gradient_to_the_advantages():
    logits, actions, advantages, _ = make_inputs((6,))
    logits.requires_grad_()
    advantages.requires_grad_()
    for loss in (kondo.pg_loss(logits, actions, advantages), kondo.dg_loss(logits, actions, advantages)[0]):
        assert torch.autograd.grad(loss, advantages, allow_unused=True) == (None,)


# The trainer.


def tiny(kind):
    if kind == "llama":
        return llama(use_cache=False)
    return gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)


def trainers(kind, **options):
    model = tiny(kind)
    models = [copy.deepcopy(model) for _ in range(2)]
    made = []
    for module, m in zip((peer, kondo), models, strict=True):
        made.append(module.KondoTrainer(m, **options, optimizer=torch.optim.SGD(m.parameters(), lr=0.5)))
    return made


OPTIONS = [{"gate_rate": 0.25}, {"price": 0.3}, {"gate_rate": 0.25, "hard": False}, {"gate_rate": 1.0}]


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no_mask"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trainer_steps_to_the_peers_parameters(kind, options, masked):
    theirs, ours = trainers(kind, **options)
    start = copy.deepcopy(ours.model.state_dict())
    for step in range(3):
        batch = make_batch(12, True, torch.float32, seed=step)
        mask = batch.mask if masked else None
        expected = theirs.step(batch.ids, batch.actions, batch.advantages, mask)
        found = ours.step(batch.ids, batch.actions, batch.advantages, mask)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(start[name], value) for name, value in ours.model.state_dict().items())


def forwarded_rows(model, seen):
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(len(out)) if torch.is_grad_enabled() else None
    )


@pytest.mark.parametrize(("options", "rows"), [({"gate_rate": 0.25}, 3), ({"gate_rate": 0.25, "hard": False}, 12)])
def test_trainer_forwards_only_kept_rows_with_a_graph(options, rows):
    _, trainer = trainers("llama", **options)
    seen = []
    forwarded_rows(trainer.model, seen)
    for step in range(3):
        batch = make_batch(12, True, torch.float32, seed=step)
        result = trainer.step(batch.ids, batch.actions, batch.advantages, batch.mask)
        assert result["rows_forwarded"] == rows == seen.pop()
        assert not seen or step == 0, "the audit looks once"
        seen.clear()


def test_trainer_that_drops_every_row_leaves_the_parameters():
    theirs, ours = trainers("llama", price=1e6)
    before = copy.deepcopy(ours.model.state_dict())
    batch = make_batch(6, True, torch.float32)
    for trainer in (theirs, ours):
        trainer.step(batch.ids, batch.actions, batch.advantages, batch.mask)
    assert all(torch.equal(before[name], value) for name, value in ours.model.state_dict().items())


def test_trainer_with_a_bernoulli_gate_and_its_own_optimizer():
    model = tiny("llama")
    trainer = kondo.KondoTrainer(model, deterministic=False, lr=1e-2)
    assert isinstance(trainer.optimizer, torch.optim.Adam) and trainer.optimizer.defaults["lr"] == 1e-2
    before = copy.deepcopy(model.state_dict())
    batch = make_batch(12, True, torch.float32)
    model.eval()
    result = trainer.step(batch.ids, batch.actions, batch.advantages, batch.mask)
    assert model.training and math.isfinite(result["loss"]) and 0 < result["rows_forwarded"] < 12
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_trainer_switched_off_by_the_environment_still_takes_the_peers_step(monkeypatch):
    monkeypatch.setenv("KONDO_DISABLE", "1")
    theirs, ours = trainers("llama", gate_rate=0.25)
    batch = make_batch(12, True, torch.float32)
    for trainer in (theirs, ours):
        trainer.step(batch.ids, batch.actions, batch.advantages, batch.mask)
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


# Errors.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gate_rate": 0.3, "price": 0.0}, "either gate_rate or price, not both"),
        ({"gate_rate": None}, "gate_rate or price"),
        *(({"gate_rate": bad}, r"gate_rate must be in \(0, 1\]") for bad in (0.0, -0.1, 1.1, math.nan, math.inf)),
        *(({"temperature": bad}, "temperature must be > 0") for bad in (0.0, -1.0, math.nan)),
        ({"gate_rate": None, "price": math.nan}, "price"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        kondo.KondoGate(kondo.KondoGateConfig(**config))


@pytest.mark.parametrize(
    ("logits", "actions", "advantages", "message"),
    [
        ((4,), (4,), (4,), r"logits must be \(B, V\) or \(B, T, V\), got \(4,\)"),
        ((2, 3, 4, 5), (2, 3, 4), (2, 3, 4), "logits must be"),
        ((4, 5), (3,), (4,), r"logits \(4, 5\), actions \(3,\) and advantages \(4,\) do not fit"),
        ((4, 5), (4,), (4, 1), "do not fit"),
        ((4, 3, 5), (4, 3), (4,), "do not fit"),
        ((4, 3, 5), (4,), (4,), "do not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits, actions, advantages, message):
    with pytest.raises(ValueError, match=message):
        kondo.KondoGate()(torch.zeros(logits), torch.zeros(actions, dtype=torch.long), torch.zeros(advantages))


def test_advantages_of_another_shape_than_the_log_probs_are_refused():
    gate = kondo.KondoGate()
    with pytest.raises(ValueError, match=r"advantages have shape \(3,\), log_probs \(3, 1\)"):
        gate.compute_gate(torch.zeros(3, 1), torch.zeros(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", [{"gate_rate": 0.3}, {"gate_rate": None, "price": 0.0}, {"hard": False}])
def test_delight_that_is_not_finite_is_refused(config, bad):
    gate = gates(**config)[1]
    with pytest.raises(ValueError, match="delight is NaN or infinite"):
        gate.compute_gate(torch.full((3,), -1.0), torch.tensor([0.0, bad, 1.0]))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_an_empty_batch_is_refused(shape):
    with pytest.raises(ValueError, match="empty batch"):
        kondo.KondoGate().compute_gate(torch.empty(shape), torch.empty(shape))


def test_an_empty_batch_of_logits_is_refused():
    with pytest.raises(ValueError, match="empty batch"):
        kondo.KondoGate()(torch.empty(0, 4), torch.empty(0, dtype=torch.long), torch.empty(0))
