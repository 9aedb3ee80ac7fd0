"""``log_prob`` of any ``torch.distributions.Distribution``, seen where it is called.

While a context is open, every class's ``log_prob`` tells who listens what it returned: the loss code's watcher, or the
screen of a model that calls it inside. Only the outermost call counts, for a distribution made of others calls theirs.

A log-prob of what the distribution itself has drawn by ``rsample`` is none of an action that was taken: the loss learns
through the sample (SAC, a variational bound), and its gradient there is no advantage. Nobody is told of it.
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from kondo_hooks import private

Listener = Callable[[Distribution, Tensor], None]

_listeners: list[Listener] = []
_wrapped: dict[tuple[type, str], Callable[..., Any]] = {}
_drawn: "dict[int, weakref.ref[Tensor]]" = {}
_inside = False
_sampling = False


def listen(listener: Listener) -> Callable[[], None]:
    """Tell ``listener`` each distribution that is asked for a ``log_prob``, and what it returned.

    Returns:
        What ends it, and leaves no trace.
    """
    if not _listeners:
        Distribution.__init_subclass__ = classmethod(_wrap_new)  # type: ignore
        _wrap_all(Distribution)
    _listeners.append(listener)

    def end() -> None:
        if listener in _listeners:
            _listeners.remove(listener)
        if not _listeners and _wrapped:
            del Distribution.__init_subclass__
            for (kind, name), original in _wrapped.items():
                setattr(kind, name, original)
            _wrapped.clear()
            _drawn.clear()

    return end


def is_inside() -> bool:
    """Whether a ``log_prob`` runs now."""
    return _inside


def _wrap_all(kind: type) -> None:
    _wrap(kind)
    subclasses: list[type] = type.__subclasses__(kind)
    for subclass in subclasses:
        _wrap_all(subclass)


def _wrap_new(kind: Any, **_: Any) -> None:
    _wrap(kind)


def _wrap(kind: type) -> None:
    for name, around in (("log_prob", _told), ("rsample", _noted), ("sample", _not_noted)):
        original = kind.__dict__.get(name)
        if (kind, name) not in _wrapped and callable(original):
            _wrapped[kind, name] = original
            setattr(kind, name, around(original))


def _noted(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def rsample(self: Distribution, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, Tensor) and not (_sampling or torch.compiler.is_compiling()):
            key = id(result)
            _drawn[key] = weakref.ref(result, lambda _: _drawn.pop(key, None))
        return result

    return rsample


def _not_noted(original: Callable[..., Any]) -> Callable[..., Any]:
    """``sample``, which may be made of ``rsample`` and sends no gradient through it."""

    @functools.wraps(original)
    def sample(self: Distribution, *args: Any, **kwargs: Any) -> Any:
        global _sampling
        if torch.compiler.is_compiling() or _sampling:
            return original(self, *args, **kwargs)
        _sampling = True
        try:
            return original(self, *args, **kwargs)
        finally:
            _sampling = False

    return sample


def _is_own(value: Any) -> bool:
    """Whether a log-prob of it has a gradient through the value, too."""
    if not isinstance(value, Tensor):
        return False
    return value.requires_grad or ((ref := _drawn.get(id(value))) is not None and ref() is value)


def _told(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def log_prob(self: Distribution, *args: Any, **kwargs: Any) -> Any:
        global _inside
        if torch.compiler.is_compiling() or _inside:
            return original(self, *args, **kwargs)
        _inside = True
        try:
            result = original(self, *args, **kwargs)
        finally:
            _inside = False
        if isinstance(result, Tensor) and not _is_own(args[0] if args else kwargs.get("value")):
            for listener in list(_listeners):
                listener(self, result)
        return result

    return log_prob


def parameters(distribution: Distribution) -> Iterator[Tensor]:
    """The tensors that a distribution, and those that it is made of, hold."""
    for value in vars(distribution).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Distribution):
            yield from parameters(value)


def take_off(mode: TorchFunctionMode) -> list[Any] | None:
    """Take a mode, and it alone, off the stack; returns the modes above it, None if it was not there."""
    above: list[Any] = []
    while (found := private.pop_mode()) is not None:
        if found is mode:
            break
        above.append(found)
    else:
        put_on(above)
        return None
    put_on(above)
    return above


def take_all_off() -> list[Any]:
    """Take every mode off; returns them, the uppermost first."""
    modes: list[Any] = []
    while (found := private.pop_mode()) is not None:
        modes.append(found)
    return modes


def put_on(modes: Sequence[Any]) -> None:
    """Put modes that were taken off back, the last one first."""
    for mode in reversed(modes):
        private.push_mode(mode)


# What leaves log-probs log-probs: of a row's dimensions together, or in another shape or type.
_KEEPING = (
    *("sum", "stack", "cat", "concat", "concatenate", "add", "__add__", "__radd__", "reshape", "view", "squeeze"),
    *("unsqueeze", "flatten", "contiguous", "clone", "to", "float", "double", "type_as"),
)
_NEGATING = ("neg", "negative", "__neg__")
# A density's change of variables: log-probs minus what the samples were stretched by.
_CORRECTING = ("sub", "__sub__")


class LogProbs(TorchFunctionMode):
    """The tensors that log-probs came out as while a model ran, and what was summed or stacked of them alone.

    As a context it listens; as a mode it looks on from the first ``log_prob`` on, for that is when the model ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, Tensor] = {}
        self._negative: set[int] = set()

    def __enter__(self) -> "LogProbs":
        self._end = listen(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()
        if self._found:
            take_off(self)

    def kind(self, tensor: Tensor) -> Literal["logp", "nll"] | None:
        """What a tensor holds: "logp", their negative "nll", or something else."""
        if id(tensor) not in self._found:
            return None
        return "nll" if id(tensor) in self._negative else "logp"

    def _note(self, _: Distribution, log_probs: Tensor) -> None:
        if not self._found and not torch.compiler.is_compiling():
            private.push_mode(self)
        self._found[id(log_probs)] = log_probs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` as it is; note what it made of log-probs."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(result, Tensor) and result.is_floating_point() and name in (*_KEEPING, *_CORRECTING, *_NEGATING):
            given = (
                args[0] if args and isinstance(args[0], (tuple, list)) else args[:1] if name in _CORRECTING else args
            )
            kinds = {self.kind(value) for value in given if isinstance(value, Tensor)}
            if len(kinds) == 1 and None not in kinds and not (name in _CORRECTING and "nll" in kinds):
                self._found[id(result)] = result
                if (name in _NEGATING) != ("nll" in kinds):
                    self._negative.add(id(result))
        return result
