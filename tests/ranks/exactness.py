"""A gated run on real ranks against one process that masks the union of their batches."""

import itertools
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import kondo_hooks as kondo
from tests.ranks.hosts import FEATURES, HOSTS, LR, Host, K, build, make_net
from tests.ranks.launch import at

STEPS, ROWS = 3, 6


@dataclass(frozen=True)
class Case:
    """How a run goes. ``window`` counts micro-batches; ``one_rank``: every kept row is rank 0's."""

    accumulation: int
    scope: str
    ragged: bool
    one_rank: bool
    window: int = 1
    balance: bool = False
    micro_batch_size: int | None = None


CASES = [
    Case(accumulation, scope, ragged, one_rank, window, balance)
    for accumulation, scope, ragged, one_rank in itertools.product(
        (1, 2, 4), ("local", "global"), (False, True), (False, True)
    )
    for window in {1, accumulation}
    for balance in ((False,) if scope == "local" else (True, False) if window == accumulation else (True,))
] + [
    Case(4, "local", True, False, 4, micro_batch_size=2),
    Case(4, "global", True, True, 4, True, micro_batch_size=2),
    Case(4, "global", True, False, 2, False, micro_batch_size=1),
    Case(4, "local", False, True, 2),
]


@dataclass
class Batch:
    x: Tensor
    actions: Tensor
    advantages: Tensor


def make_batch(case: Case, rank: int, step: int, micro: int) -> Batch:
    g = torch.Generator().manual_seed(1000 * rank + 100 * step + micro)
    last = step == STEPS - 1 and micro == case.accumulation - 1
    n = ROWS - 2 - rank if case.ragged and last else ROWS
    advantages = torch.randn(n, generator=g)
    if case.one_rank:
        advantages = advantages.abs() if rank == 0 else -advantages.abs()
    return Batch(torch.randn(n, FEATURES, generator=g), torch.randint(0, K, (n,), generator=g), advantages)


def loss_of(logits: Tensor, batch: Batch, weights: Tensor | None = None) -> Tensor:
    """A policy gradient with an entropy bonus: the user's own code, or, with weights, the masked one."""
    logp = logits.float().log_softmax(-1)
    chosen = logp.gather(1, batch.actions.unsqueeze(1)).squeeze(1)
    terms = -batch.advantages * chosen + 0.01 * (logp.exp() * logp).sum(-1)
    return (terms if weights is None else terms * weights).mean()


def selection(case: Case) -> dict[str, Any]:
    return {"price": 0.0} if case.one_rank and case.scope == "local" else {"rate": 0.25}


def run_gated(host: Host, case: Case, rank: int) -> tuple[kondo.Gated, list[list[int]]]:
    kept = []
    with kondo.gated(
        host.model,
        **selection(case),
        window=case.window,
        scope=case.scope,
        balance=case.balance,
        micro_batch_size=case.micro_batch_size,
    ) as gate:
        last = None
        for step in range(STEPS):
            for i in range(case.accumulation):
                batch = make_batch(case, rank, step, i)
                with host.micro(i, case.accumulation):
                    loss = loss_of(host.model(batch.x), batch)
                    host.backward(loss if host.divides else loss / case.accumulation)
                    if host.divides:
                        host.step()
                if gate.last is not last:
                    last = gate.last
                    kept.append(last.kept.tolist())
            if not host.divides:
                host.step()
    return gate, kept


def masks(case: Case, net: torch.nn.Module, step: int, first: int, ranks: int) -> list[list[Tensor]]:
    """(window, ranks) of (rows,): which rows the definition keeps, for the window that starts at ``first``."""
    batches = [[make_batch(case, r, step, m) for r in range(ranks)] for m in range(first, first + case.window)]
    with torch.no_grad():
        chi = [
            [-b.advantages * net(b.x).log_softmax(-1).gather(1, b.actions.unsqueeze(1)).squeeze(1) for b in row]
            for row in batches
        ]
    result = [[torch.zeros(len(c)) for c in row] for row in chi]
    groups = [range(ranks)] if case.scope == "global" else [[r] for r in range(ranks)]
    for group in groups:
        places = [(m, r, i) for r in group for m in range(case.window) for i in range(len(chi[m][r]))]
        scores = torch.stack([chi[m][r][i] for m, r, i in places])
        if "price" in selection(case):
            chosen = (scores > 0).nonzero().flatten()
        else:
            order = scores.sort(descending=True, stable=True).indices
            chosen = order[: max(1, round(0.25 * len(scores)))]
        for index in chosen.tolist():
            m, r, i = places[index]
            result[m][r][i] = 1
    return result


def run_reference(case: Case, ranks: int, clip: float | None) -> tuple[dict[str, Tensor], list[list[list[int]]]]:
    """Full forward, masked loss, full backward over the union of the ranks' batches, in one process."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    kept: list[list[list[int]]] = [[] for _ in range(ranks)]
    for step in range(STEPS):
        for first in range(0, case.accumulation, case.window):
            weights = masks(case, net, step, first, ranks)
            for rank in range(ranks):
                rows = torch.cat([weights[m][rank] for m in range(case.window)])
                kept[rank].append(rows.nonzero().flatten().tolist())
            for m, row in enumerate(weights):
                for rank, mask in enumerate(row):
                    batch = make_batch(case, rank, step, first + m)
                    (loss_of(net(batch.x), batch, mask) / (ranks * case.accumulation)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in net.named_parameters()}, kept


def run_masked(host: Host, case: Case, rank: int, ranks: int) -> None:
    """The same loop on the same engine without a gate, with the loss masked: for engines that compute in bfloat16."""
    net = make_net()
    for step in range(STEPS):
        for i in range(case.accumulation):
            if i % case.window == 0:
                weights = masks(case, net, step, i, ranks)
            batch = make_batch(case, rank, step, i)
            with host.micro(i, case.accumulation):
                loss = loss_of(host.model(batch.x), batch, weights[i % case.window][rank])
                host.backward(loss if host.divides else loss / case.accumulation)
                if host.divides:
                    host.step()
        if not host.divides:
            host.step()
        net.load_state_dict(host.full(), strict=False)


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    return max(((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()).item() for n in ours)


def update_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of what training changed in all parameters, relative to it, by the Euclidean norm."""
    start = dict(make_net().named_parameters())
    changed = sum(((theirs[n] - start[n]) ** 2).sum().item() for n in theirs)
    return (sum(((ours[n] - theirs[n]) ** 2).sum().item() for n in theirs) / changed) ** 0.5


def run_case(name: str, case: Case) -> dict[str, Any]:
    host_case = HOSTS[name]
    host = build(host_case, make_net(), case.accumulation)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gate, kept = run_gated(host, case, rank)
    expected, expected_kept = run_reference(case, ranks, host_case.options.get("clip"))
    if not host_case.exact:
        masked = build(host_case, make_net(), case.accumulation)
        run_masked(masked, case, rank, ranks)
        expected = masked.full()
    s = gate.stats
    return {
        "case": asdict(case),
        "difference": difference(host.full(), expected),
        "update": update_difference(host.full(), expected),
        "same_rows": kept == expected_kept[rank],
        "forwarded": s.forwarded,
        "kept": s.kept,
        "imbalance": [s.imbalance, s.imbalance_balanced],
    }


def main(argument: dict[str, Any]) -> list[dict[str, Any]]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = CASES[:: argument["stride"]]
    results = []
    for case in cases:
        at(f"{argument['host']} {case}")
        began = time.perf_counter()
        results.append(run_case(argument["host"], case))
        results[-1]["seconds"] = time.perf_counter() - began
    return results
