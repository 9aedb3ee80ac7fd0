"""The gradient is that of a masked full backward, and delight is advantage times surprisal, over the table."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kondo_hooks as kondo
from tests.cases import LOSSES, MODELS, LossCase, ModelCase, TokenNll, hand_delight, make_batch
from tests.reference import copies, grads, kept_mask, largest_relative_difference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@functools.cache
def built(name: str) -> nn.Module:
    case = next(c for c in MODELS if c.name == name)
    torch.manual_seed(1)
    return case.build()


def run_gated(case, loss_case, model, batch, **options):
    with kondo.gated(model, **options) as gate:
        out = case.call(model, batch)
        value = case.value(out) if case.value else None
        loss = loss_case.loss(case.logits(out, batch), value, batch, None)
        loss.backward()
    return gate, loss


def run_reference(case, loss_case, model, batch, weights):
    out = case.call(model, batch)
    value = case.value(out) if case.value else None
    loss_case.loss(case.logits(out, batch), value, batch, weights).backward()
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("loss_case", LOSSES, ids=lambda c: c.name)
@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
def test_gradient_equals_masked_full_backward(case: ModelCase, loss_case: LossCase, dtype: torch.dtype):
    model, reference = copies(built(case.name).to(dtype).train())
    batch = make_batch(12, case.sequence, dtype)
    rng = torch.get_rng_state()
    gate, _ = run_gated(case, loss_case, model, batch, rate=0.25)
    after = torch.get_rng_state()
    assert len(gate.last.kept) == 3
    assert gate.stats.forwarded == (12 if case.whole_batch else 3)

    torch.set_rng_state(rng)
    weights = kept_mask(gate.last.kept, 12, dtype)
    out = run_reference(case, loss_case, reference, batch, weights)
    assert torch.equal(after, torch.get_rng_state()), "the gate moved the user's random stream"
    assert largest_relative_difference(grads(model), grads(reference)) < TOLERANCE[dtype]
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)

    expected = hand_delight(case, loss_case, out, batch)
    measured = gate.last.delight / (gate.last.delight.norm() / expected.norm())
    tight = 1e-9 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(measured, expected, rtol=tight, atol=tight)
    if loss_case.name != "grpo_masks_kl":  # its length normalisation is part of U
        torch.testing.assert_close(gate.last.delight, expected, rtol=tight, atol=tight)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_per_token_nll_model(reduction):
    model, reference = copies(TokenNll().double())
    batch = make_batch(10, True, torch.float64)
    with kondo.gated(model, rate=0.3) as gate:
        terms = model(batch.x, batch.actions) * batch.advantages
        getattr(terms, reduction)().backward()
    nll = reference(batch.x, batch.actions)
    weights = kept_mask(gate.last.kept, 10, torch.float64).unsqueeze(1)
    getattr(nll * batch.advantages * weights, reduction)().backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    torch.testing.assert_close(gate.last.delight, (nll * batch.advantages).sum(1).detach())


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    case=st.sampled_from([c for c in MODELS if c.name not in ("gpt2", "llama", "bert_classifier")]),
    loss_case=st.sampled_from(LOSSES),
    n=st.integers(2, 17),
    rate=st.floats(0.01, 1.0),
    seed=st.integers(0, 5),
    cuts=st.lists(st.integers(1, 16), max_size=3, unique=True),
)
def test_any_shape_rate_and_split_into_calls(case, loss_case, n, rate, seed, cuts):
    """All calls of one backward are one population, whatever the split; dropped terms vanish exactly."""
    model, reference = copies(built(case.name).double().train())
    batch = make_batch(n, case.sequence, torch.float64, seed)
    bounds = [0, *sorted(c for c in cuts if c < n), n]
    chunks = [batch.rows(slice(a, b)) for a, b in itertools.pairwise(bounds)]
    if case.whole_batch and any(len(chunk.x) < 2 for chunk in chunks):
        return

    def total(model, weights):
        losses = []
        for chunk, w in zip(chunks, weights, strict=True):
            out = case.call(model, chunk)
            value = case.value(out) if case.value else None
            part = loss_case.loss(case.logits(out, chunk), value, chunk, w)
            losses.append(part * len(chunk.x) / n if "sum" not in loss_case.name else part)
        return torch.stack(losses).sum()

    rng = torch.get_rng_state()
    with kondo.gated(model, rate=rate) as gate:
        total(model, [None] * len(chunks)).backward()
    if rate == 1.0:
        weights = torch.ones(n, dtype=torch.float64)
    else:
        assert len(gate.last.delight) == n
        assert len(gate.last.kept) == max(1, round(rate * n))
        weights = kept_mask(gate.last.kept, n, torch.float64)
    torch.set_rng_state(rng)
    total(reference, weights.split([len(chunk.x) for chunk in chunks])).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


@pytest.mark.parametrize("loss_case", LOSSES, ids=lambda c: c.name)
def test_kept_set_and_delight_do_not_depend_on_scale_or_split(loss_case):
    batch = make_batch(24, False, torch.float64)
    model = built("mlp").double()

    def decide(scale, bounds):
        clone = copies(model)[0]
        with kondo.gated(clone, rate=0.25) as gate:
            parts = []
            for a, b in itertools.pairwise(bounds):
                chunk = batch.rows(slice(a, b))
                part = loss_case.loss(clone(chunk.x), None, chunk, None)
                parts.append(part * (b - a) / 24 if "sum" not in loss_case.name else part)
            (sum(parts) * scale).backward()
        return gate.last

    whole = decide(1.0, [0, 24])
    for scale, bounds in [(1000.0, [0, 24]), (1e-4, [0, 24]), (1.0, [0, 5, 24]), (0.5, [0, 1, 12, 24])]:
        other = decide(scale, bounds)
        assert torch.equal(whole.kept, other.kept)
        torch.testing.assert_close(whole.delight, other.delight)
