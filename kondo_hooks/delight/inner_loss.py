"""Losses that a model computes itself and returns as a scalar: ``model(**batch, labels=labels).loss``.

A scalar has lost its rows. So while the batch is screened a tape notes the operations that make scalars; the few that
lead to a returned loss run again on the node's outputs, the last tensors before it that still have rows. The loss then
has a graph down to them, and the replay sends their rows' gradient to the same tensors of its own run.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kondo_hooks.errors import ReplayMismatchError
from kondo_hooks.rows.tree import Tree, flatten, unflatten
from kondo_hooks.rules.readback import Readback
from kondo_hooks.same.attributes import version_of
from kondo_hooks.same.state import Autocast

_FIRST = ("[0][0]", "[1]['input']")
# Where a function has its second operand; weights of classes and the like are none.
_OPERANDS = (*_FIRST, "[0][1]", "[1]['target']", "[1]['other']")
_DIVISIONS = ("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__")
_SUMS = ("sum", "mean", "nansum", "nanmean")
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
_FEW = 64


@dataclass
class Step:
    """One operation, with autocast and the versions of its arguments as it found them."""

    func: Callable[..., Any]
    args: Tree
    result: Tensor
    autocast: Autocast
    versions: list[int]

    @property
    def name(self) -> str:
        """Of the function."""
        return getattr(self.func, "__name__", str(self.func))

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Its floating-point arguments, by path."""
        paths, leaves = flatten(self.args)
        return [(path, leaf) for path, leaf in zip(paths, leaves, strict=True) if leaf.is_floating_point()]

    def run(self, replaced: dict[str, Tensor]) -> tuple[Tensor, bool]:
        """Its result with some arguments replaced, and whether the others are as they were."""
        paths, leaves = flatten(self.args)
        same = all(
            path in replaced or version_of(leaf) == version
            for path, leaf, version in zip(paths, leaves, self.versions, strict=True)
        )
        args, kwargs = unflatten(self.args, [replaced.get(p, leaf) for p, leaf in zip(paths, leaves, strict=True)])
        with self.autocast.restored():
            return self.func(*args, **kwargs), same


class Tape(TorchFunctionMode):
    """Notes the operations whose result is a floating-point scalar, and those on scalars of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._made: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` as it is; note it if it made a scalar."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or not result.is_floating_point() or func is Tensor.detach:
            return result  # an engine's hooks detach every output; what the model detaches is told by the replay
        if result.dim() == 0 or (result.numel() <= _FEW and self._of_scalars(args, kwargs)):
            leaves = flatten((args, kwargs))[1]
            autocast = Autocast.current({leaf.device for leaf in leaves})
            # A function in place has counted up its first argument by now; others may return it as it is (``to``).
            counted = _in_place(getattr(func, "__name__", ""))
            versions = [version_of(leaf) - (counted and leaf is result) for leaf in leaves]
            self.steps.append(Step(func, (args, kwargs), result, autocast, versions))
            self._made.add(_key(result))
        return result

    def _of_scalars(self, args: Any, kwargs: Any) -> bool:
        floats = [leaf for leaf in flatten((args, kwargs))[1] if leaf.is_floating_point()]
        return bool(floats) and all(_key(leaf) in self._made for leaf in floats)


def _in_place(name: str) -> bool:
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _key(tensor: Tensor) -> Any:
    """The same for a scalar and for its alias, which an engine's hooks make."""
    if tensor.layout != torch.strided:
        return id(tensor)
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # within a transform
        address = 0
    return (address or id(tensor), tensor.dtype, tensor.shape, tensor.stride())


def _memory(tensor: Tensor) -> int:
    """Where its values are; of a tensor that has no memory of its own, something that is no address."""
    try:
        return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else -1
    except RuntimeError:  # within a transform
        return -1


@dataclass(frozen=True)
class Cut:
    """Where the loss's graph ends.

    Attributes:
        step: the operation there.
        path: of its argument; None if the graph ends at its result.
        divides: whether it stands below a division alone: a count, a norm.
    """

    step: int
    path: str | None
    divides: bool = False

    def of(self, steps: Sequence[Step]) -> Tensor:
        """The tensor there."""
        step = steps[self.step]
        return step.result if self.path is None else dict(step.tensors())[self.path]


