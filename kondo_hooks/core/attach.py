"""Putting the gate in front of a module, outside its own hooks, without a trace once it is taken off.

``Module.__call__`` looks at the instance attribute ``_compiled_call_impl`` before anything else; it is where
``Module.compile`` puts its function, and pickles and deep copies of a module leave it out.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from kondo_hooks import private

_SLOT = private.CALLED_FIRST
_MARK: Any = "kondo_hooks"


class _Interceptor:
    """What stands in the module's attribute: calls ``intercept(original, args, kwargs)``."""

    def __init__(self, intercept: Callable[..., Any], original: Callable[..., Any], name: str, module: nn.Module):
        self._intercept = intercept
        self._original = original
        self._name = name
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._intercept(self._original, args, kwargs)

    # A copy of the module is not gated: it gets what the interceptor stands in front of.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return None if self._name == _SLOT else getattr(memo.get(id(self._module), self._module), self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ()) if self._name == _SLOT else (getattr, (self._module, self._name))


def attach(module: nn.Module, method: str | None, intercept: Callable[..., Any]) -> Callable[[], bool]:
    """Send ``module(...)``, or ``module.<method>(...)``, through ``intercept(original, args, kwargs)``.

    Returns:
        A function that takes it off again; it returns False if somebody else had replaced it meanwhile.
    """
    name = _SLOT if method is None else method
    missing = object()
    before = module.__dict__.get(name, missing)
    if method is None:
        original = private.call_of(module) if before in (missing, None) else before
    else:
        original = getattr(module, method)
    ours = _Interceptor(intercept, original, name, module)
    module.__dict__[name] = ours
    if method is None:
        # Dynamo goes straight to `forward` where a module has no hooks; this entry, which belongs to no hook and
        # does nothing, sends it through `__call__`, so that a compiled training step meets the gate.
        private.hooks_with_kwargs(module)[_MARK] = True

    def detach() -> bool:
        private.hooks_with_kwargs(module).pop(_MARK, None)
        if module.__dict__.get(name) is not ours:
            return False
        if before is missing:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before
        return True

    return detach
