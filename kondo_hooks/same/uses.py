"""Which of some tensors a model reads."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kondo_hooks.rows.tree import flatten


class Uses(TorchDispatchMode):
    """Notes whether any operation is given one of some tensors, or a view of it.

    Attributes:
        each: of each, whether it was given.
    """

    supports_higher_order_operators = True

    def __init__(self, *tensors: Tensor):
        super().__init__()
        self.each = [False] * len(tensors)
        self._memory = {memory_of(tensor): i for i, tensor in enumerate(tensors)}

    @property
    def found(self) -> bool:
        """Whether any was."""
        return any(self.each)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` as it is."""
        if not all(self.each):
            for leaf in flatten((args, kwargs or {}))[1]:
                if (i := self._memory.get(memory_of(leaf))) is not None:
                    self.each[i] = True
        return func(*args, **(kwargs or {}))


def memory_of(tensor: Tensor) -> Any:
    """What views of one tensor have in common."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # a layout without a storage
        return id(tensor)
