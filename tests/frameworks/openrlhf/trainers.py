"""OpenRLHF's trainer of the actor, gated as docs/frameworks/openrlhf.md says, and with dropped rows masked instead."""

from pathlib import Path

import torch

from tests.frameworks.openrlhf import cpu
from tests.frameworks.openrlhf.cpu import ActorPPOTrainer
from tests.reference import Runs

PAGE = Path(__file__).parents[3] / "docs/frameworks/openrlhf.md"
KL = 0.3


def recipes():
    """The classes that the page defines, as it has them."""
    found = {}
    for block in PAGE.read_text().split("```python\n")[1:]:
        exec(block.split("```")[0], found)
    return found


class Observed:
    """Notes the factor of each row (or token) of each micro-batch, and which runs were made with a graph."""

    options: dict

    def ppo_train(self, kl_ctl):
        self.factors, self.shapes = [], []
        return super().ppo_train(kl_ctl)

    def training_step(self, experience, *args):
        before = self.gate.stats.steps
        self.shapes.append(experience.action_mask.shape)
        status = super().training_step(experience, *args)
        if "kept" in experience.info:
            self.factors.append(experience.info["kept"].view(-1, 1))
        elif self.gate.stats.steps > before:
            factors, tokens = self.gate.last.factors(), self.options.get("unit", "sample") != "sample"
            parts = factors.split([rows * length if tokens else rows for rows, length in self.shapes])
            self.factors += [part.view(rows, -1) for part, (rows, _) in zip(parts, self.shapes, strict=True)]
            self.shapes.clear()
        return status


class Masked(ActorPPOTrainer):
    """All rows, with the gradients at the actor's outputs multiplied by each row's factor."""

    def ppo_train(self, kl_ctl):
        factors = iter(self.factors)

        def mask(actor, given, outputs):
            mine = next(factors)
            for tensor in (outputs[0], getattr(outputs[1], "entropy", None)):
                if tensor is not None:
                    tensor.register_hook(lambda grad: grad * mine[:, : grad.shape[1]].to(grad))

        hook = self.actor.register_forward_hook(mask)
        try:
            return super().ppo_train(kl_ctl)
        finally:
            hook.remove()


def parameters(trainer):
    mine = list(trainer.actor.named_parameters())
    with cpu.strategies.deepspeed.zero.GatheredParameters([p for _, p in mine]):
        return {name: p.detach().float().clone() for name, p in mine}


def run(kind, rule=None, factors=None, **options):
    """Train; the trainer, what it logged, its parameters before and after, and the tokens of each run with a graph."""
    trainer = cpu.made(kind, **options)
    trainer.options, trainer.factors, trainer.screened = rule, factors, []

    def screened(actor, *_):
        if actor.training and not torch.is_grad_enabled():
            trainer.screened.append(True)

    trainer.actor.register_forward_hook(screened)
    runs, start = Runs(trainer.actor, cpu.V), parameters(trainer)
    torch.manual_seed(0)
    logged = trainer.ppo_train(KL)
    return trainer, logged, start, parameters(trainer), runs.tokens


def difference(found, wanted, start):
    """Of what training changed, relative to the largest change."""
    moved = max((wanted[name] - start[name]).abs().max() for name in wanted)
    assert moved > 1e-3
    return max(((found[name] - wanted[name]).abs().max() / moved).item() for name in wanted)


def compared(name, rule, **options):
    """A recipe's training, what it differs by from the masked one, and that one from the plain one."""
    recipe = type("Recipe", (Observed, recipes()[name]), {})
    ours, logged, start, found, tokens = run(recipe, rule, **options)
    _, masked, _, wanted, full = run(Masked, factors=ours.factors, **options)
    _, plain, _, without, _ = run(ActorPPOTrainer, **options)
    return {
        "gate": ours.gate,
        "logged": logged,
        "masked": masked,
        "plain": plain,
        "difference": difference(found, wanted, start),
        "from plain": difference(without, wanted, start),
        "tokens": sum(tokens),
        "full": sum(full),
        "screened": ours.screened,
    }
