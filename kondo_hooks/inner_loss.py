"""Losses that a model computes itself and returns as a scalar: ``model(**batch, labels=labels).loss``.

A scalar has lost its rows. So while the batch is screened a tape notes the operations that make scalars; the few that
lead to a returned loss run again on the node's outputs, the last tensors before it that still have rows. The loss then
has a graph down to them, and the replay sends their rows' gradient to the same tensors of its own run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kondo_hooks.batch import Tree, flatten, map_tensors, unflatten
from kondo_hooks.errors import ReplayMismatchError

# Where a function has its second operand; weights of classes and the like are none.
_OPERANDS = ("[0][0]", "[0][1]", "[1]['input']", "[1]['target']", "[1]['other']")


@dataclass
class Step:
    """One operation: a reduction to a scalar, or one on scalars alone."""

    func: Callable[..., Any]
    args: Tree
    result: Tensor

    @property
    def name(self) -> str:
        """Of the function."""
        return getattr(self.func, "__name__", str(self.func))

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Its floating-point arguments, by path."""
        paths, leaves = flatten(self.args)
        return [(path, leaf) for path, leaf in zip(paths, leaves, strict=True) if leaf.is_floating_point()]


class Tape(TorchFunctionMode):
    """Notes the operations whose result is a floating-point scalar, and those on scalars of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._made: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` as it is; note it if it made a scalar."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling() or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        if func is Tensor.detach:
            return result  # an engine's hooks put one around every output; one of the model's is told by the replay
        if result.dim() == 0 or (result.numel() <= _FEW and self._of_scalars(args, kwargs)):
            self.steps.append(Step(func, (args, kwargs), result))
            self._made.add(_key(result))
        return result

    def _of_scalars(self, args: Any, kwargs: Any) -> bool:
        floats = [leaf for leaf in flatten((args, kwargs))[1] if leaf.is_floating_point()]
        return bool(floats) and all(_key(leaf) in self._made for leaf in floats)


_FEW = 64


def _key(tensor: Tensor) -> Any:
    """Tells tensors that are alive apart, and not a tensor from its alias (an engine's hooks make some)."""
    return (tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape)


@dataclass(frozen=True)
class Cut:
    """Where the loss's graph ends: an argument of a step or, without a path, its result."""

    step: int
    path: str | None

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


class InnerLoss:
    """The losses that a call returned, as the steps that lead to them.

    Attributes:
        paths: of the losses in what the model returned.
        cuts: where their graph ends.
        tensors: what the screen had there, rows and positions on axes of their own; until the losses have run.
    """

    def __init__(
        self, steps: list[Step], ends: dict[str, int], needed: dict[int, dict[str, int | None]], cuts: list[Cut]
    ):
        self.paths = list(ends)
        self.cuts = cuts
        self._given = [cut.of(steps) for cut in cuts]
        self.tensors = [_unflattened(tensor) for tensor in self._given]
        self._shapes = [tuple(tensor.shape) for tensor in self.tensors]
        self._length = len(steps)
        self._steps = {i: steps[i] for i in sorted(needed)}
        self._known = needed
        self._ends = ends
        self._values = {path: steps[i].result.detach() for path, i in ends.items()}
        self._live: dict[str, Tensor] = {}

    def name(self, cut: int) -> str:
        """The tensor there, as a message names it."""
        step = self._steps[self.cuts[cut].step]
        return f"the {self._shapes[cut]} tensor that {step.name} makes the model's {_plain(self.paths[0])} of"

    def run(self, result: Tree, live: Sequence[Tensor]) -> Tree:
        """``result`` with its losses computed again, from ``live`` tensors where the graph ends."""
        made: dict[Any, Tensor] = {_key(t): new.view(t.shape) for t, new in zip(self._given, live, strict=True)}
        losses = {}
        last = {i: path for path, i in self._ends.items()}
        for i, step in self._steps.items():
            if Cut(i, None) not in self.cuts:
                leaves = [made.get(_key(leaf), leaf) for leaf in flatten(step.args)[1]]
                args, kwargs = unflatten(step.args, leaves)
                made[_key(step.result)] = step.func(*args, **kwargs)
            if i in last:
                losses[last[i]] = made[_key(step.result)]
        self._live = {path: loss.detach().clone() for path, loss in losses.items()}
        self._steps = {i: Step(step.func, ((), {}), step.result) for i, step in self._steps.items()}
        self._given, self.tensors = [], []  # a window must not hold them
        return map_tensors(lambda path, leaf: losses.get(path, leaf), result)

    def check(self) -> None:
        """Refuse a loss that did not come out as the model's own."""
        for path, live in self._live.items():
            if not torch.allclose(live, self._values[path], rtol=1e-2, atol=1e-6, equal_nan=True):
                raise RuntimeError(
                    f"gated: the model's {_plain(path)} is {self._values[path].item():.6g}, but taken apart it is "
                    f"{live.item():.6g}: its rows cannot be told. Compute this loss outside of the model."
                )

    def in_replay(self, steps: Sequence[Step]) -> list[Tensor]:
        """The tensors of another run of the model where the graph ends.

        Raises:
            ReplayMismatchError: if that run computed its losses otherwise, or from more than these tensors.
        """
        if len(steps) != self._length:
            raise ReplayMismatchError(
                f"gated: the model computed its {_plain(self.paths[0])} in {self._length} operations for the whole "
                f"batch and in {len(steps)} for the kept rows; it must not depend on how many rows there are"
            )
        for i, known in self._known.items():
            if Cut(i, None) in self.cuts:
                continue
            through = {path for path, leaf in steps[i].tensors() if leaf.requires_grad}
            made = [j for path, j in known.items() if j is not None and path not in through]
            detached = any(steps[j].result.requires_grad for j in made)
            if through - known.keys() or detached or (known and steps[i].result.requires_grad and not through):
                raise ReplayMismatchError(
                    f"gated: the model's {_plain(self.paths[0])} has a term whose making the gate cannot follow (a "
                    "fused loss, a penalty on parameters, a detached factor?), so its rows are not known. Compute this "
                    "loss outside of the model. No gradient was changed."
                )
        return [_unflattened(cut.of(steps)) for cut in self.cuts]


def _plain(path: str) -> str:
    return path.strip("[]'.") if path else "output"


def find_losses(
    steps: list[Step], outputs: Sequence[tuple[str, Tensor]], inputs: Sequence[Tensor], shared: Callable[[Tensor], bool]
) -> InnerLoss | None:
    """Take the returned scalars apart; None if there is none that the tape has seen.

    Args:
        steps: of the tape.
        outputs: what the model returned, by path.
        inputs: of the model.
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
    if not ends:
        return None
    given = {leaf.untyped_storage().data_ptr() for leaf in inputs}
    needed: dict[int, dict[str, int | None]] = {}  # of each step, the arguments with a gradient, and what made them
    cuts: list[Cut] = []
    stack = list(ends.values())
    while stack:
        i = stack.pop()
        if i in needed:
            continue
        known = needed[i] = {}
        here: list[tuple[Cut, Tensor]] = []
        for path, leaf in steps[i].tensors():
            earlier = [j for j in made.get(_key(leaf), []) if j < i]
            if earlier:
                stack.append(earlier[-1])
                known[path] = earlier[-1]
            elif leaf.dim() and path in _OPERANDS and leaf.untyped_storage().data_ptr() not in given:
                here.append((Cut(i, path), leaf))
                known[path] = None
        if any(shared(leaf) for _, leaf in here):
            cuts.append(Cut(i, None))
        else:
            cuts += [cut for cut, _ in here]
    if not cuts:
        return None
    unique = {_key(cut.of(steps)): cut for cut in sorted(cuts, key=lambda cut: (cut.step, cut.path or ""))}
    return InnerLoss(steps, ends, needed, list(unique.values()))
