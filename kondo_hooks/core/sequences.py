"""Rows that are steps of sequences: a recurrent policy gets (n * T, F) observations and a state of (layers, n, H).

The steps of a sequence belong together, so the sequences are the samples. The gate is shown every input with the
sequences on its first axis, (n, T, F), and the model still gets what it was given. That is in one of two orders: the
steps of a sequence follow each other, or the sequences of a step do. One run of the last sequence alone tells which,
by the outputs and by what recurrent layers return: a head that is still zero hides the difference.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kondo_hooks.core.call import Call, differentiable
from kondo_hooks.core.readings import has_rows
from kondo_hooks.rows.axes import Layout, fits, layouts
from kondo_hooks.rows.tree import flatten, map_tensors
from kondo_hooks.same.state import forked_rng

Named = Callable[..., int] | Literal[False] | None
_Orders = dict[tuple[str, ...], tuple[bool | None, Layout | None]]


@dataclass(frozen=True)
class _Folded:
    """The model, for inputs with sequences on their first axis.

    Attributes:
        run: what was called.
        paths: of the inputs whose steps it wants on one axis.
        by_step: whether the sequences of a step follow each other there.
    """

    run: Callable[..., Any]
    paths: frozenset[str]
    by_step: bool

    @property
    def __name__(self) -> str:
        return getattr(self.run, "__name__", "")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors(self._fold, (args, kwargs))
        return self.run(*args, **kwargs)

    def _fold(self, path: str, leaf: Tensor) -> Tensor:
        if path not in self.paths:
            return leaf
        return (leaf.transpose(0, 1) if self.by_step else leaf).flatten(0, 1)


class Sequences:
    """Finds the sequences of a gate's calls.

    Args:
        model: what is gated; its recurrent layers tell what a state is.
        named: a function of a call's arguments that gives the number of sequences; None: a state tells; False: there
            are none.
    """

    def __init__(self, model: nn.Module, named: Named):
        self._named = named
        self._states = {
            (layer.num_layers * (1 + layer.bidirectional), size)
            for layer in model.modules()
            if isinstance(layer, nn.RNNBase)
            for size in (layer.hidden_size, layer.proj_size)
        }
        self._layers = [m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]
        self._orders: _Orders = {}

    def read(self, call: Call, alone: bool) -> Call:
        """The call with a sequence as a row, if its rows are steps; else itself.

        Args:
            call: not yet run.
            alone: whether this rank may run the model on its own.

        Raises:
            ValueError: if the user said how many sequences there are, and the rows are no such steps.
        """
        if self._named is False or call.pairs or not (self._states or self._named):
            return call
        n, rows = self._count(call) if self._named else self._from_state(call)
        if not n or rows == n:
            return call
        key = (*call.input_paths, str(n == 1))
        if key in self._orders:
            known, layout = self._orders[key]
            if known is None:
                return call
            mine = _unfolded(call, n, rows, known)
            if layout is None or fits(layout, mine.inputs, n):
                mine.layout = layout
                return mine
        for by_step in (False, True):
            mine = _unfolded(call, n, rows, by_step)
            if n > 1 and alone:
                mine.layout = _layout_of_one(mine, n, self._layers)
            if mine.layout is not None or n == 1 or not alone:
                self._orders[key] = by_step, mine.layout
                return mine
        if self._named:
            raise ValueError(
                f"gated: sequences={getattr(self._named, '__name__', 'a function')} says that the {rows} rows of this "
                f"call are {n} sequences, but the last of them alone, with a state of (layers, 1, H), does not give "
                "what it gives among the others: neither where its steps follow each other nor where they stand "
                f"{n} apart. Do the sequences see each other, or is a state not an argument of the call?"
            )
        self._orders[key] = None, None
        return call

    def _count(self, call: Call) -> tuple[int, int]:
        assert callable(self._named)
        n = self._named(*call.args[0], **call.args[1])
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"gated: sequences= must give the number of sequences, got {n!r}")
        rows = _most([leaf.shape[0] for leaf in call.inputs if leaf.dim() and leaf.shape[0] % n == 0])
        if not rows:
            raise ValueError(f"gated: sequences= says {n}, and no input of the call has so many times some rows")
        return n, rows

    def _from_state(self, call: Call) -> tuple[int, int]:
        """How many sequences there are by the state, of how many rows; (0, 0) if these are no steps."""
        states = [leaf for leaf in call.inputs if leaf.dim() == 3 and (leaf.shape[0], leaf.shape[2]) in self._states]
        others = [leaf for leaf in call.inputs if leaf.dim() and not any(leaf is state for state in states)]
        counts = {state.shape[1] for state in states}
        if len(counts) != 1 or not others:
            return 0, 0
        n = counts.pop()
        if n == 0 or any(leaf.dim() > 2 and leaf.shape[:2] == (n, leaf.shape[1]) for leaf in others):
            return 0, 0  # (n, T, F)
        if all(leaf.dim() > 1 and leaf.shape[1] == n for leaf in others) and any(leaf.dim() > 2 for leaf in others):
            return 0, 0  # (T, n, F)
        rows = _most([leaf.shape[0] for leaf in others])
        return (n, rows) if rows % n == 0 else (0, 0)


def _most(sizes: list[int]) -> int:
    return Counter(sizes).most_common(1)[0][0] if sizes else 0


def _unfolded(call: Call, n: int, rows: int, by_step: bool) -> Call:
    paths = frozenset(
        path
        for path, leaf in zip(call.input_paths, call.inputs, strict=True)
        if leaf.dim() and leaf.shape[0] == rows and not (leaf.dim() == 3 and leaf.shape[1] == n)
    )

    def unfold(path: str, leaf: Tensor) -> Tensor:
        if path not in paths:
            return leaf
        return leaf.unflatten(0, (-1, n)).transpose(0, 1) if by_step else leaf.unflatten(0, (n, -1))

    mine = Call(
        _Folded(call.run, paths, by_step),
        map_tensors(unfold, call.args),
        call.state,
        call.receive,
        checks=call.checks,
        shared_loss=call.shared_loss,
        sequences=True,
        steps=rows // n if by_step else 1,
    )
    mine.expect(n, 0)
    return mine


def _layout_of_one(call: Call, n: int, layers: Sequence[nn.Module]) -> Layout | None:
    """How inputs are read where the last sequence alone gives what it gives among the others; None if it does not."""
    last = torch.tensor([n - 1], device="cpu")
    full = _outputs(call, call.inputs, layers)
    for layout in layouts(call.inputs, n, 0) if full else ():
        some = [leaf if at is None else at.take(leaf, last) for leaf, at in zip(call.inputs, layout, strict=True)]
        part = _outputs(call, some, layers)
        if part is not None and has_rows(full or [], part, n, call.parts):
            return layout
    return None


def _outputs(call: Call, inputs: list[Tensor], layers: Sequence[nn.Module]) -> list[Tensor] | None:
    found: list[Any] = []
    hooks = [layer.register_forward_hook(lambda _module, _given, output: found.append(output)) for layer in layers]
    training, requires_grad = call.scene.flags
    flags = (False,) * len(training), requires_grad
    with torch.no_grad(), forked_rng(call.scene.rng), call.state.restored_flags(flags), call.state.untouched():
        try:
            found.append(call.run_again(inputs)[0])
            return [leaf for leaf in flatten(found)[1] if differentiable(leaf)]
        except torch.OutOfMemoryError:
            raise
        except Exception:  # read otherwise than the model does
            return None
        finally:
            for hook in hooks:
                hook.remove()
