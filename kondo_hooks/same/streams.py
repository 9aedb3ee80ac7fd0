"""Streams of an accelerator.

Autograd runs a node's backward on the stream that its forward ran on, and at the end lets the caller's streams wait for
those of the leaves. A gated call's gradient ends at its node, which is no leaf on the device: nobody waits for it.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class Streams:
    """The streams that gated calls, and the backwards that reached them, have run on."""

    def __init__(self) -> None:
        self._seen: set[torch.Stream] = set()

    def note(self, tensors: Iterable[Tensor | None]) -> None:
        """Remember the current stream of each device that one of these is on."""
        devices = {tensor.device for tensor in tensors if tensor is not None}
        if devices != {_CPU} and (accelerator := torch.accelerator.current_accelerator()) is not None:
            self._seen |= {torch.accelerator.current_stream(d) for d in devices if d.type == accelerator.type}

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """The current streams wait for those on entry, to read what was made there; and those for these on exit.

        The latter because memory goes back to the stream that it was made on.
        """
        pairs = [(stream, torch.accelerator.current_stream(stream.device)) for stream in self._seen]
        others = [(stream, current) for stream, current in pairs if stream != current]
        for stream, current in others:
            current.wait_stream(stream)
        try:
            yield
        finally:
            for stream, current in others:
                stream.wait_stream(current)


_CPU = torch.device("cpu")
