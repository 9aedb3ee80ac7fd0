"""How often a gated step makes the host wait, and how many kernels it launches: printed with -s."""

import copy

import pytest
import torch

import kondo_hooks as kondo
from tests.cases import Mlp, gpt2, make_batch
from tests.device.counting import counted


def loss_of(logits, batch):
    logp = logits.log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    return (-logp * batch.advantages).mean()


def mlp_step(model, batch):
    return loss_of(model(batch.x), batch)


def lm_step(model, batch):
    return loss_of(model(input_ids=batch.ids, use_cache=False).logits, batch)


CASES = {
    "mlp": (Mlp, mlp_step, {}, 1),
    "language model": (gpt2, lm_step, {}, 1),
    "screen first": (gpt2, lm_step, {}, 1),
    "window 8": (Mlp, mlp_step, {"window": 8}, 8),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_counted(name: str):
    build, step, options, backwards = CASES[name]
    torch.manual_seed(1)
    model = build().to("emu:0")
    plain = copy.deepcopy(model)
    sequence = step is lm_step
    batch = make_batch(64, sequence, torch.float32).to("emu:0")
    step(plain, batch).backward()
    with counted() as whole:
        for _ in range(backwards):
            step(plain, batch).backward()
    with kondo.gated(model, rate=0.125, **options) as gate:
        for _ in range(2):
            with counted() as ours:
                for _ in range(backwards):
                    if name == "screen first":
                        gate.screen(delight=batch.advantages.sum(1))
                    step(model, batch).backward()
    assert ours.synchronisations > whole.synchronisations and ours.launches > whole.launches
    print(f"\n{name}: synchronisations {ours.synchronisations} (plain {whole.synchronisations})", end=", ")
    print(f"kernels {ours.launches} ({whole.launches}), most bytes {ours.peak_bytes} ({whole.peak_bytes})")
