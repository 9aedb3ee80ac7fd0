"""What the host has to know of numbers on a device, asked for together: each wait for a device stalls its queue."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Answer = Callable[[list[float]], None]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor.to(device)``; from the host it does not wait for what the device still has to do."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


class Readback:
    """Questions of one decision, answered by one copy to the host."""

    def __init__(self) -> None:
        self._asked: list[tuple[list[Tensor], Answer]] = []

    def ask(self, values: Sequence[Tensor], then: Answer) -> None:
        """Have ``then`` called with these numbers when all are read; it may raise.

        Args:
            values: tensors of one element.
            then: takes them as floats, in order.
        """
        self._asked.append(([value.detach().reshape(1) for value in values], then))

    def take_over(self, other: "Readback") -> None:
        """Ask what another was to ask, too."""
        self._asked += other._asked
        other._asked = []

    def read(self) -> None:
        """Wait for the numbers, and answer the questions in the order in which they were asked."""
        asked, self._asked = self._asked, []
        flat = [value for values, _ in asked for value in values]
        if not flat:
            return
        device = next((value.device for value in flat if value.device.type != "cpu"), flat[0].device)
        numbers = torch.cat([to_device(value, device) for value in flat]).tolist()
        start = 0
        for values, then in asked:
            then([float(number) for number in numbers[start : start + len(values)]])
            start += len(values)
