"""One program, gated and as the masked full backward: same parameters, same random numbers, every gradient compared."""

import copy
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import kondo_hooks as kondo
from tests.fuzz.programs import Program
from tests.fuzz.writing import source

FINDINGS = ("wrong", "crash", "changed")
# Words of a KondoWarning that says what is not exact; any other warning leaves the gradient exact.
_INEXACT = (
    "dropped rows",
    "passes nothing back",
    "gets no gradient",
    "carry no gradient",
    "not exact",
    "far from a policy",
    "taken for the number of rows",
    "which axis holds the tokens",
    "could not find out which holds the rows",
)
_TOLERANCE = {"float64": 1e-9, "float32": 1e-3}


@dataclass
class Verdict:
    """What became of a program.

    Attributes:
        kind: "exact", "told" (an error or a warning of the gate says what is not), "invalid" (plain PyTorch raises),
            "undecided" (the decision does not say which positions it is about), or a finding: "wrong" (a silent
            difference), "crash" (an error that is not the gate's), "changed" (something is left behind).
        message: of the error, or what differs.
        warned: the gate's warnings.
        whole: every row was replayed without a word, though not all were kept.
    """

    kind: str
    message: str = ""
    warned: list[str] = field(default_factory=list)
    whole: bool = False

    @property
    def is_finding(self) -> bool:
        return self.kind in FINDINGS

    @property
    def alike(self) -> tuple[str, str]:
        """What shrinking keeps: the kind and the message without its numbers and shapes."""
        if self.kind == "wrong":
            return self.kind, " ".join(self.message.split()[:3])
        return self.kind, re.sub(r"\([\d, ]*\)|-?\d+(\.\d+)?(e-?\d+)?", "#", self.message)[:60]


@dataclass
class _Backward:
    """One backward: the forwards that it reaches (by number) and the weights that the gate gave their rows."""

    forwards: list[int]
    weights: dict[int, Tensor] = field(default_factory=dict)
    delight: Tensor | None = None


class _DifferenceError(Exception):
    """The gated program differs."""


class _UndecidedError(Exception):
    """What the gated program did cannot be told from its decision."""


