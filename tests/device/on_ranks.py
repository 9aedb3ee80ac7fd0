"""Two ranks, each on an emulated device that no collective can reach: what they exchange goes over the host."""

import copy
from typing import Any

import torch
import torch.distributed as dist

import kondo_hooks as kondo
from tests.cases import Mlp, make_batch
from tests.device import emu
from tests.device.counting import counted
from tests.reference import grads, largest_relative_difference


def summed(model: torch.nn.Module) -> dict[str, Any]:
    """The gradients over all ranks."""
    found = {name: grad.cpu() for name, grad in grads(model).items()}
    for grad in found.values():
        dist.all_reduce(grad)
    return found


def loss_of(model, batch, weights=1.0):
    logp = model(batch.x).log_softmax(-1).gather(1, batch.actions.unsqueeze(1)).squeeze(1)
    return (-logp * batch.advantages * weights).mean()


def main(argument: dict[str, Any]) -> dict[str, Any]:
    """What came of each of several options; with ``fails`` a rank that cannot decide."""
    dist.init_process_group("gloo")
    if argument.get("counts"):
        return {"waits": waits()}
    return {name: window(argument["fails"], options) for name, options in argument["options"].items()}


def waits() -> list[int]:
    """How often the host waits in each of three decisions of all ranks as one."""
    torch.manual_seed(1)
    device = f"emu:{dist.get_rank() % emu.DEVICES}"
    model = Mlp().to(device)
    batch = make_batch(12, False, torch.float32, seed=dist.get_rank()).to(device)
    found = []
    with kondo.gated(model, rate=0.25, scope="global"):
        for _ in range(3):
            with counted() as step:
                loss_of(model, batch).backward()
            found.append(step.synchronisations)
    return found


def window(fails: bool, options: dict[str, Any]) -> dict[str, Any]:
    """One window of two backwards."""
    rank = dist.get_rank()
    device = f"emu:{rank}"
    torch.manual_seed(1)
    model = Mlp().double().to(device)
    reference = copy.deepcopy(model)
    batches = [make_batch(12, False, torch.float64, seed=2 * rank + i).to(device) for i in range(2)]
    if fails and rank == 1:
        batches[0].advantages[3] = torch.nan
    try:
        with kondo.gated(model, rate=0.25, scope="global", window=2, **options) as gate:
            for batch in batches:
                loss_of(model, batch).backward()
    except (kondo.RankError, ValueError) as error:
        return {"error": str(error), "type": type(error).__name__}
    for batch, weights in zip(batches, gate.last.factors().split(12), strict=True):
        loss_of(reference, batch, weights).backward()
    return {
        "difference": largest_relative_difference(summed(model), summed(reference)),
        "kept": len(gate.last.kept),
        "forwarded": gate.stats.forwarded,
        "races": emu.races(),
    }
