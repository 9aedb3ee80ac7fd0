"""Random operations of a screen, repeated in the replay for the rows that it runs.

A replay that drew masks for its few rows would draw other masks. So the screen notes the shape of each random
operation, and the replay draws it again at that shape and takes its rows' share: dropout, and whatever else
draws through a seeded torch operation.
"""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kondo_hooks.rows.axes import Rows, blocks, fill_index, rows_between
from kondo_hooks.same.state import RngSource, RngState, states_of


@dataclass
class Draws:
    """The random operations of one screen, by the generator's state before each.

    Keyed by state, a replay finds them again in any order: activation checkpointing repeats some.

    Attributes:
        shapes: of the arguments.
        indivisible: an operation that cannot be split into rows.
        others: generators that were drawn from beside those known before, with their states before that.
        permuted: lengths of permutations.
        missed: whether numbers were drawn between the operations.
    """

    shapes: dict[bytes, list[Any]] = field(default_factory=dict)
    indivisible: str | None = None
    others: RngState = field(default_factory=list)
    permuted: set[int] = field(default_factory=set)
    missed: bool = False


NO_DRAWS = Draws()
"""Of screens that nobody listened to."""


# Their backward repeats the draw inside the kernel, or how much they draw depends on each row's values. Dropout in
# fused attention (flash, efficient, cuDNN) has these names; cuDNN's of recurrent layers is off in screens and replays.
_OPAQUE = ("attention", "rnn", "lstm", "gru", "inductor", "poisson", "binomial", "gamma", "dirichlet", "rrelu")


def _generator(args: Iterable[Any], kwargs: dict[str, Any]) -> torch.Generator | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)), None)


def _state(source: RngSource) -> bytes:
    ((_, state),) = states_of([source])
    return ctypes.string_at(state.data_ptr(), state.numel())


def _source(args: Sequence[Any], kwargs: dict[str, Any]) -> RngSource:
    """The generator that an operation draws from: one that it was given, or its device's."""
    if (generator := _generator(args, kwargs)) is not None:
        return generator
    of_tensor = next((value.device for value in args if isinstance(value, Tensor)), "cpu")
    device = torch.device(kwargs.get("device") or of_tensor)
    if device.type == "meta":
        return torch.device("cpu")
    if device.index is None and device.type != "cpu":
        return torch.device(device.type, torch.accelerator.current_device_index())
    return device


def _name(source: RngSource) -> Any:
    """The same for every Python object that stands for one generator: an operation is handed another."""
    return getattr(source, "_cdata", source)


