"""The recipes on several ranks, each with rows of its own."""

import torch.distributed as dist

from tests.frameworks.openrlhf import cpu
from tests.frameworks.openrlhf.cpu import set_ring_attn_group
from tests.frameworks.openrlhf.trainers import compared, recipes


def main(options):
    found = []
    with cpu.without_cuda():
        for name, rule, given in options:
            case = compared(name, rule, **given)
            stats = case["gate"].stats
            told = {key: case[key] for key in ("difference", "from plain", "tokens", "full")}
            norms = [case[which]["actor_grad_norm"] for which in ("logged", "masked")]
            found.append(told | {"kept": stats.kept, "rows": stats.rows, "norms": norms})
        found.append(_with_ring_attention())
    return found


def _with_ring_attention():
    """What is said of rows that are spread over ranks."""
    trainer = cpu.made(recipes()["GatedTrainer"], packing=True)
    set_ring_attn_group(dist.group.WORLD)
    try:
        trainer.ppo_train(0.0)
    except ValueError as error:
        return str(error)
    return "nothing"
