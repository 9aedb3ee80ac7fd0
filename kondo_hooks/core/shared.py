"""What the parts of a gate share: the model, who runs it, who decides, and what was learned of it."""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from kondo_hooks.core.call import Call
from kondo_hooks.core.engine import Engine
from kondo_hooks.core.idle import Idle
from kondo_hooks.core.pace import Pace
from kondo_hooks.core.readings import Learned
from kondo_hooks.core.texts import Named
from kondo_hooks.delight.loss_code import LossWatcher
from kondo_hooks.errors import WarnOnce
from kondo_hooks.rules.selection import Selector
from kondo_hooks.same.state import ModuleState
from kondo_hooks.same.streams import Streams
from kondo_hooks.stats import Stats


@dataclass
class Shared:
    """What the parts of a gate share.

    Attributes:
        state: the model's.
        engine: that runs the model.
        selector: decides.
        idle: notices steps that the gate had no part in.
        warn: tells, once.
        learned: where inputs keep their rows, as it was found by replaying.
        watcher: sees the loss code and every call of a backward.
        stats: counts.
        streams: that calls and their gradients were made on.
        micro_batch_size: most rows in one pass of the replay; None for all in one.
        segments: the input that tells which texts a row holds, or a function of the call, where the user named it.
        living: calls that a backward may still reach, where some steps pass straight through.
        pace: what steps take.
        waits: whether a backward may leave its calls waiting for others.
        running: whether the gate runs the model itself.
    """

    state: ModuleState
    engine: Engine
    selector: Selector
    idle: Idle
    warn: WarnOnce
    learned: Learned
    watcher: LossWatcher
    micro_batch_size: int | None = None
    segments: Named = None
    stats: Stats = field(default_factory=Stats)
    streams: Streams = field(default_factory=Streams)
    living: weakref.WeakSet[Call] = field(default_factory=weakref.WeakSet)
    pace: Pace = field(init=False)
    waits: bool = False
    running: bool = False

    def __post_init__(self) -> None:
        self.pace = Pace(
            self.selector.config.rate == "auto",
            lambda: next((p.device for p in self.state.parameters()), torch.device("cpu")),
        )

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """While the gate runs the model itself. A forward may renormalise weights in place: that is no step."""
        self.running = True
        before = self.state.versions()
        try:
            with self.watcher.off():
                yield
        finally:
            self.running = False
            self.state.forgive(before)

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """The same for the replay itself: an optimizer may step in its backward, and what a forward counts counts."""
        self.running = self.state.attributes.counts = True
        try:
            with self.watcher.off():
                yield
        finally:
            self.running = self.state.attributes.counts = False
