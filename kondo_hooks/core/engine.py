"""Who runs a model, as a step sees it: here plain PyTorch in one process.

An engine says whether a pass through the model communicates, whether the coming backward reduces gradients, how to
run one pass of several without reducing them yet, and how rows are chosen and passes planned. Those of several ranks
are in ``kondo_hooks.ranks``.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kondo_hooks.core.arrival import Arrival
from kondo_hooks.core.call import Call
from kondo_hooks.core.kept_rows import Part
from kondo_hooks.core.passes import Plan, checked, complete, grouped
from kondo_hooks.core.readings import Learned
from kondo_hooks.core.replay import Replayed
from kondo_hooks.hosts import accelerate_syncs
from kondo_hooks.rules.readback import Readback
from kondo_hooks.rules.samples import Decision, Kept, Samples, Signal
from kondo_hooks.rules.selection import Selector

Force = Callable[[Samples], Tensor | None]


class Alone:
    """A process on its own: nobody to agree with. The base of ranks that have others."""

    rank = 0
    size = 1
    alone = True
    tensor_parallel = False
    failed = False

    def fail(self, error: BaseException) -> None:
        """Raise ``error``; with other ranks, tell them first, and raise together with them."""
        raise error

    def raise_failures(self, devices: Iterable[torch.device] = ()) -> None:
        """Raise on every rank if one failed; to be called where a collective that all of them entered has ended.

        Args:
            devices: that it ran on, beside the current accelerator; the host waits for them.
        """

    def raise_own(self) -> None:
        """Raise what this rank still holds."""

    def meet(self) -> None:
        """Wait for all ranks."""

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """Of each number over the ranks."""
        return list(numbers)


class Engine:
    """What runs a model: plain PyTorch in one process, and the base of the others.

    Attributes:
        name: as the user knows it.
        wrappers: the modules that it wraps a model in.
        ranks: who trains this model.
        together: whether all ranks decide as one.
        balance: whether kept rows then move between them.
        communicates: whether every pass through the model has collectives in it, so that ranks must make the same
            number of passes; without, only the reduction of the gradients has.
        swaps_parameters: whether parameters are other objects, or hold other values, between passes.
        takes_gradients: whether ``torch.autograd.grad`` gives the parameters' gradients of a pass on this rank.
        reduces_later: whether gradients are reduced only after ``loss.backward()`` has returned.
        inside: whether the gated call is made within the wrapper's own forward, which then counts on one backward.
    """

    name = "PyTorch"
    communicates = False
    swaps_parameters = False
    takes_gradients = True
    reduces_later = False
    inside = False
    together = False
    balance = False

    def __init__(self, wrappers: Sequence[Any] = (), ranks: "Alone | None" = None):
        self.wrappers: list[Any] = list(wrappers)
        self.ranks = Alone() if ranks is None else ranks

    def before_call(self) -> None:
        """What wrappers would do together in their next forward, done now that all ranks are at the same call."""

    def types(self, model: nn.Module) -> frozenset[torch.dtype]:
        """The types that the model computes in."""
        return frozenset(p.dtype for p in model.parameters() if p.is_floating_point())

    def check_call(self, given: Iterable[Any]) -> None:
        """Refuse a call that ranks make together, each with a part of every row, if they may decide each for itself.

        Args:
            given: the call's arguments.

        Raises:
            ValueError: if a process group is among them.
        """
        if self.ranks.tensor_parallel or not (dist.is_available() and dist.is_initialized()):
            return
        for value in given:
            if isinstance(value, dist.ProcessGroup) and (size := dist.get_world_size(value)) > 1:
                raise ValueError(
                    f"gated: the call is given a process group of {size} ranks (ring attention, sequence or context "
                    "parallelism?): they run each row together, so they must take one decision. Name them: "
                    "gated(..., tensor_parallel_group=group), or leave that parallelism away."
                )

    def syncs(self) -> bool:
        """Whether the host means the coming backward to reduce gradients: the end of its accumulation."""
        return True

    def reduces(self, call: Call) -> bool:
        """Whether the replay of this call, the last of its population, is to reduce gradients."""
        return self.syncs()

    def ends_accumulation(self, call: Call) -> bool:
        """Whether the host's gradient accumulation ends with the backward of this call."""
        told = accelerate_syncs()
        return self.reduces(call) and told is not False

    def rest(self) -> None:
        """Leave parameters as they are after a backward, where one has ended and its replay is still to come."""

    def window(self, size: Any) -> Any:
        """The window that the user wants, as this engine has it.

        Raises:
            ValueError: if nobody would ever end it.
        """
        if size == "auto" and not self.wrappers and accelerate_syncs() is None:
            raise ValueError(
                "window='auto' takes the end of gradient accumulation from the host, and there is none: the model is "
                "not wrapped by DDP, FSDP or DeepSpeed and accelerate is not in use. Give the number of backwards."
            )
        return size

    @contextlib.contextmanager
    def one_pass(self, reduces: bool) -> Iterator[None]:
        """Around the forward and backward of one pass; gradients are reduced at its end, or kept for the next."""
        yield

    def backward(self, outputs: Sequence[Any], grads: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> None:
        """Backward from a pass's outputs into the parameters, or into ``inputs`` alone."""
        torch.autograd.backward(outputs, grads, inputs=inputs)

    def decide(
        self, selector: Selector, signals: list[Signal] | None, slots: list[int], force: Force, back: Readback | None
    ) -> tuple[Decision, list[Kept], Tensor | None]:
        """Choose among the rows of a population.

        Args:
            selector: that chooses.
            signals: of each call; None if this rank failed to read them.
            slots: which of the structures that ranks have in common each call has.
            force: gives the samples, (N,) bool, that are kept whatever their score.
            back: brings the decision's numbers; without, they are there.

        Returns:
            The decision, what is kept of each call, and with all ranks as one batch, (ranks, slots), how many rows
            each rank keeps.
        """
        samples = self.samples(selector, signals)
        decision = selector.choose(samples, force(samples), back)
        return decision, selector.kept_of(decision, signals or []), None

    def samples(self, selector: Selector, signals: list[Signal] | None) -> Samples:
        """What is chosen among; raises if a call could not be read."""
        if signals is None:
            raise RuntimeError("gated: a call of this window could not be read")
        return selector.samples(signals, self.together)

    def plan(
        self,
        arrivals: list[Arrival],
        slots: list[int],
        parts: list[Part | None],
        counts: Tensor | None,
        limit: int | None,
        learned: Learned,
    ) -> Plan:
        """Which rows go through the model together.

        Args:
            arrivals: the calls.
            slots: the structure of each.
            parts: the kept rows of each, None where there are none.
            counts: (ranks, slots) kept rows, where all ranks decided as one.
            limit: most rows in one pass.
            learned: where inputs keep their rows, by their paths.
        """
        chosen = [complete(part) for part in parts if part is not None] or [complete(arrivals[0].stand_in())]
        return Plan(grouped(chosen, limit))

    def run(self, group: list[Part], first: Arrival, learned: Learned, back: Readback) -> list[Replayed]:
        """One pass of several, checked against the screen.

        Args:
            group: rows that go together.
            first: a call that has a row to stand in for others.
            learned: where inputs keep their rows; updated.
            back: what is to be read before the pass's backward.
        """
        return checked([group], learned, back)

    def open(self, gate: Any) -> Callable[[], None]:
        """Put in what the engine needs while a context is open; returns what takes it out.

        Args:
            gate: the backward side of the gate.
        """
        return lambda: None
