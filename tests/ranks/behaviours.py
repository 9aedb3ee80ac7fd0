"""What a gate does on real ranks besides the numbers: failures, emptiness, collectives, waiting, resuming."""

import contextlib
import copy
import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import kondo_hooks as kondo
from benchmarks.communication import recorded
from tests.ranks.exactness import Batch, difference, loss_of, update_difference
from tests.ranks.hosts import FEATURES, HOSTS, LR, Host, K, Net, build, make_counting, make_net
from tests.ranks.launch import at


def one_step(host: Host, batch: Batch) -> None:
    with host.micro(0, 1):
        host.backward(loss_of(host.model(batch.x), batch))
    host.step()


def random_batch(seed: int, n: int, shift: float = 0.0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    advantages = torch.randn(n, generator=g) + shift
    return Batch(torch.randn(n, FEATURES, generator=g), torch.randint(0, K, (n,), generator=g), advantages)


def delight(net: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        logp = net(batch.x).log_softmax(-1).gather(1, batch.actions.unsqueeze(1)).squeeze(1)
    return -batch.advantages * logp


def stepped(net: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> dict[str, Tensor]:
    """The reference's parameters after its step."""
    if clip:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return {n: p.detach() for n, p in net.named_parameters()}


def accumulate(host: Host, micro: int, loss_of_micro: Callable[[int], Tensor]) -> None:
    """Backwards of so many micro-batches and the step, as the host has them."""
    for i in range(micro):
        with host.micro(i, micro):
            loss = loss_of_micro(i)
            host.backward(loss if host.divides else loss / micro)
            if host.divides:
                host.step()
    if not host.divides:
        host.step()


def random_loop(name: str) -> dict[str, Any]:
    """50 steps of random prices, sizes, emptiness and scopes: never a hang, and exact at the end."""
    host = build(HOSTS[name], make_net(), 1)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    clip = HOSTS[name].options.get("clip")
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    dice = random.Random(7)
    empty = nothing = 0
    for step in range(50):
        at(f"{name}, rank {rank}, step {step}")
        sizes = [dice.randint(1, 8) for _ in range(ranks)]
        shifts = [dice.choice([0.0, 0.0, -9.0, 2.0]) for _ in range(ranks)]
        if dice.random() < 0.1:
            shifts = [-9.0] * ranks
        price = dice.choice([0.0, 0.0, 0.5, 3.0, 50.0])
        options: dict[str, Any] = {"scope": dice.choice(["local", "global"])}
        options["balance"] = options["scope"] == "global" and dice.random() < 0.5
        if dice.random() < 0.3:
            options["micro_batch_size"] = dice.randint(1, 3)
        batches = [random_batch(1000 * step + r, sizes[r], shifts[r]) for r in range(ranks)]
        with kondo.gated(host.model, price=price, **options):
            one_step(host, batches[rank])
        kept = [(delight(net, b) > price).float() for b in batches]
        empty += any(not k.any() for k in kept)
        nothing += not any(k.any() for k in kept)
        for b, k in zip(batches, kept, strict=True):
            (loss_of(net(b.x), b, k) / ranks).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    expected = {n: p.detach() for n, p in net.named_parameters()}
    return {"difference": difference(host.full(), expected), "empty": empty, "nothing": nothing}


class Mixing(Net):
    """On a rank where ``mixes`` says so, a row's output depends on the others, or a replay has other rows."""

    mixes: str | None = None

    def forward(self, x):
        out = super().forward(x)
        if self.mixes == "shape" and torch.is_grad_enabled():
            return out.repeat(2, 1)
        return out + out.mean(0) if self.mixes == "replay" else out


def failing_rank(name: str) -> dict[str, Any]:
    """One rank fails, in its decision or its replay: all raise, and afterwards all go on."""
    rank = dist.get_rank() if dist.is_initialized() else None
    result: dict[str, Any] = {}
    torch.manual_seed(0)
    net = Mixing()
    for scope in ("local", "global"):
        for kind in ("decision", "replay", "shape"):
            host = build(HOSTS[name], copy.deepcopy(net), 1)
            rank = dist.get_rank()
            batch = random_batch(rank, 6)
            with kondo.gated(host.model, rate=0.5, scope=scope) as gate:
                one_step(host, batch)
                bad = copy.deepcopy(batch)
                if rank == 1 and kind == "decision":
                    bad.advantages[2] = torch.nan
                mixing = [m for m in host.model.modules() if isinstance(m, Mixing)]
                for m in mixing:
                    m.mixes = kind if rank == 1 else None
                at(f"{name}: {scope} {kind}, rank {rank}")
                try:
                    one_step(host, bad)
                    message = None
                except (RuntimeError, ValueError) as error:
                    message = f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}"
                for m in mixing:
                    m.mixes = None
                for p in host.model.parameters():
                    p.grad = None
                steps = gate.stats.steps
                at(f"{name}: after {scope} {kind}, rank {rank}")
                if not name.startswith("zero"):  # its engine has no way back from a backward that failed
                    one_step(host, batch)
                    steps = gate.stats.steps - steps
            result[f"{scope} {kind}"] = [message, steps]
    return result


def late_failure(name: str) -> dict[str, Any]:
    """A rank fails in a micro-batch that reduces nothing: all raise when they next reduce."""
    net = make_net()
    host = build(HOSTS[name], net, 2)
    rank = dist.get_rank()
    raised = None
    with kondo.gated(host.model, rate=0.5):
        for i in range(2):
            batch = random_batch(i, 6)
            if rank == 1 and i == 0:
                batch.advantages[0] = torch.inf
            at(f"{name}, rank {rank}, micro-batch {i}")
            try:
                with host.micro(i, 2):
                    host.backward(loss_of(host.model(batch.x), batch))
                    if host.divides:
                        host.step()
            except (RuntimeError, ValueError) as error:
                raised = (i, str(error))
                break
    return {"raised": raised}


class Poisoned(Net):
    """A row of huge inputs has a finite output, and derivatives that are NaN."""

    def forward(self, x):
        big = x.abs().amax(-1, keepdim=True) > 1e3
        root = torch.where(big, (x - x).sum(-1, keepdim=True) * self.embed.bias.sum(), x[..., :1])
        return super().forward(torch.where(big, 0, x)) + torch.where(big, torch.sqrt(root.abs()), 0 * root)


def silent_rank(name: str) -> dict[str, Any]:
    """A rank that keeps nothing, and whose rows have NaN in their derivatives, adds exactly nothing."""
    torch.manual_seed(0)
    net = Poisoned()
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    host = build(HOSTS[name], net, 1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batches = [random_batch(r, 4, 5.0 if r == 0 else -9.0) for r in range(ranks)]
    for b in batches[1:]:
        b.x[:] = 1e6
    with kondo.gated(host.model, price=0.0):
        one_step(host, batches[rank])
    # By hand: rank 0's rows alone.
    kept = (delight(net, batches[0]) > 0).float()
    (loss_of(net(batches[0].x), batches[0], kept) / ranks).backward()
    if clip := HOSTS[name].options.get("clip"):
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    with torch.no_grad():
        expected = {n: start[n] - LR * p.grad for n, p in net.named_parameters()}
    # The trap is there: a gradient of zero sent into such a row comes out as NaN.
    logits = net(batches[-1].x)
    grads = torch.autograd.grad(logits, list(net.parameters()), torch.zeros_like(logits), allow_unused=True)
    trap = any(g is not None and g.isnan().any().item() for g in grads)
    return {"difference": difference(host.full(), expected), "trap": trap}


def collectives(name: str) -> dict[str, Any]:
    """Collectives of one full step, and of gated ones."""
    host = build(HOSTS[name], make_net(), 1)
    batch = random_batch(dist.get_rank(), 8)

    def count(**options: Any) -> dict[str, int]:
        context = kondo.gated(host.model, **options) if options else contextlib.nullcontext()
        with context:
            for _ in range(3):
                one_step(host, batch)
            with recorded() as found:
                one_step(host, batch)
        return dict(found.calls)

    return {
        "full": count(),
        "local": count(rate=0.25),
        "global": count(rate=0.25, scope="global"),
        "balanced": count(rate=0.25, scope="global", balance=True),
        "bounded": count(rate=0.25, micro_batch_size=1),
    }


def sequences(seed: int, length: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    shape = (4, length)
    return Batch(
        torch.randn(*shape, FEATURES, generator=g),
        torch.randint(0, K, shape, generator=g),
        torch.randn(4, 1, generator=g).expand(shape).contiguous(),
    )


def sequence_loss(logits: Tensor, batch: Batch, weights: Tensor | None = None) -> Tensor:
    logp = logits.float().log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    terms = -batch.advantages * logp
    return (terms if weights is None else terms * weights.unsqueeze(1)).mean()


def ragged_window(name: str) -> dict[str, Any]:
    """Sequences of other lengths on every rank and in every backward of a window."""
    host = build(HOSTS[name], make_net(), 3)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batches = [[sequences(10 * r + i, 3 + (r + 2 * i) % 5) for i in range(3)] for r in range(ranks)]
    result = {}
    for scope, balance in (("local", False), ("global", False), ("global", True)):
        host = build(HOSTS[name], make_net(), 3)
        at(f"{name}, rank {rank}, {scope}, balance {balance}")
        with kondo.gated(host.model, rate=0.25, window=3, scope=scope, balance=balance) as gate:
            accumulate(host, 3, lambda i, host=host: sequence_loss(host.model(batches[rank][i].x), batches[rank][i]))
        net = make_net()
        chi = [[_sequence_delight(net, b) for b in row] for row in batches]
        sizes = [[len(c) for c in row] for row in chi]
        groups = [range(ranks)] if scope == "global" else [[r] for r in range(ranks)]
        weights = [[torch.zeros(n) for n in row] for row in sizes]
        for group in groups:
            places = [(r, i, j) for r in group for i in range(3) for j in range(sizes[r][i])]
            scores = torch.stack([chi[r][i][j] for r, i, j in places])
            chosen = scores.sort(descending=True, stable=True).indices[: max(1, round(0.25 * len(places)))]
            for index in chosen.tolist():
                r, i, j = places[index]
                weights[r][i][j] = 1
        for r in range(ranks):
            for i in range(3):
                (sequence_loss(net(batches[r][i].x), batches[r][i], weights[r][i]) / (3 * ranks)).backward()
        if clip := HOSTS[name].options.get("clip"):
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        with torch.no_grad():
            expected = {n: p - LR * p.grad for n, p in net.named_parameters()}
        result[f"{scope} {balance}"] = [difference(host.full(), expected), gate.stats.forwarded]
    return result


def _sequence_delight(net: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        logp = net(batch.x).log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    return (-batch.advantages * logp).sum(1)


def resume(name: str) -> dict[str, Any]:
    """Stop after 4 of 8 steps, load what was saved into fresh objects, and end as the uninterrupted run does."""
    options: dict[str, Any] = {"rate": 0.25, "priority": "uniform", "scope": "global", "balance": True, "history": 3}
    rank = 0

    def run(host: Host, gate_state: Any, steps: range) -> tuple[Any, list[list[int]]]:
        kept = []
        with kondo.gated(host.model, **options) as gate:
            if gate_state is not None:
                gate.load_state_dict(gate_state)
            for step in steps:
                one_step(host, random_batch(100 * step + dist.get_rank(), 6))
                kept.append(gate.last.kept.tolist())
            return gate.state_dict(), kept

    whole = build(HOSTS[name], make_net(), 1)
    rank = dist.get_rank()
    _, kept = run(whole, None, range(8))
    first = build(HOSTS[name], make_net(), 1)
    state, kept_first = run(first, None, range(4))
    saved = first.full()
    net = make_net(1)
    net.load_state_dict(saved, strict=False)
    second = build(HOSTS[name], net, 1)
    _, kept_second = run(second, state, range(4, 8))
    return {
        "difference": difference(second.full(), whole.full()),
        "same_rows": kept == kept_first + kept_second,
        "rank": rank,
    }


def tensor_parallel() -> dict[str, Any]:
    """Ranks that share a batch: refused unless told, and then of one mind although they differ by rounding."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, K))
    reference = copy.deepcopy(net)
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    try:
        kondo.gated(net, rate=0.25)
        refused = None
    except ValueError as error:
        refused = str(error)
    batch = random_batch(0, 8)
    # Two rows of the same delight, to rounding, and only one may be kept: the ranks see them in other orders.
    batch.x[1] = batch.x[0]
    batch.actions[1] = batch.actions[0]
    batch.advantages[0] = batch.advantages[1] = 50.0
    if dist.get_rank() == 1:
        batch.advantages[1] *= 1 + 1e-6
    with kondo.gated(net, rate=0.125, tensor_parallel_group=mesh["tp"].get_group()) as gate:
        loss_of(net(batch.x), batch).backward()
    kept = gate.last.kept.tolist()
    mask = torch.zeros(8)
    mask[kept] = 1
    loss_of(reference(batch.x), batch, mask).backward()
    ours = {n: p.grad.full_tensor() for n, p in net.named_parameters()}
    return {
        "refused": refused,
        "kept": kept,
        "difference": difference(ours, {n: p.grad for n, p in reference.named_parameters()}),
    }


def screen_first(name: str) -> dict[str, Any]:
    """The sampler's log-probs decide before the forward; a rank with nothing kept, and one that fails, run along."""
    torch.manual_seed(0)
    net = Poisoned()
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    host = build(HOSTS[name], copy.deepcopy(net), 1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batches = [random_batch(r, 6 - r, 5.0 if r == 0 else -9.0) for r in range(ranks)]
    for b in batches[1:]:
        b.x[:] = 1e6
    with torch.no_grad():
        sampled = [
            net(b.x).log_softmax(-1).gather(1, b.actions.unsqueeze(1)).squeeze(1).nan_to_num(-1.0) for b in batches
        ]
    with kondo.gated(host.model, price=0.0) as gate:
        gate.preselect(logp=sampled[rank], advantages=batches[rank].advantages)
        one_step(host, batches[rank])
    kept = (-sampled[0] * batches[0].advantages > 0).float()
    (loss_of(net(batches[0].x), batches[0], kept) / ranks).backward()
    if clip := HOSTS[name].options.get("clip"):
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    with torch.no_grad():
        expected = {n: start[n] - LR * p.grad for n, p in net.named_parameters()}
    found = {"difference": difference(host.full(), expected), "forwarded": gate.stats.forwarded}
    with kondo.gated(host.model, price=0.0) as gate:
        logp = sampled[rank].clone()
        if rank == 1:
            logp[0] = torch.nan
        try:
            gate.preselect(logp=logp, advantages=batches[rank].advantages)
            one_step(host, batches[rank])
            found["raised"] = None
        except (RuntimeError, ValueError) as error:
            found["raised"] = str(error)
    return found


def positive(rows: kondo.Rows) -> Tensor:
    return (rows.advantage > 0) * 1.5


def by_size(rows: kondo.Rows) -> Tensor:
    return rows.norm / rows.norm.max()


def rules(name: str, micro: int) -> dict[str, Any]:
    """Rules that weigh, on each rank's rows and on all of them: the loss of every row times the factor it was given."""
    cases: list[dict[str, Any]] = [
        {"rate": "lossless", "scope": "global", "balance": True},
        {"rate": "lossless", "window": 2},
        {"noise": 0.7, "scope": "global"},
        {"noise": 0.7, "scope": "global", "window": 2},
        {"noise": 0.5},
        {"noise": 0.5, "window": 2},
        {"rate": 0.4, "priority": "norm", "unbiased": True, "scope": "global", "balance": True},
        {"rule": positive, "scope": "global"},
        {"priority": by_size, "rate": 0.3, "scope": "global"},
        {"rate": "auto"},
    ]
    host, net = build(HOSTS[name], make_net(), micro), make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    rank, ranks, clip = dist.get_rank(), dist.get_world_size(), HOSTS[name].options.get("clip")
    found: dict[str, Any] = {"differences": [], "alike": [], "rows": []}
    for number, case in enumerate(case for case in cases if case.get("window", 1) == micro):
        at(f"{name}, rank {rank}, {case}")
        options = {"audit": 0, **case}
        batches = [[random_batch(100 * number + 10 * i + r, 7 - r) for r in range(ranks)] for i in range(micro)]
        for each in batches:
            for b in each:
                b.advantages[::2] = 0
        with kondo.gated(host.model, **options) as gate:
            if options.get("rate") == "auto":
                gate._step.shared.pace._ungated = 0
            accumulate(host, micro, lambda i, b=batches: loss_of(host.model(b[i][rank].x), b[i][rank]))
            sizes = [len(each[rank].x) for each in batches]
            mine = [f.tolist() for f in gate.last.factors().split(sizes)]
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, (mine, gate.stats.noise, gate._selector.costs))
        for i, each in enumerate(batches):
            for b, (factors, *_) in zip(each, gathered, strict=True):
                (loss_of(net(b.x), b, torch.tensor(factors[i])) / ranks / micro).backward()
        expected = stepped(net, optimizer, clip)
        found["differences"].append((str(case), difference(host.full(), expected)))
        if case.get("scope") == "global":
            found["alike"].append(len({str(noise) for _, noise, _ in gathered}) == 1)
        found["rows"].append((str(case), sum(f != 0 for m in mine for f in m), sum(sizes)))
    return found


def prefixes(name: str) -> dict[str, Any]:
    """Sequences of which each rank runs others no further than to some token, under rules that weigh tokens."""
    cases: list[dict[str, Any]] = [
        {"noise": 0.7},
        {"noise": 0.7, "scope": "global"},
        {"noise": 0.7, "micro_batch_size": 2},
        {"rate": 0.3, "scope": "global"},
        {"rate": "lossless"},
        {"price": 1e6},
    ]
    host, net = build(HOSTS[name], make_net(), 1), make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    rank, ranks, clip = dist.get_rank(), dist.get_world_size(), HOSTS[name].options.get("clip")
    found: dict[str, Any] = {"differences": [], "alike": [], "tokens": []}
    for number, case in enumerate(cases):
        at(f"{name}, rank {rank}, {case}")
        batches = [sequences(10 * number + r, 9 - r) for r in range(ranks)]
        for r, b in enumerate(batches):
            b.advantages[:2, 3 + r :] = 0
            b.advantages[2:] *= torch.linspace(2, 0.1, b.advantages.shape[1])
        with kondo.gated(host.model, unit="prefix", audit=0, **case) as gate:
            with host.micro(0, 1):
                host.backward(sequence_loss(host.model(batches[rank].x), batches[rank]))
            host.step()
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, (gate.last.factors().tolist(), gate.stats.noise))
        for b, (factors, _) in zip(batches, gathered, strict=True):
            logp = net(b.x).log_softmax(-1).gather(-1, b.actions.unsqueeze(-1)).squeeze(-1)
            ((-b.advantages * logp * torch.tensor(factors).view(logp.shape)).mean() / ranks).backward()
        expected = stepped(net, optimizer, clip)
        found["differences"].append((str(case), difference(host.full(), expected)))
        if case.get("scope") == "global":
            found["alike"].append(len({str(noise) for _, noise in gathered}) == 1)
        found["tokens"].append((sum(f != 0 for f in gathered[rank][0]), batches[rank].actions.numel()))
    return found


class Runner:
    """Calls the model deep inside, as a trainer's worker does."""

    def __init__(self, model: nn.Module):
        self.model = model

    def log_probs(self, batch: Batch) -> Tensor:
        """Of the actions."""
        return self.model(batch.x).float().log_softmax(-1).gather(1, batch.actions[:, None]).squeeze(1)


def functions(name: str, micro: int) -> dict[str, Any]:
    """A function around the wrapped model is gated in the place of the model."""
    cases: list[dict[str, Any]] = [
        {"rate": 0.4},
        {"noise": 0.7, "scope": "global"},
        {"rate": 0.4, "scope": "global", "balance": True},
        {"rate": 0.4, "window": micro},
    ]
    host, net = build(HOSTS[name], make_net(), micro), make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    rank, ranks, clip = dist.get_rank(), dist.get_world_size(), HOSTS[name].options.get("clip")
    runner = Runner(host.model)
    found: dict[str, Any] = {"differences": [], "kept": []}
    for number, case in enumerate(case for case in cases if case.get("window", 1) == micro):
        at(f"{name}, rank {rank}, {case}")
        batches = [[random_batch(100 * number + 10 * i + r, 7 - r) for r in range(ranks)] for i in range(micro)]
        with kondo.gated(host.model, method=(runner, "log_probs"), logp=lambda out: out, **case) as gate:
            own = [each[rank] for each in batches]
            accumulate(host, micro, lambda i, own=own: -(own[i].advantages * runner.log_probs(own[i])).mean())
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, gate.last.factors().tolist())
        for r in range(ranks):
            sizes = [len(batches[i][r].x) for i in range(micro)]
            for i, factors in enumerate(torch.tensor(gathered[r]).split(sizes)):
                b = batches[i][r]
                (-(b.advantages * Runner(net).log_probs(b) * factors).mean() / ranks / micro).backward()
        expected = stepped(net, optimizer, clip)
        found["differences"].append((str(case), difference(host.full(), expected)))
        found["kept"].append((gate.stats.kept, gate.stats.rows))
    return found


def gathered_until_the_step(last: bool) -> dict[str, Any]:
    """Clipping finds the parameters that the optimizer has, where modules keep theirs gathered after a forward.

    ``last``: only the last of them does, as large trainers have it; else all but the outermost.
    """
    net, reference = make_net(), make_net()
    inner = [
        module
        for module in net.modules()
        if module is not net and next(module.parameters(recurse=False), None) is not None
    ]
    for module in inner:
        fully_shard(module, reshard_after_forward=last and module is not inner[-1])
    model = fully_shard(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {"norms": []}
    with kondo.gated(model, window="step", rate=0.4) as gate:
        for step in range(2):
            batches = [[random_batch(100 * step + 10 * i + r, 7) for r in range(ranks)] for i in range(2)]
            for i in range(2):
                loss_of(model(batches[i][rank].x), batches[i][rank]).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, gate.last.factors().tolist())
            for r in range(ranks):
                for i, mine in enumerate(torch.tensor(gathered[r]).split(7)):
                    (loss_of(reference(batches[i][r].x), batches[i][r], mine) / ranks).backward()
            expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
            found["norms"].append([float(norm.full_tensor()), float(expected)])
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for p in reference.parameters():
                    p -= LR * p.grad
                    p.grad = None
    return found


def step_window(name: str, kind: str) -> dict[str, Any]:
    """Micro-batches that wait until the optimizer steps, of other sizes on each rank; or packs, or in other numbers.

    Those that are "alone" change a buffer, so that each is replayed by itself.
    """
    make = make_wordwise if "packs" in kind else make_counting if "alone" in kind else make_net
    host, net = build(HOSTS[name], make(), 3), make()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    rank, ranks, clip = dist.get_rank(), dist.get_world_size(), HOSTS[name].options.get("clip")
    found: dict[str, Any] = {"differences": [], "steps": [], "kept": []}
    lengths_of: dict[int, list[int]] = {}
    options = {"segments": lambda x: lengths_of[id(x)]} if "packs" in kind else {}
    balance = "balanced" in kind
    with kondo.gated(host.model, window="step", rate=0.4, scope="global", balance=balance, **options) as gate:
        for step in range(3):
            at(f"{name}, rank {rank}, {kind}, step {step}")
            numbers = [3 + (2 * r if "uneven" in kind else 0) for r in range(ranks)]
            batches: list[list[Batch]] = []
            for r, number in enumerate(numbers):
                seeds = [100 * step + 10 * i + r for i in range(number)]
                if "packs" in kind:
                    batches.append(
                        [packed_batch(seed, [4 + r, 3, 5 - i % 3, 2], lengths_of) for i, seed in enumerate(seeds)]
                    )
                else:
                    batches.append([random_batch(seed, 7 - r - i % 3) for i, seed in enumerate(seeds)])
            own, loss = batches[rank], sequence_loss if "packs" in kind else loss_of
            accumulate(host, numbers[rank], lambda i, own=own, loss=loss: loss(host.model(own[i].x), own[i]))
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, gate.last.factors().tolist())
            for factors, each in zip(gathered, batches, strict=True):
                start = 0
                for b in each:
                    number = len(lengths_of[id(b.x)]) if "packs" in kind else len(b.x)
                    mine, start = torch.tensor(factors[start : start + number]), start + number
                    if "packs" in kind:
                        mine = torch.repeat_interleave(mine, torch.tensor(lengths_of[id(b.x)]))[None]
                        logp = net(b.x).log_softmax(-1).gather(-1, b.actions.unsqueeze(-1)).squeeze(-1)
                        term = (-b.advantages * logp * mine).mean()
                    else:
                        term = loss_of(net(b.x), b, mine)
                    (term / ranks / len(each)).backward()
            expected = stepped(net, optimizer, clip)
            found["differences"].append(difference(host.full(), expected))
            found["steps"].append(gate.stats.steps)
            found["kept"].append(gate.stats.kept)
    return found


def packed_batch(seed: int, lengths: list[int], lengths_of: dict[int, list[int]]) -> Batch:
    """Texts of these lengths in one row, each with one advantage."""
    b = sequences(seed, sum(lengths))
    u = torch.repeat_interleave(b.advantages[0, : len(lengths)], torch.tensor(lengths))
    packed = Batch(b.x[:1].clone(), b.actions[:1], u[None])
    lengths_of[id(packed.x)] = lengths
    return packed


class Wordwise(Net):
    """Sees each position by itself, so that texts may follow each other in a row."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view(*x.shape[:2], K)


def make_wordwise() -> Net:
    net = make_net()
    net.__class__ = Wordwise
    return net


def packs(name: str, micro: int) -> dict[str, Any]:
    """Packs of other texts on every rank, of which each replays a shorter one."""
    cases: list[dict[str, Any]] = [
        {"rate": 0.3},
        {"rate": 0.3, "scope": "global"},
        {"noise": 0.7, "scope": "global"},
        {"rate": 0.4, "scope": "global", "balance": True},
        {"price": 1e6},
        {"rate": 0.5, "micro_batch_size": 1},
        {"rate": 0.6, "scope": "global", "balance": True, "micro_batch_size": 2},
        {"rate": 0.3, "unit": "prefix"},
        {"rate": 0.3, "window": micro},
        {"noise": 0.7, "window": micro, "scope": "global"},
        {"rate": 0.4, "window": micro, "scope": "global", "balance": True},
    ]
    host, net = build(HOSTS[name], make_wordwise(), micro), make_wordwise()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    rank, ranks, clip = dist.get_rank(), dist.get_world_size(), HOSTS[name].options.get("clip")
    found: dict[str, Any] = {"differences": [], "tokens": [], "balanced": []}
    for number, case in enumerate(case for case in cases if case.get("window", 1) == micro):
        at(f"{name}, rank {rank}, {case}")
        told = [[[4 + r, 3, 5, 2 + i, 6][: 5 - (r + i) % 2] for r in range(ranks)] for i in range(micro)]
        batches = []
        for i, each in enumerate(told):
            batches.append([])
            for r, lengths in enumerate(each):
                b = sequences(100 * number + 10 * i + r, sum(lengths))
                u = torch.repeat_interleave(b.advantages[0, : len(lengths)], torch.tensor(lengths))
                batches[-1].append(Batch(b.x[:1], b.actions[:1], u[None]))
        lengths_of = {id(batches[i][rank].x): told[i][rank] for i in range(micro)}
        own = [each[rank] for each in batches]
        with kondo.gated(host.model, segments=lambda x, of=lengths_of: of[id(x)], **case) as gate:
            accumulate(host, micro, lambda i, own=own: sequence_loss(host.model(own[i].x), own[i]))
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, gate.last.factors().tolist())
        for r in range(ranks):
            start = 0
            for i in range(micro):
                lengths, b = told[i][r], batches[i][r]
                each = max(lengths) if case.get("unit") == "prefix" else 1
                mine = torch.tensor(gathered[r][start : start + len(lengths) * each]).view(len(lengths), each)
                start += len(lengths) * each
                place = torch.cat([torch.arange(n) for n in lengths])
                text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
                factors = mine[text, place if each > 1 else 0]
                logp = net(b.x).log_softmax(-1).gather(-1, b.actions.unsqueeze(-1)).squeeze(-1)
                ((-b.advantages * logp * factors).mean() / ranks / micro).backward()
        expected = stepped(net, optimizer, clip)
        found["differences"].append((str(case), difference(host.full(), expected)))
        found["tokens"].append(gate.stats.kept)
        if "balance" in case:
            found["balanced"].append((gate.stats.forwarded, gate.stats.imbalance, gate.stats.imbalance_balanced))
    return found


def plain_world() -> dict[str, Any]:
    """No wrapper: the user reduces gradients; all ranks choose as one."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    net, reference = make_net(), make_net()
    batches = [random_batch(r, 8 - r) for r in range(ranks)]
    with kondo.gated(net, rate=0.2, scope="global", balance=True) as gate:
        loss_of(net(batches[rank].x), batches[rank]).backward()
        for p in net.parameters():
            dist.all_reduce(p.grad)
    chi = torch.cat([delight(reference, b) for b in batches])
    mask = torch.zeros(len(chi))
    mask[chi.sort(descending=True, stable=True).indices[: round(0.2 * len(chi))]] = 1
    for b, m in zip(batches, mask.split([len(b.x) for b in batches]), strict=True):
        loss_of(reference(b.x), b, m).backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (net, reference))
    return {"difference": difference(ours, theirs), "forwarded": gate.stats.forwarded, "kept": len(gate.last.kept)}


def naive_nesting(name: str) -> dict[str, Any]:
    """DeepSpeed with two accumulation steps, and no driver of its own: what the driver is there against."""
    from kondo_hooks.integrations.deepspeed import DeepSpeed
    from tests.ranks.exactness import STEPS, Case, run_gated, run_reference

    case = Case(2, "local", False, False)
    result = {}
    for driven in (True, False):
        host = build(HOSTS[name], make_net(), 2)
        own = DeepSpeed.open
        if not driven:
            DeepSpeed.open = lambda self, gate: lambda: None
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, DeepSpeed, "open", own)
            run_gated(host, case, dist.get_rank())
        expected, _ = run_reference(case, dist.get_world_size(), HOSTS[name].options.get("clip"))
        result["driven" if driven else "naive"] = difference(host.full(), expected)
        result["update" if driven else "naive update"] = update_difference(host.full(), expected)
    assert STEPS == 3
    return result