def _unflattened(tensor: Tensor) -> Tensor:
    """(B, T, K) where ``tensor`` is a view of it as (B * T, K): rows of several lengths can then be one batch."""
    base = tensor._base
    if base is None or tensor.dim() != 2 or base.dim() < 3 or base.numel() != tensor.numel():
        return tensor
    return base if base.is_contiguous() and base.shape[-1] == tensor.shape[-1] else tensor


def _as_in_screen(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A replay's tensor on the axes that the screen's had, of this shape.

    What is a view of what depends on strides, and so on the number of rows.
    """
    found = _unflattened(tensor)
    if found.dim() > len(shape) == tensor.dim():
        return tensor
    if found.dim() == 2 < len(shape) and found.shape[0] % shape[1:-1].numel() == 0:
        return found.unflatten(0, (-1, *shape[1:-1]))
    return found


Known = dict[int, dict[str, int | None]]
"""Of each step, the arguments that have a gradient, and the step that made each; None where the graph ends."""


class InnerLoss:
    """The losses that a call returned, as the steps that lead to them.

    Attributes:
        ends: the step that made each, by its path in what the model returned.
        cuts: where their graph ends.
        tensors: what the screen had there, rows and positions on axes of their own; until the losses have run.
    """

    def __init__(self, steps: list[Step], ends: dict[str, int], known: Known, cuts: list[Cut]):
        self.ends = ends
        self.cuts = cuts
        self._given = [cut.of(steps) for cut in cuts]
        self.tensors = [_unflattened(tensor) for tensor in self._given]
        self._shapes = [tensor.shape for tensor in self.tensors]
        self._names = [steps[cut.step].name for cut in cuts]
        self._length = len(steps)
        self._steps = {i: steps[i] for i in sorted(known)}
        self._known = known
        self._values = {path: (steps[i].result.detach(), steps[i].result.detach()) for path, i in ends.items()}
        self._reached: set[str] = set()
        self._stale = False

    def name(self, cut: int) -> str:
        """The tensor there, as a message names it; alike for calls of one structure, so without its shape."""
        loss = _plain(next(iter(self.ends)))
        return f"the tensor that {self._names[cut]} makes the model's {loss} of"

    def has_policy(self, cut: int) -> bool:
        """Whether delight may be read there: the operand of a loss, and no count."""
        return self.cuts[cut].path in _FIRST and not self.cuts[cut].divides

    def is_summed(self, cut: int) -> bool:
        """Whether the loss is a sum or mean of the tensor there: of a row's terms."""
        return self.has_policy(cut) and self._names[cut] in _SUMS

    def run(self, live: Sequence[Tensor]) -> dict[str, Tensor]:
        """The losses by path, computed again from ``live`` tensors where the graph ends."""
        at = {(cut.step, cut.path): n for n, cut in enumerate(self.cuts)}
        made: dict[int, Tensor] = {}
        for i, step in self._steps.items():
            if (i, None) in at:
                made[i] = live[at[i, None]]
                continue
            replaced = {}
            for path, j in self._known[i].items():
                n = at.get((i, path))
                replaced[path] = made[j] if j is not None else live[n].view(self._given[n].shape)  # type: ignore[index]
            made[i], same = step.run(replaced)
            self._stale |= not same
        # Copies: a view that a Trainer divides in place would leave its hook behind.
        losses = {path: made[i].clone() for path, i in self.ends.items()}
        for path, loss in losses.items():
            self._values[path] = (self._values[path][0], made[self.ends[path]].detach())
            if loss.requires_grad:
                loss.register_hook(lambda _grad, path=path: self._reached.add(path))
        # A window must not hold what the losses were made of.
        self._steps, self._given, self.tensors = {}, [], []
        return losses

    def check(self, back: Readback) -> None:
        """Refuse a loss that a backward came from and that did not come out as the model's own, once that is read."""
        for path in self._reached:

            def compare(found: list[float], path: str = path, dtype: torch.dtype = self._values[path][0].dtype) -> None:
                theirs, ours = found
                same = math.isclose(ours, theirs, rel_tol=_TOLERANCE.get(dtype, 2e-2), abs_tol=1e-9)
                if self._stale or not (same or (math.isnan(ours) and math.isnan(theirs))):
                    raise RuntimeError(
                        f"gated: the model's {_plain(path)} is {theirs:.6g}, but taken apart it is {ours:.6g}, or the "
                        "forward changed what it was made of afterwards: its rows cannot be told. Compute this loss "
                        "outside of the model."
                    )

            back.ask(self._values[path], compare)

    def in_replay(self, steps: Sequence[Step], check: bool = True) -> list[Tensor]:
        """The tensors of another run of the model where the graph ends; empty ones where no backward came from there.

        Args:
            steps: of that run's tape.
            check: whether it ran with a graph, and is to be held against the steps that were taken apart.

        Raises:
            ReplayMismatchError: if that run computed its losses otherwise, or from more than these tensors.
        """
        if check and not self._reached:
            return [torch.empty(0, device="cpu") for _ in self.cuts]
        if len(steps) != self._length:
            raise ReplayMismatchError(
                f"gated: the model computed its {_plain(next(iter(self.ends)))} in {self._length} operations for the "
                f"whole batch and in {len(steps)} for the kept rows; it must not depend on how many rows there are"
            )
        stack = [self.ends[path] for path in sorted(self._reached)] if check else []
        while stack:
            i = stack.pop()
            self._check_step(i, steps)
            stack += [j for j in self._known[i].values() if j is not None]
        return [_as_in_screen(cut.of(steps), shape) for cut, shape in zip(self.cuts, self._shapes, strict=True)]

    def _check_step(self, i: int, steps: Sequence[Step]) -> None:
        """Whether its gradient goes where the tape says, and nowhere else."""
        step, known = steps[i], self._known[i]
        if any(cut.step == i and cut.path is None for cut in self.cuts):
            return
        through = {path for path, leaf in step.tensors() if leaf.requires_grad}
        detached = any(steps[j].result.requires_grad for p, j in known.items() if j is not None and p not in through)
        if through - known.keys() or detached or (known and step.result.requires_grad != bool(through)):
            raise ReplayMismatchError(
                f"gated: the model's {_plain(next(iter(self.ends)))} has a term whose making the gate cannot follow (a "
                "fused loss, a penalty on parameters, a factor that was detached or made under no_grad?), so its rows "
                "are not known. Compute this loss outside of the model. No gradient was changed."
            )


def _plain(path: str) -> str:
    if path.startswith("the attribute "):
        return path.removeprefix("the attribute ")
    return next(reversed(re.findall(r"\w+", path)), "output")


def find_losses(
    steps: list[Step],
    outputs: Sequence[tuple[str, Tensor]],
    constants: Sequence[Tensor],
    shared: Callable[[Tensor], bool],
) -> InnerLoss | None:
    """Take the returned scalars apart; None if there is none that the tape has seen.

    Args:
        steps: of the tape.
        outputs: what the model returned, by path.
        constants: inputs and buffers of the model, which no gradient goes through.
        shared: whether the graph is to end after the reduction of this tensor and not before.
    """
    made: dict[Any, list[int]] = {}
    for i, step in enumerate(steps):
        made.setdefault(_key(step.result), []).append(i)
    ends = {
        path: made[_key(leaf)][-1]
        for path, leaf in outputs
        if leaf.dim() == 0 and leaf.is_floating_point() and _key(leaf) in made
    }
    given = {_memory(leaf) for leaf in constants}
    known: Known = {}
    cuts: list[Cut] = []
    # Numerators first, so that a step that is in both counts as one.
    below = [(i, False) for i in ends.values()]
    while below:
        i, divides = below.pop(next((n for n, (_, d) in enumerate(below) if not d), 0))
        if i in known:
            continue
        known[i] = {}
        here: list[tuple[Cut, Tensor]] = []
        for path, leaf in steps[i].tensors():
            earlier = [j for j in made.get(_key(leaf), []) if j < i]
            if earlier:
                below.append((earlier[-1], divides or _is_divisor(steps[i].name, path)))
                known[i][path] = earlier[-1]
            elif leaf.dim() and path in _OPERANDS and _memory(leaf) not in given:
                here.append((Cut(i, path, divides), leaf))
                known[i][path] = None
        if any(shared(leaf) for _, leaf in here):
            cuts.append(Cut(i, None))
        else:
            cuts += [cut for cut, _ in here]
    cuts.sort(key=lambda cut: (cut.step, cut.path or ""))
    return InnerLoss(steps, ends, known, cuts) if cuts else None


def _is_divisor(name: str, path: str) -> bool:
    return path == "[0][0]" if name == "__rtruediv__" else name in _DIVISIONS and path not in _FIRST
