"""OpenRLHF's own trainer of the actor, gated, and with the gradients of dropped rows masked."""

import os
import socket
from unittest import mock

import pytest
import torch

pytest.importorskip("openrlhf", reason="make frameworks ONLY=openrlhf")

import kondo_hooks as kondo
from tests.frameworks.openrlhf import cpu
from tests.frameworks.openrlhf.cpu import ActorPPOTrainer
from tests.reference import Runs

KL = 0.3


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with mock.patch.dict(os.environ, rank), cpu.without_cuda():
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Gated(ActorPPOTrainer):
    """The recipe, and the factor of each row that a micro-batch had."""

    def ppo_train(self, kl_ctl):
        self.factors, self.sizes = [], []
        with kondo.gated(self.actor, logp=0, **{"window": "auto"} | self.options) as self.gate:
            return super().ppo_train(kl_ctl)

    def training_step(self, experience, *args):
        before = self.gate.stats.steps
        self.sizes.append(len(experience.sequences))
        status = super().training_step(experience, *args)
        if self.gate.stats.steps > before:
            self.factors += self.gate.last.factors().split(self.sizes)
            self.sizes.clear()
        return status


class Masked(ActorPPOTrainer):
    """All rows, with the gradients at the actor's outputs multiplied by each row's factor."""

    def ppo_train(self, kl_ctl):
        factors = iter(self.factors)

        def mask(actor, given, outputs):
            mine = next(factors)
            for tensor in (outputs[0], getattr(outputs[1], "entropy", None)):
                if tensor is not None:
                    tensor.register_hook(lambda grad: grad * mine.view(-1, 1).to(grad))

        hook = self.actor.register_forward_hook(mask)
        try:
            return super().ppo_train(kl_ctl)
        finally:
            hook.remove()


def parameters(trainer):
    mine = list(trainer.actor.named_parameters())
    with cpu.strategies.deepspeed.zero.GatheredParameters([p for _, p in mine]):
        return {name: p.detach().float().clone() for name, p in mine}


def difference(found, wanted, start):
    """Of what training changed, relative to the largest change."""
    moved = max((wanted[name] - start[name]).abs().max() for name in wanted)
    assert moved > 1e-3
    return max(((found[name] - wanted[name]).abs().max() / moved).item() for name in wanted)


def run(kind, rule=None, factors=None, **options):
    """Train; the trainer, what it logged, its parameters before and after, and the sizes of its runs with a graph."""
    trainer = cpu.made(kind, **options)
    trainer.options, trainer.factors = rule, factors
    runs, start = Runs(trainer.actor, cpu.V), parameters(trainer)
    torch.manual_seed(0)
    status = trainer.ppo_train(KL)
    return trainer, status, start, parameters(trainer), runs.tokens


CONFIGURATIONS = {
    "padded": {},
    "packing": {"packing": True},
    "entropy": {"entropy": 0.1},
    "packing, entropy": {"packing": True, "entropy": 0.1},
    "kl in the loss": {"kl": True},
    "gspo": {"loss": "gspo"},
    "seq-mean": {"aggregation": "seq-mean", "packing": True},
    "dual clip": {"dual_clip": 3.0},
    "correction": {"correction": "token"},
    "two epochs, clipped": {"epochs": 2, "max_norm": 0.05, "packing": True},
    "zero 0": {"stage": 0},
    "zero 1": {"stage": 1, "packing": True},
    "zero 3": {"stage": 3},
    "zero 3, packing": {"stage": 3, "packing": True},
}
SAME = ("policy_loss", "entropy_loss", "kl", "ppo_kl", "ppo_clip_ratio", "reward", "total_length")


@pytest.mark.parametrize("rule", [{"rate": 0.25}, {"noise": 0.7}, {"price": 0.0}], ids=str)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_training_equals_that_with_dropped_rows_masked(name, rule):
    options = CONFIGURATIONS[name]
    ours, logged, start, found, tokens = run(Gated, rule, **options)
    assert 0 < ours.gate.stats.kept < ours.gate.stats.rows and ours.gate.stats.forwarded < ours.gate.stats.rows
    _, expected, _, wanted, full = run(Masked, factors=ours.factors, **options)
    _, everything, _, without, _ = run(ActorPPOTrainer, **options)
    assert difference(found, wanted, start) < (1e-4 if "epochs" in options else 2e-5)
    assert difference(without, wanted, start) > 1e-2
    assert sum(tokens) < sum(full)
    for key in SAME:
        assert (key in logged) == (key in everything)
        if key in logged:
            assert logged[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    assert logged["actor_grad_norm"] == pytest.approx(expected["actor_grad_norm"], rel=1e-4)