def refused_engines() -> dict[str, str]:
    """Kinds of parallelism without a loss of the user's to gate, or without rows of a rank's own."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo")
    layers = [nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, K)]
    module = PipelineModule(layers=layers, num_stages=2, loss_fn=nn.functional.cross_entropy)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(list(module.parameters()), lr=LR)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    try:
        kondo.gated(engine)
    except ValueError as error:
        return {"pipeline": str(error)}
    return {}


def stages() -> dict[str, str]:
    """Pipelines of torch: a stage that is there before the gate is, the model that it was cut from, one made later."""
    from torch.distributed.pipelining import PipelineStage

    dist.init_process_group("gloo")
    net, rank = make_net(), dist.get_rank()
    found = {}
    late = nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, K))
    with kondo.gated(late, rate=0.5):
        stage = PipelineStage(late, rank, dist.get_world_size(), torch.device("cpu"))
        try:
            stage.submod(torch.randn(4, FEATURES))
        except ValueError as error:
            found["late"] = str(error)
    stage = PipelineStage(net.blocks[rank], rank, dist.get_world_size(), torch.device("cpu"))
    for name, module in {"stage": stage.submod, "whole": net}.items():
        try:
            kondo.gated(module)
        except ValueError as error:
            found[name] = str(error)
    kondo.gated(make_net()).discard()  # another model is nobody's stage
    return found


def several(name: str, *behaviours: str) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", kondo.KondoWarning)
        found = {behaviour: globals()[behaviour](name) for behaviour in behaviours}
    return {**found, "warnings": [str(w.message) for w in caught if issubclass(w.category, kondo.KondoWarning)]}


def main(argument: list[Any]) -> Any:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return globals()[argument[0]](*argument[1:])


def lightning_ddp(accumulation: int) -> dict[str, Any]:
    """Lightning's own DDP strategy, whose forward is the training step, gated by the callback and masked."""
    import lightning
    from torch.utils.data import DataLoader

    from kondo_hooks.integrations.lightning import KondoCallback

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batches = [random_batch(10 * i + rank, 6 + (i + rank) % 3) for i in range(4)]

    class Policy(lightning.LightningModule):
        def __init__(self, factors: Any = None):
            super().__init__()
            self.net, self.factors = make_net(), factors

        def training_step(self, b, i):
            return loss_of(self.net(b.x), b, None if self.factors is None else next(self.factors))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR)

    class Noting(lightning.Callback):
        def __init__(self, callback: Any = None):
            self.callback, self.decisions = callback, []

        def on_train_batch_end(self, *_: Any) -> None:
            last = None if self.callback is None else self.callback.gate.last
            if last is not None and not any(last is known for known in self.decisions):
                self.decisions.append(last)

    def fit(model: Any, *callbacks: Any) -> None:
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy="ddp",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            accumulate_grad_batches=accumulation,
            use_distributed_sampler=False,
        )
        trainer.fit(model, DataLoader(batches, batch_size=None))

    cases: list[dict[str, Any]] = [
        {"rate": 0.25},
        {"rate": 0.25, "scope": "global", "balance": True},
        {"noise": 0.7, "scope": "global"},
        {"rate": 0.4, "micro_batch_size": 1},
        {"price": 1e6},
    ]
    found: dict[str, Any] = {"differences": [], "kept": []}
    for case in cases:
        at(f"rank {rank}, {case}")
        callback = KondoCallback("net", **case)
        noting = Noting(callback)
        model = Policy()
        fit(model, callback, noting)
        factors = torch.cat([decision.factors() for decision in noting.decisions])
        reference = Policy(iter(factors.split([len(b.x) for b in batches])))
        fit(reference, Noting())
        ours, theirs = ({n: p.detach() for n, p in m.named_parameters()} for m in (model, reference))
        found["differences"].append((str(case), difference(ours, theirs)))
        found["kept"].append(int((factors != 0).sum()))
    return found
