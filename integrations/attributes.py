"""Attributes of a host's objects that something else stands in for while a context is open."""

import contextlib
from typing import Any


def put(stack: contextlib.ExitStack, owner: Any, name: str, new: Any) -> None:
    """Set an attribute until the stack is closed."""
    before = vars(owner).get(name)
    setattr(owner, name, new)
    stack.callback(lambda: delattr(owner, name) if before is None else setattr(owner, name, before))
