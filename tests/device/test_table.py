"""The table of models and losses on the emulated device: what mixes devices, or reads memory early, shows here."""

import functools

import pytest
import torch
from torch import nn

import kondo_hooks as kondo
from tests.cases import LOSSES, MODELS, LossCase, ModelCase, hand_delight, make_batch
from tests.device import emu
from tests.reference import copies, grads, kept_mask, largest_relative_difference

pytestmark = pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")

SOME = ("reinforce_gather", "ppo_entropy_value", "grpo_masks_kl")
TABLE = [(m, loss) for m in MODELS for loss in LOSSES if loss.name in SOME or m.name in ("mlp", "lstm_dropout")]


@functools.cache
def built(name: str) -> nn.Module:
    torch.manual_seed(1)
    return next(c for c in MODELS if c.name == name).build().double().train()


def loss_of(case: ModelCase, loss_case: LossCase, model, batch, weights=None):
    out = case.call(model, batch)
    value = case.value(out) if case.value else None
    return loss_case.loss(case.logits(out, batch), value, batch, weights), out


@pytest.mark.parametrize(("case", "loss_case"), TABLE, ids=lambda c: c.name)
def test_gradient_equals_masked_full_backward(case: ModelCase, loss_case: LossCase):
    model, reference = (m.to("emu:1") for m in copies(built(case.name)))
    batch = make_batch(12, case.sequence, torch.float64).to("emu:1")
    state = emu.get_rng_state("emu:1")
    with kondo.gated(model, rate=0.25) as gate:
        loss_of(case, loss_case, model, batch)[0].backward()
    after = emu.get_rng_state("emu:1")
    assert len(gate.last.kept) == 3
    assert gate.stats.forwarded == (12 if case.whole_batch else 3)

    emu.set_rng_state(state, "emu:1")
    weights = kept_mask(gate.last.kept.cpu(), 12, torch.float64).to("emu:1")
    loss, out = loss_of(case, loss_case, reference, batch, weights)
    loss.backward()
    assert torch.equal(after, emu.get_rng_state("emu:1")), "the gate moved the device's random stream"
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    expected = hand_delight(case, loss_case, out, batch)
    measured = gate.last.delight * (expected.norm() / gate.last.delight.norm())
    torch.testing.assert_close(measured, expected, rtol=1e-9, atol=1e-9)
    assert not emu.races()
