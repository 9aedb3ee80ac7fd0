"""Putting the gate in front of a module, outside its own hooks, without a trace once it is taken off.

``Module.__call__`` looks at the instance attribute ``_compiled_call_impl`` before anything else; it is where
``Module.compile`` puts its function, and pickles and deep copies of a module leave it out.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from kondo_hooks import private

_SLOT = private.CALLED_FIRST


Method = str | tuple[Any, str]
"""A method of the gated module, or of an object that calls it."""


class _Interceptor:
    """What stands in an attribute: calls ``intercept(original, args, kwargs)``."""

    def __init__(self, intercept: Callable[..., Any], original: Callable[..., Any], name: str, owner: Any):
        self._intercept = intercept
        self._original = original
        self._name = name
        self._owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._intercept(self._original, args, kwargs)

    # A copy of the owner is not gated: it gets what the interceptor stands in front of.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return None if self._name == _SLOT else getattr(memo.get(id(self._owner), self._owner), self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ()) if self._name == _SLOT else (getattr, (self._owner, self._name))


def owner_of(module: nn.Module, method: Method | None) -> tuple[Any, str | None]:
    """The object that is called, and by what name; None for the module's own call."""
    return method if isinstance(method, tuple) else (module, method)


def attach(module: nn.Module, method: Method | None, intercept: Callable[..., Any]) -> Callable[[], bool]:
    """Send ``module(...)``, or what ``method`` names, through ``intercept(original, args, kwargs)``.

    Returns:
        A function that takes it off again; it returns False if somebody else had replaced it meanwhile.
    """
    owner, called = owner_of(module, method)
    name = _SLOT if called is None else called
    missing = object()
    held: dict[str, Any] = owner.__dict__
    before = held.get(name, missing)
    if called is None:
        original = private.call_of(module) if before in (missing, None) else before
    else:
        original = getattr(owner, called)
    ours = _Interceptor(intercept, original, name, owner)
    held[name] = ours
    # So that a compiled training step meets the gate.
    ends = private.make_dynamo_call(module) if called is None else lambda: None

    def detach() -> bool:
        ends()
        if held.get(name) is not ours:
            return False
        if before is missing:
            del held[name]
        else:
            held[name] = before
        return True

    return detach
