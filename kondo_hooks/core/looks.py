"""Looks that the gate takes at a model by running a row or two of it: once a structure, for what was seen stays."""

import contextlib
from typing import Any

from kondo_hooks.core.arrival import Arrival, OutputProbe
from kondo_hooks.core.audit import Audit
from kondo_hooks.core.call import Call
from kondo_hooks.core.passes import forward as run_checked
from kondo_hooks.core.positions import Positions, locate
from kondo_hooks.core.readings import find_positions
from kondo_hooks.core.replay import AmbiguousRowsError, find_graphs, have_graph, replay
from kondo_hooks.core.shared import Shared
from kondo_hooks.delight.distributions import listen
from kondo_hooks.delight.graph import find_bend, selects_log_prob
from kondo_hooks.errors import ReplayMismatchError, unknown_positions

_AUDITED = 0.1  # share of the rows that a look takes where the user gave a price


class Looks:
    """What one gate has seen of its model."""

    def __init__(self, shared: Shared, audit: Audit):
        self.shared = shared
        self._audit = audit
        self._probed: dict[tuple[str, ...], OutputProbe] = {}
        self._positions: dict[str, bool] = {}
        self._constants: dict[str, bool] = {}
        self._cuts: dict[tuple[str, ...], Positions | None] = {}

    def forget_constants(self, arrival: Arrival) -> None:
        """Drop the gradients of outputs without rows that have no graph, as one row shows: they are constants."""
        if self.shared.engine.communicates:
            return  # one more pass, that other ranks might not make
        call = arrival.call
        outputs = [i for i in arrival.unsplit() if not call.makes_loss(i)]
        unknown = [i for i in outputs if call.paths[i] not in self._constants]
        if unknown:
            part = arrival.stand_in().whole() if call.whole else arrival.stand_in()
            with self.shared.looking():
                try:
                    graphs = have_graph(part, self.shared.learned)
                except ReplayMismatchError:
                    return  # refused, then, as what has a graph and no rows
            self._constants.update({call.paths[i]: not graphs[i] for i in unknown})
        for i in outputs:
            if self._constants[call.paths[i]]:
                arrival.grads[i] = None

    def probe_outputs(self, arrival: Arrival) -> OutputProbe | None:
        """How a call's outputs are made: once for each structure, one row is run with a graph to see."""
        if self.shared.engine.communicates:
            return None  # one more pass, that other ranks might not make
        key = tuple(arrival.call.paths)
        if key not in self._probed:
            ends: set[Any] = set()
            stop = listen(lambda _, log_probs: ends.add(log_probs.grad_fn))
            try:
                with self.shared.looking():
                    replayed = run_checked([arrival.stand_in()], self.shared.learned)
            finally:
                stop()
            outputs = {i: output for r in replayed for i, output in r.all_outputs.items()}
            self._probed[key] = OutputProbe(
                {i for i, output in outputs.items() if output.requires_grad},
                {i for i, output in outputs.items() if output.requires_grad and selects_log_prob(output)},
                set(outputs),
                {i: bend for i, output in outputs.items() if (bend := find_bend(output, ends)) is not None},
            )
        return self._probed[key]

    def find_positions(self, a: Arrival) -> None:
        """Find out which outputs have the positions of the signal's, and which an axis that is as long by chance."""
        call = a.call
        length, others = a.with_positions()
        for i, shape in a.summed_over_positions().items():
            self.shared.warn("positions", unknown_positions(call.output_name(i), shape, by_row=True))
        if any(call.paths[i] not in self._positions for i in others):
            found: dict[int, bool] = {}
            if a.source is not None and not self.shared.engine.communicates:
                with self.shared.looking(), self.shared.engine.one_pass(False):
                    found = find_positions(call, list(others), a.source, length)
            for i, shape in others.items():
                several = shape.count(length) > 1
                if i not in found:
                    self.shared.warn("positions", unknown_positions(call.output_name(i), shape, by_row=several))
                self._positions[call.paths[i]] = found.get(i, not several)
        a.positions = {i: self._positions[call.paths[i]] for i in others}

    def find_readings(self, arrivals: list[Arrival]) -> None:
        """Find out where inputs keep their rows, by a row of each call in doubt, before other rows are let go."""
        engine = self.shared.engine
        waits = self.shared.waits or any(a.cuts for a in arrivals)
        if not waits or engine.communicates or engine.ranks.failed:
            return
        for a in arrivals:
            is_known = a.texts is not None or a.call.whole is not None or self.shared.learned.known(a.call) is not None
            if not is_known and a.call.in_doubt():
                some = a.some()
                if some is not None:
                    with (
                        self.shared.looking(),
                        self.shared.engine.one_pass(False),
                        contextlib.suppress(AmbiguousRowsError),
                    ):
                        replay([some], self.shared.learned)

    def find_prefixes(self, arrivals: list[Arrival]) -> None:
        """Find out where calls whose rows are to be cut keep their positions, and that the first need no others."""
        engine = self.shared.engine
        for a in sorted(arrivals, key=lambda a: a.follows is not None):
            if not a.cuts or a.texts is not None or a.call.whole is not None or engine.ranks.failed:
                continue
            key = (*a.call.input_paths, *a.call.paths)
            with self.shared.looking(), engine.one_pass(False):
                a.cut = self._cuts[key] = locate(
                    a, self._cuts.get(key), self.shared.learned, look=not engine.communicates
                )

    def find_graphs(self, call: Call) -> None:
        """Find out which of the tensors that a screen left in attributes have a graph."""
        with self.shared.looking():
            find_graphs(call, self.shared.learned)

    def audit(self, arrivals: list[Arrival]) -> None:
        """Audit what is new, or due; where passes communicate, also on a rank that failed to read its calls."""
        if self.shared.engine.ranks.failed and not self.shared.engine.communicates:
            return
        rate, shared = self.shared.selector.rate() or _AUDITED, self.shared
        with shared.looking():
            self._audit(arrivals, shared.selector.step, rate, shared.engine, shared.state, shared.learned)