def run(p: Program, names: dict[str, Any] | None = None) -> Verdict:
    """Run a program both ways.

    Args:
        p: the program.
        names: what its source defines, if it was changed by hand.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = torch.get_rng_state()
    try:
        if names is None:
            names = {"__name__": "program"}
            exec(compile(source(p), "<program>", "exec"), names)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            verdict = _run(p, names)
        verdict.warned = [str(w.message) for w in caught if issubclass(w.category, kondo.KondoWarning)]
        inexact = (*_INEXACT, *(["terms of different scales"] if verdict.message.startswith("delight") else []))
        if verdict.kind == "wrong" and any(word in text for text in verdict.warned for word in inexact):
            verdict.kind = "told"
        return verdict
    finally:
        torch.set_rng_state(rng)
        torch.set_num_threads(threads)


def _run(p: Program, names: dict[str, Any]) -> Verdict:
    torch.manual_seed(p.seed)
    try:
        model = names["Model"]().to(getattr(torch, p.dtype))
    except Exception as error:  # a size that a layer does not take, tried by the shrinking
        return Verdict("invalid", str(error))
    reference = copy.deepcopy(model)
    if p.inner:
        reference.__class__ = names["Masked"]
    both = _Both(p, names, model, reference)
    before = _outside(model)
    try:
        with kondo.gated(model, **dict(p.options), batch_dim=int(p.time_first)) as gate:
            for _ in range(p.steps):
                both.step(gate)
    except _DifferenceError as error:
        return Verdict("wrong", str(error))
    except _UndecidedError:
        return Verdict("undecided")
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if left := both.changed() or _left_behind(before, _outside(model)):
            return Verdict("changed", f"{left} after {message}")
        if _is_ours(error):
            return Verdict("told", message)
        return Verdict("invalid" if both.plain_raises() else "crash", message)
    if left := _left_behind(before, _outside(model)):
        return Verdict("changed", left)
    return Verdict(
        "exact", whole=gate.stats.kept < gate.stats.rows and gate.stats.forwarded == gate.stats.rows_screened
    )


def _is_ours(error: Exception) -> bool:
    ours = type(error).__module__.startswith("kondo_hooks") or any(
        "gated: " in n for n in getattr(error, "__notes__", ())
    )
    return ours or str(error).startswith(("gated: ", "preselect: ", "select: ", "force: ", "gate.", "delight is NaN"))


class _Both:
    """A gated model and its reference, step by step."""

    def __init__(self, p: Program, names: dict[str, Any], model: nn.Module, reference: nn.Module):
        self.p, self.names, self.model, self.reference = p, names, model, reference
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3 / p.scale)
        self.made = 0
        self.start = copy.deepcopy(reference)
        self.safe: tuple[Any, ...] = ()
        self.forwarding = False
        self.tolerance = 0.1 if p.autocast else _TOLERANCE[p.dtype]

    # The gated program.

    def step(self, gate: kondo.Gated) -> None:
        p = self.p
        self._synchronize()
        rng, seed = torch.get_rng_state(), self.made
        groups: list[list[_Backward]] = []
        waiting: list[_Backward] = []
        results = []
        batches: list[Any] = []
        for _ in range(p.option("window", 1)):
            group, losses, forwards = [], [], []
            if p.force and p.route != "hook":
                gate.force(torch.tensor([0]))
            decided = self._select(gate) if p.route == "select" else None
            for c in range(p.calls):
                b = self._data(c)
                batches.append(b)
                forwards.append(len(batches) - 1)
                weights = self._screen(gate, b, decided, c)
                self._remember(forwarding=True)
                with torch.autocast("cpu", torch.bfloat16, enabled=p.autocast):
                    out = self.names["call"](self.model, b)
                    loss = self.names["loss"](self.model, out, b, gate.logp)
                losses.append(loss if p.scale == 1 else loss * p.scale)
                if weights is not None:
                    waiting.append(_Backward([forwards[-1]], {forwards[-1]: weights}))
            for op in (
                [[f] for f in forwards] if p.backward == "separate" else [forwards] * (1 + (p.backward == "twice"))
            ):
                last, steps = gate.last, gate.stats.steps
                backward = _Backward(op)
                group.append(backward)
                self._remember(forwarding=False)
                if p.force and p.route == "hook":
                    gate.force(torch.tensor([0]))
                total = sum(losses[f - forwards[0]] for f in op[1:]) + losses[op[0] - forwards[0]]
                results.append(self._backward(total, [batches[f] for f in op], keep=p.backward == "twice"))
                if p.route != "hook":
                    for screened in waiting:
                        backward.weights.update(screened.weights)
                elif p.backward == "inputs":
                    pass
                else:
                    waiting.append(backward)
                    if gate.last is not last:
                        self._share(gate.last, waiting, batches)
                        waiting = []
                    elif gate.stats.steps != steps:
                        waiting = []  # passed straight through
            groups.append(group)
            waiting = [] if p.route != "hook" else waiting
        if waiting and p.option("window", 1) > 1 and gate.flush():  # some of the window passed straight through
            self._share(gate.last, waiting, batches)
        elif waiting:
            raise _DifferenceError("idle: a backward was neither decided on nor passed through")
        after = torch.get_rng_state()
        torch.set_rng_state(rng)
        self.made = seed
        reference = self._masked(groups)
        self._compare(results, reference, after)
        self.optimizer.step()

    def _synchronize(self) -> None:
        """Start a step from the same parameters and no gradients."""
        with torch.no_grad():
            for mine, theirs in zip(self.reference.parameters(), self.model.parameters(), strict=True):
                mine.copy_(theirs)
                mine.grad = None
        self.optimizer.zero_grad()

    def _data(self, call: int) -> Any:
        p = self.p
        self.made += 1
        size = p.batch - 1 if p.ragged and call == p.calls - 1 else p.batch
        b = self.names["data"](1000 * p.seed + self.made, size)
        if p.input_grad:
            b.x.requires_grad_()
        return b

    def _signal(self, b: Any) -> dict[str, Tensor]:
        signal = {"logp": b.old, "advantages": b.advantages}
        return {**signal, "mask": b.mask} if any(t.reduction == "masked" for t in self.p.terms) else signal

    def _select(self, gate: kondo.Gated) -> Tensor:
        made, each = self.made, []
        for c in range(self.p.calls):
            each.append(self._signal(self._data(c)))
        self.made = made
        return gate.select(**{name: torch.cat([e[name] for e in each]) for name in each[0]}).factors()

    def _screen(self, gate: kondo.Gated, b: Any, decided: Tensor | None, call: int) -> Tensor | None:
        if self.p.route == "hook":
            return None
        if decided is None:
            factors = gate.preselect(**self._signal(b)).factors()
        else:
            factors = decided[call * self.p.batch :][: len(b.x)]
            gate.preselect(kept=factors)
        return self._in_shape(factors, b, len(b.x))

    def _backward(self, total: Tensor, batches: list[Any], keep: bool) -> list[Tensor]:
        if self.p.backward == "inputs":
            return list(torch.autograd.grad(total, [b.x for b in batches]))
        parameters = [q for q in self.model.parameters() if q.requires_grad]
        self._differentiate(total, parameters, keep)
        return [b.x.grad for b in batches] if self.p.input_grad else []

    def _differentiate(self, total: Tensor, parameters: list[Tensor], keep: bool) -> None:
        if self.p.backward != "grad":
            total.backward(retain_graph=keep)
            return
        for q, grad in zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
            q.grad = grad if q.grad is None else q.grad if grad is None else q.grad + grad

    def _share(self, decision: Any, backwards: list[_Backward], batches: list[Any]) -> None:
        """Give each call of a population its share of the decision."""
        sizes = [len(batches[f].x) for backward in backwards for f in backward.forwards]
        factors = decision.factors()
        dg = decision.delight.sigmoid() if self.p.option("weight") == "dg" else torch.ones_like(factors)
        draws = self.p.option("noise") is not None or self.p.option("unbiased")
        if self.p.option("rate") == "lossless":  # what has no gradient may be dropped or not
            factors = dg
        elif draws and self.p.option("deterministic") is None and not self.p.tokens:
            factors = torch.where(decision.norm == 0, dg, factors)  # at parameters in the loss code it counts
        if len(factors) * (2 if self.p.option("pairs") else 1) % sum(sizes):
            if self.p.tokens and self.p.calls > 1:
                raise _UndecidedError  # a call whose gradient is zero has no positions that one could tell
            raise _DifferenceError(f"the decision has {len(factors)} entries for {sum(sizes)} rows")
        each = len(factors) / sum(sizes)
        start = 0
        for backward in backwards:
            for f in backward.forwards:
                n = round(len(batches[f].x) * each)
                backward.weights[f] = self._in_shape(factors[start : start + n], batches[f], len(batches[f].x))
                start += n
        if self.p.force and not factors[0] and not self.p.tokens:  # no token where the gradient is zero
            raise _DifferenceError("a forced row was dropped")
        backwards[-1].delight = decision.delight

    def _in_shape(self, factors: Tensor, b: Any, rows: int) -> Tensor:
        """Factors as the loss takes them: (B,) or (B, T), or with parts of an action (B, K) or (B, T, K)."""
        shape = list(b.advantages.shape)
        shape[1:] = [shape[1] - self.p.shift] if len(shape) > 1 else []
        factors = factors.to(b.advantages.dtype)
        if self.p.option("pairs"):
            factors = factors.repeat(2)
        factors = factors.reshape(rows, -1)
        if factors.shape[1] == 1:
            return factors.expand(shape) if len(shape) > 1 else factors.squeeze(1)
        if self.p.chooses_parts and factors[0].numel() == b.actions[0].numel():
            return factors.view(b.actions.shape)
        if len(shape) < 2 or factors.shape[1] not in (shape[1], shape[1] + self.p.shift):
            raise _DifferenceError(f"the decision has {factors.shape[1]} positions a row, the loss {shape[1:]}")
        return factors[:, : shape[1]]

    # The reference.

    def _masked(self, groups: list[list[_Backward]]) -> list[list[Tensor]]:
        """The same step by a full backward with weighted terms; returns what ``_backward`` returned."""
        p, names, model = self.p, self.names, self.reference
        results: list[list[Tensor]] = []
        expected: list[list[Tensor]] = []
        count = 0
        for group in groups:
            losses: list[dict[int, Tensor]] = [{} for _ in group]
            batches = {}
            for c in range(p.calls):
                b = batches[count] = self._data(c)
                users = [i for i, backward in enumerate(group) if count in backward.forwards]
                ones = torch.ones_like(b.advantages)[:, 1:] if p.shift else torch.ones_like(b.advantages)
                model.w = group[users[0]].weights.get(count, ones)
                with torch.autocast("cpu", torch.bfloat16, enabled=p.autocast):
                    out = names["call"](model, b)
                    for i in users:
                        w = group[i].weights.get(count, ones)
                        loss, logp, probe, scales = names["masked_loss"](model, out, b, w)
                        losses[i][count] = loss * p.scale
                if not p.inner and logp.requires_grad:
                    expected.append(self._delight(logp, probe, scales))
                count += 1
            for i, backward in enumerate(group):
                total = sum(losses[i].values())
                used = [batches[f] for f in backward.forwards]
                if p.backward == "inputs":
                    results.append(list(torch.autograd.grad(total, [b.x for b in used])))
                    continue
                parameters = [q for q in model.parameters() if q.requires_grad]
                self._differentiate(total, parameters, keep=i + 1 < len(group))
                results.append([b.x.grad for b in used] if p.input_grad else [])
        self._check_delight(groups, expected)
        return results

    def _delight(self, logp: Tensor, probe: Tensor, scales: list[float]) -> list[Tensor]:
        """(B,) delight by its definition, for each of the terms' own scales."""
        p = self.p
        (grad,) = torch.autograd.grad(probe, logp, retain_graph=True)
        delight = (grad * logp).detach()
        if p.sequence:
            if p.arrangement == "flat":
                delight = delight.view(-1, p.length - p.shift)
            delight = delight.sum(0 if p.arrangement == "TB" else 1)
        if p.option("pairs"):
            delight = delight.view(2, -1).sum(0)
        return [delight / scale for scale in scales]

    def _check_delight(self, groups: list[list[_Backward]], expected: list[list[Tensor]]) -> None:
        p = self.p
        found = [b.delight for group in groups for b in group if b.delight is not None]
        alone = p.option("priority") != "uniform" and not p.tokens and p.option("reduction") is None
        # Not followed but read off the boundary: sums of products, losses on an axis that is not the rows', parts.
        unseen = p.pick in ("one_hot", "cross_entropy", "nll_loss", "flipped", "halves", "written")
        unseen = unseen or (p.arrangement == "TB" and any(t.kind == "ce" for t in p.terms))
        extra = any(t.kind in ("z", "entropy") for t in p.terms) and unseen
        if len(found) != 1 or not alone or extra or p.inner or not expected or p.autocast:
            return
        tolerance = 1e-6 if p.dtype == "float64" else 3e-3
        ours = found[0].to(torch.float64)
        if ours.isnan().all():
            return  # a rule that needs none found no policy
        candidates = [torch.cat(list(each)).to(torch.float64) for each in zip(*expected, strict=True)]
        if p.backward in ("separate", "twice") or len(candidates[0]) != len(ours):
            return
        if p.calls > 1 and any(t.reduction == "masked" for t in p.terms):
            return  # a factor that differs from call to call is an advantage
        free = any(t.reduction in ("rows", "rowsum") or (t.kind == "ce" and p.arrangement == "TB") for t in p.terms)
        for theirs in candidates:
            scale = ours.norm() / theirs.norm().clamp_min(1e-30) if free else 1.0
            if (ours - theirs * scale).abs().max() <= tolerance * max(ours.abs().max(), 1e-12):
                return
        direction = candidates[0] * (ours.norm() / candidates[0].norm().clamp_min(1e-30))
        apart = (ours - direction).abs().max() > tolerance * max(ours.abs().max(), 1e-12)
        told = "of the wrong rows" if apart else "of another scale"
        raise _DifferenceError(f"delight {told}: {_short(ours)}, by hand {_short(candidates[0])}")

    def _compare(self, results: list[list[Tensor]], expected: list[list[Tensor]], rng: Tensor) -> None:
        pairs = zip(self.model.named_parameters(), self.reference.named_parameters(), strict=True)
        grads = [(f"the gradient of {name}", a.grad, b.grad) for (name, a), (_, b) in pairs]
        for mine, theirs in zip(results, expected, strict=True):
            grads += [("the gradient of x", a, b) for a, b in zip(mine, theirs, strict=True)]
        least = 1.0 if self.p.autocast else 0.1 if self.p.dtype == "float32" else 1e-4
        floor = least * max((b.abs().max().item() for _, _, b in grads if b is not None and b.numel()), default=0.0)
        for name, a, b in grads:
            if (a is None) != (b is None):
                raise _DifferenceError(f"{name} is {'None' if a is None else 'there'}, by a masked backward it is not")
            if a is None or b is None:
                continue
            if b.isnan().any():
                raise _UndecidedError  # the program has left the range of numbers by itself
            apart = (a - b).abs().max().item()
            if not apart <= self.tolerance * max(b.abs().max().item(), floor, 1e-30):
                raise _DifferenceError(f"{name}: {_short(a)}, by a masked backward {_short(b)}")
        buffers = zip(self.model.named_buffers(), self.reference.named_buffers(), strict=True)
        for (name, a), (_, b) in buffers:
            if not torch.allclose(a.double(), b.double(), rtol=self.tolerance, atol=self.tolerance):
                raise _DifferenceError(f"the buffer {name}: {_short(a)}, by a masked backward {_short(b)}")
        if self.p.route == "hook" and not torch.equal(rng, torch.get_rng_state()):
            raise _DifferenceError("the user's random stream was moved")

    # After an error.

    def _remember(self, forwarding: bool) -> None:
        self.forwarding = forwarding
        grads = [None if q.grad is None else q.grad.clone() for q in self.model.parameters()]
        self.safe = (grads, [b.clone() for b in self.model.buffers()])

    def changed(self) -> str | None:
        """What an error has left changed in the model."""
        if not self.safe:
            return None
        grads, buffers = self.safe
        for (name, q), before in zip(self.model.named_parameters(), grads, strict=True):
            same = q.grad is None if before is None else q.grad is not None and torch.equal(q.grad, before)
            if not same:
                return f"the gradient of {name}"
        if self.forwarding:
            return None  # a forward moves buffers before it fails, in plain PyTorch too
        for (name, b), before in zip(self.model.named_buffers(), buffers, strict=True):
            if not torch.equal(b, before):
                return f"the buffer {name}"
        return None

    def plain_raises(self) -> bool:
        """Whether the program raises without a gate."""
        p, self.reference, self.made = self.p, self.start, 0
        torch.manual_seed(p.seed)
        try:
            for _ in range(p.steps * p.option("window", 1)):
                count = range(p.calls)
                ops = (
                    [[c] for c in count] if p.backward == "separate" else [list(count)] * (1 + (p.backward == "twice"))
                )
                group = [_Backward(op) for op in ops]
                made = self.made
                losses = []
                for c in count:
                    b = self._data(c)
                    with torch.autocast("cpu", torch.bfloat16, enabled=p.autocast):
                        if p.inner:
                            self.start.w = torch.ones_like(b.advantages)
                        losses.append(self.names["loss"](self.start, self.names["call"](self.start, b), b, lambda t: t))
                assert self.made >= made
                for i, one in enumerate(group):
                    total = sum(losses[c] for c in one.forwards)
                    parameters = [q for q in self.start.parameters() if q.requires_grad]
                    self._differentiate(total, parameters, keep=i + 1 < len(group))
        except Exception:
            return True
        return False


def _outside(model: nn.Module) -> dict[str, Any]:
    """What a context has to leave as it was."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "a function mode": torch._C._len_torch_function_stack(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "an attribute of the model": sorted(k for k in vars(model) if k not in ("left", "probe", "w")),
        "hooks": [[len(getattr(m, h)) for h in hooks] for m in model.modules()],
        "a training flag": [m.training for m in model.modules()],
        "requires_grad": [q.requires_grad for q in model.parameters()],
        "hooks of parameters": [len(q._backward_hooks or ()) for q in model.parameters()],
        "the set of parameters": [name for name, _ in model.named_parameters()],
        "the set of buffers": [name for name, _ in model.named_buffers()],
    }


def _left_behind(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    return next((f"{name} is left changed" for name in before if before[name] != after[name]), None)


def _short(values: Tensor) -> str:
    flat = values.detach().flatten()[:6].tolist()
    return "[" + ", ".join(f"{v:.4g}" for v in flat) + (", ...]" if values.numel() > 6 else "]")


def check(names: dict[str, Any]) -> None:
    """For a program that was written out: run what ``names`` defines, and print the verdict."""
    print(run(names["PROGRAM"], names))
