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

from kondo_hooks.batch import Rows, fill_index, rows_between
from kondo_hooks.state import rng_state


@dataclass
class Draws:
    """The random operations of one screen, by the generator's state before each.

    Keyed by state, a replay finds them again in any order: activation checkpointing repeats some.

    Attributes:
        shapes: of each operation's arguments.
        starts: of each device that was drawn on, its generator's state before.
        indivisible: an operation that cannot be repeated for some rows, if there is one.
    """

    shapes: dict[bytes, list[Any]] = field(default_factory=dict)
    starts: dict[torch.device, Tensor] = field(default_factory=dict)
    indivisible: str | None = None


# Their backward repeats the draw inside the kernel, or how much they draw depends on each row's values.
_OPAQUE = ("attention", "rnn", "lstm", "gru", "inductor", "poisson", "binomial", "gamma", "dirichlet", "rrelu")


def _state(device: torch.device) -> Tensor:
    return rng_state([device])[-1][1]


def _key(func: Any, device: torch.device, state: Tensor) -> bytes:
    # With the device: torch.manual_seed brings all of them to one state.
    return f"{func} {device}".encode() + ctypes.string_at(state.data_ptr(), state.numel())


def _draws_numbers(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _device(args: Iterable[Any], kwargs: dict[str, Any]) -> torch.device:
    if (device := kwargs.get("device")) is None:
        return next((value.device for value in args if isinstance(value, Tensor)), torch.device("cpu"))
    device = torch.device(device)
    if device.type in ("cpu", "meta") or device.index is not None:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride()
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return torch.Size(value), None
    return None


class RecordDraws(TorchDispatchMode):
    """Notes the shapes of every random operation of a screen. Costs microseconds an operation."""

    def __init__(self, draws: Draws):
        super().__init__()
        self._draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; note it if it moved the generator."""
        kwargs = kwargs or {}
        if not _draws_numbers(func):
            return func(*args, **kwargs)
        device = _device(args, kwargs)
        before = _state(device)
        result = func(*args, **kwargs)
        if not torch.equal(_state(device), before):
            self._draws.starts.setdefault(device, before)
            self._draws.shapes[_key(func, device, before)] = [_shape(value) for value in args]
            if any(word in str(func) for word in _OPAQUE):
                self._draws.indivisible = str(func)
        return result


class TakeDraws(TorchDispatchMode):
    """Repeats the random operations of a screen for the whole batch and hands out the kept rows' share.

    Args:
        calls: the draws of each call in the replay, its batch size, the rows that are replayed and whether these are
            pairs.
    """

    def __init__(self, calls: Sequence[tuple[Draws, int, Tensor, bool]]):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` at the screen's shapes if the screen drew from the same state."""
        kwargs = kwargs or {}
        if not _draws_numbers(func):
            return func(*args, **kwargs)
        device = _device(args, kwargs)
        key = _key(func, device, _state(device))
        for draws, batch, rows, pairs in self._calls:
            if (full := draws.shapes.get(key)) is not None:
                return _draw_rows(func, args, kwargs, full, batch, rows, pairs)
        return func(*args, **kwargs)


def _draw_rows(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], full: list[Any], batch: int, rows: Tensor, pairs: bool
) -> Any:
    whole = list(args)
    where = None
    source = fill_index(rows, batch)
    for i, (value, shape) in enumerate(zip(args, full, strict=True)):
        if shape is None or _shape(value)[0] == shape[0]:
            continue
        if (rows_at := rows_between(shape[0], _shape(value)[0], batch, len(rows), pairs)) is None:
            return func(*args, **kwargs)
        where = rows_at
        if isinstance(value, Tensor):
            # Rows that are not replayed hold a copy of one that is: zeros would be no probabilities to draw from.
            whole[i] = torch.empty_strided(*shape, dtype=value.dtype, device=value.device)
            whole[i].copy_(where.take(value, source))
        else:
            whole[i] = list(shape[0])
    if where is None:
        return func(*args, **kwargs)
    result = func(*whole, **kwargs)

    def take(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.dim():
            return tensor
        return Rows(where.axis, tensor.shape[where.axis] // batch, pairs).take(tensor, rows)

    for i, argument in enumerate(func._schema.arguments[: len(args)]):
        if argument.alias_info is not None and argument.alias_info.is_write:
            args[i].copy_(take(whole[i]))
            if result is whole[i]:
                return args[i]
    return tuple(map(take, result)) if isinstance(result, (tuple, list)) else take(result)
