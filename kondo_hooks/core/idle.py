"""Steps of an optimizer that the gate had no part in: the loop trains past it, and should hear of it early."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from kondo_hooks.errors import WarnOnce


class Idle:
    """Watches what reaches the gate between two steps of the optimizers that move its model.

    Args:
        target: what is gated, as a message names it.
        warn: gives each warning once.
    """

    def __init__(self, target: str, warn: WarnOnce):
        self.target = target
        self._warn = warn
        self._called = False
        self._screened = False
        self._reached = False

    def screened(self) -> None:
        """Note a call whose graph is a node of the gate."""
        self._called = self._screened = True

    def ran(self) -> None:
        """Note a call with a graph of its own: it passed straight through, or runs its kept rows alone."""
        self._called = self._reached = True

    def reached(self) -> None:
        """Note that a backward came to a node."""
        self._reached = True

    @property
    def waits(self) -> bool:
        """Whether calls were gated since the last step, and no backward reached any of them."""
        return self._screened and not self._reached

    def check(self, optimizer: torch.optim.Optimizer, model: Collection[nn.Parameter]) -> None:
        """Look at what led to a step.

        Args:
            optimizer: about to step.
            model: the gated model's parameters.

        Raises:
            RuntimeError: if calls were gated, no backward reached any of them, and the step would move nothing.
        """
        mine = {id(p) for p in model}
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if id(p) in mine]
        if not grads:
            return
        learns = any(grad is not None for grad in grads)
        if not self._called and learns:
            self._warn(
                "unused",
                f"gated: an optimizer steps this model, but {self.target} was never called with grad, so nothing was "
                "gated. If the loop calls a wrapper (torch.compile, DDP) gate that; if it calls another method, name "
                "it with method=.",
            )
        if self._screened and not self._reached:
            told = (
                f"gated: an optimizer steps this model, but no backward reached the gated calls of {self.target} since "
                "its last step"
            )
            if not learns:
                raise RuntimeError(
                    f"{told}, so the step would move nothing. Is the loss made of their outputs, and is backward() "
                    "called on it inside the context? What the loss uses has to be returned by the gated call."
                )
            self._warn(
                "unreached",
                f"{told}: its gradients came past the gate, from all rows. Gate what the loss is made of: name the "
                "method with method=.",
            )
        self._screened = self._reached = False


def moves(optimizer: torch.optim.Optimizer, parameters: Collection[Any]) -> bool:
    """Whether an optimizer has any of these parameters."""
    mine = {id(p) for p in parameters}
    return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