def _draws_numbers(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride()
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return torch.Size(value), None
    return None


class RecordDraws(TorchDispatchMode):
    """Notes the shapes of every random operation of a screen. Costs microseconds an operation.

    Args:
        draws: to note them in.
        rng: the state of the generators before the screen.
    """

    supports_higher_order_operators = True  # flex attention is one; what one draws inside counts as missed

    def __init__(self, draws: Draws, rng: RngState):
        super().__init__()
        self._draws = draws
        self._last = {_name(source): ctypes.string_at(state.data_ptr(), state.numel()) for source, state in rng}
        self._sources = {_name(source): source for source, _ in rng}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; note it if it moved the generator."""
        kwargs = kwargs or {}
        if not _draws_numbers(func):
            return func(*args, **kwargs)
        source = _source(args, kwargs)
        name, before = _name(source), _state(source)
        if name not in self._last:
            self._draws.others += states_of([source])
            self._sources[name] = source
        self._draws.missed |= self._last.get(name, before) != before
        result = func(*args, **kwargs)
        self._last[name] = after = _state(source)
        if after != before:
            self._draws.shapes[_key(func, source, before)] = [_shape(value) for value in args]
            if any(word in str(func) for word in _OPAQUE):
                self._draws.indivisible = str(func)
            if "randperm" in str(func):
                self._draws.permuted.add(args[0])
        return result

    def __exit__(self, *error: Any) -> None:
        """Look for what was drawn after the last operation that was seen."""
        super().__exit__(*error)
        self._draws.missed |= any(_state(source) != self._last[name] for name, source in self._sources.items())


def _key(func: Any, source: RngSource, state: bytes) -> bytes:
    # With the device: torch.manual_seed brings all of them to one state.
    kind = "own" if isinstance(source, torch.Generator) else source
    return f"{func} {kind}".encode() + state


class TakeDraws(TorchDispatchMode):
    """Repeats the random operations of a screen for the whole batch and hands out the kept rows' share.

    Args:
        calls: the draws of each call in the replay, its batch size, the rows that are replayed, whether these are
            pairs, and how many parts an axis with more than one entry of each row has.
    """

    supports_higher_order_operators = True

    def __init__(self, calls: Sequence[tuple[Draws, int, Tensor, bool, int]]):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` at the screen's shapes if the screen drew from the same state."""
        kwargs = kwargs or {}
        if not _draws_numbers(func):
            return func(*args, **kwargs)
        source = _source(args, kwargs)
        key = _key(func, source, _state(source))
        for draws, batch, rows, pairs, parts in self._calls:
            if (full := draws.shapes.get(key)) is not None:
                return _draw_rows(func, args, kwargs, full, batch, rows, pairs, parts)
        return func(*args, **kwargs)


def _laid_out(values: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """A copy with these strides, in whose order a kernel draws; expanded where they are zero."""
    held = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
    copy = torch.empty_strided(held, strides, dtype=values.dtype, device=values.device)
    return copy.copy_(values[tuple(slice(n) for n in held)]).expand(shape)


def _draw_rows(
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    full: list[Any],
    batch: int,
    rows: Tensor,
    pairs: bool,
    parts: int,
) -> Any:
    whole = list(args)
    where: Rows | None = None
    sizes: torch.Size | None = None
    block: int | None = None
    source = fill_index(rows, batch)
    for i, (value, shape) in enumerate(zip(args, full, strict=True)):
        if shape is None or _shape(value)[0] == shape[0]:
            continue
        wanted = _shape(value)[0]
        if (rows_at := rows_between(shape[0], wanted, batch, len(rows), parts)) is None:
            cut = _rows_cut(shape[0], wanted, batch, len(rows), pairs, parts)
            if cut is None:
                return func(*args, **kwargs)
            rows_at, block = cut
        where, sizes = rows_at, wanted
        if isinstance(value, Tensor):
            # Rows that are not replayed hold a copy of one that is: zeros would be no probabilities to draw from.
            if block is not None:  # and so do positions
                index = torch.arange(where.repeat, device=value.device).clamp(max=block - 1)
                value = value.unflatten(where.axis, (-1, block)).index_select(where.axis + 1, index)
                value = value.flatten(where.axis, where.axis + 1)
            for axis, (long, short) in enumerate(zip(shape[0], wanted, strict=True)):
                if axis != where.axis and short < long:
                    value = value.index_select(axis, torch.arange(long, device=value.device).clamp(max=short - 1))
            whole[i] = _laid_out(where.take(value, source.to(value.device)), *shape)
        else:
            whole[i] = list(shape[0])
    if where is None:
        return func(*args, **kwargs)
    result = func(*whole, **kwargs)

    def take(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.dim():
            return tensor
        taken = blocks(where.axis, tensor.shape[where.axis] // batch, parts).take(tensor, rows)
        if block is not None:
            taken = taken.unflatten(where.axis, (len(rows), -1)).narrow(where.axis + 1, 0, block)
            taken = taken.flatten(where.axis, where.axis + 1)
        for axis, (long, short) in enumerate(zip(taken.shape, sizes or (), strict=False)):
            if axis != where.axis and short < long:
                taken = taken.narrow(axis, 0, short)
        return taken

    for i, argument in enumerate(func._schema.arguments[: len(args)]):
        if argument.alias_info is not None and argument.alias_info.is_write:
            args[i].copy_(take(whole[i]))
            if result is whole[i]:
                return args[i]
    return tuple(map(take, result)) if isinstance(result, (tuple, list)) else take(result)


def _rows_cut(
    full: torch.Size, part: torch.Size, batch: int, rows: int, pairs: bool, parts: int
) -> tuple[Rows, int | None] | None:
    """Where a tensor keeps its rows if the rows of ``part`` are cut as well, and how long their blocks are there.

    The rows' own axis is likelier than one on which both happen to be as many times fewer; then tokens of all rows may
    stand on one axis, and each row's block is cut.
    """
    if len(full) != len(part) or any(short > long for long, short in zip(full, part, strict=True)):
        return None
    each = 2 if pairs else 1
    sizes = list(enumerate(zip(full, part, strict=True)))
    for axis, (long, short) in sizes:
        if long == batch * each and short == rows * each:
            return Rows(axis, each, each), None
    for axis, (long, short) in sizes:
        if long % batch == 0 and short * batch == long * rows:
            return blocks(axis, long // batch, parts), None
    for axis, (long, short) in sizes:
        if long % batch == 0 and short % rows == 0 and long != short and not pairs:
            return Rows(axis, long // batch), short // rows
    return None
