"""transformers ``Trainer``, and whatever derives from it: metrics in its logs, schedules, state in checkpoints.

``with kondo.gated(trainer.model, rate=0.1): trainer.train()`` works without this; the trainer adopts the gate by a
``KondoCallback`` of its own while the context is open. ``Trainer(callbacks=[KondoCallback(rate=0.1)])`` works without
the context.
"""

import copy
import functools
import gc
import os
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

import kondo_hooks as kondo
from kondo_hooks.integrations.accelerate import accelerate_syncs

Rate = float | Literal["lossless", "auto"] | Callable[[Any], float]


_open: "weakref.WeakSet[KondoCallback]" = weakref.WeakSet()


class KondoCallback(TrainerCallback):
    """Gates a Trainer's model, or reports for a gate that is already there.

    The Trainer's logs get ``kondo/rate``, ``kondo/kept``, ``kondo/price``, ``kondo/skipped``, ``kondo/delight_kept``
    and ``kondo/delight_dropped``, each over the steps since the last log; its checkpoints get the gate's state, one
    file a rank, and a run that resumes continues with it. Evaluation and generation run ungated.

    Args:
        gate: one that is open around ``train()``; without it the callback opens its own for each ``train()``.
        rate: as of :func:`kondo_hooks.gated`, or a function of the ``TrainerState`` (``state.global_step``,
            ``state.epoch``), asked at the start of every optimizer step.
        options: other keywords of :func:`kondo_hooks.gated`.
    """

    def __init__(self, gate: kondo.Gated | None = None, *, rate: Rate | None = None, **options: Any):
        if gate is not None and (rate is not None or options):
            raise ValueError("KondoCallback: give a gate, or what to make one of (rate=...), not both")
        self.gate = gate
        self._rate = rate
        self._options = options
        self._now = 1.0
        self._own = gate is None
        self._before = kondo.Stats()
        self._restore: Callable[[], None] = _nothing
        self._unguard: Callable[[], None] = _nothing
        if self._own:
            # Bad options fail here; a method is looked for when there is a model to look at.
            early = {name: value for name, value in options.items() if name != "method" and value != "auto"}
            kondo.gated(nn.Identity(), rate=None if callable(rate) else rate, **early).discard()

    def close(self) -> None:
        """Take an own gate off; only needed where a callback that was added late met an error outside of a step."""
        if self._own and self.gate is not None:
            self.gate.__exit__(RuntimeError, None, None)
            self.gate = None
        self._restore()
        self._unguard()

    # Events of the Trainer.

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have an error anywhere in ``train()`` take an own gate off."""
        if self._own and (trainer := _calling_trainer(self)) is not None:
            _closing_on_error(trainer, "train", self.close)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Gate what the Trainer trains, wrapped as it is now."""
        trainer = _calling_trainer(self)
        if trainer is None:
            raise RuntimeError("KondoCallback: on_train_begin is an event of a Trainer, which calls it in train()")
        _first(trainer, self)
        self._restore()
        if self._own:
            for other in list(_open):  # a train() that failed told no callback of it
                if other.gate is not None and model in other.gate.model.modules():
                    other.close()
            self.close()
            rate: Any = self._rate
            if callable(rate):
                self._now = rate(state)
                rate = self._at
            self.gate = kondo.gated(trainer.model_wrapped, rate=rate, **self._options)
            self.gate.host_defaults(**_defaults(trainer))
            self.gate.__enter__()
            _open.add(self)
            self._unguard = _closing_on_error(trainer, "training_step", self.close)
        else:
            assert self.gate is not None
            self.gate.follow(trainer.model_wrapped)
        if state.global_step:
            self._resume(args, state)
        self._restore = _uncompiled_loss(trainer.model_wrapped)
        self._before = copy.copy(self.gate.stats)

    def _at(self, _step: int) -> float:
        return self._now

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the schedule."""
        if callable(self._rate):
            self._now = self._rate(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Put the gate's metrics into the Trainer's logs; before the callbacks that send them on."""
        if self.gate is None or logs is None or "loss" not in logs:
            return
        found = self.gate.stats.metrics(self._before)
        self._before = copy.copy(self.gate.stats)
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the gate's state into the checkpoint."""
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        if self.gate is not None and os.path.isdir(folder):
            torch.save(self.gate.state_dict(), _file(folder, args))

    def _resume(self, args: Any, state: Any) -> None:
        assert self.gate is not None
        file = _file(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"), args)
        if os.path.isfile(file):
            self.gate.load_state_dict(torch.load(file, weights_only=True))
        elif not self.gate.stats.steps:
            warnings.warn(
                f"KondoCallback: there is no gate's state in {file}, so history, counters and random numbers start "
                "afresh. If it is elsewhere: gate.load_state_dict(torch.load(path)) before train().",
                kondo.KondoWarning,
                stacklevel=2,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take an own gate off."""
        if self._own and self.gate is not None:
            gate, self.gate = self.gate, None
            gate.__exit__(None, None, None)
        self._restore()
        self._unguard()


def adopt(gate: kondo.Gated) -> Callable[[], None]:
    """Give the trainers of the gate's model a callback that reports for it; returns what takes it back.

    Those that are there, and those that are made while the context is open.
    """
    newcomers = _Newcomers(gate)
    for trainer in () if accelerate_syncs() is None else _trainers(gate.model):  # each has made an accelerator
        newcomers.adopt(trainer)
    every: list[Any] = DEFAULT_CALLBACKS
    every.append(newcomers)

    def close() -> None:
        every[:] = [each for each in every if each is not newcomers]
        newcomers.close()

    return close


class _Newcomers(TrainerCallback):
    """Stands among the callbacks that every Trainer starts with, while a context is open, and has its gate adopted."""

    def __init__(self, gate: kondo.Gated):
        self._gate = gate
        self._met: list[Any] = []
        self._added: list[tuple[Any, KondoCallback]] = []

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (trainer := _calling_trainer(self)) is not None:
            self._met.append(trainer)
            self.adopt(trainer)

    def adopt(self, trainer: Any) -> None:
        """Have a trainer report for the gate, if it is its model's."""
        if self._gate.model not in (trainer.model, trainer.model_wrapped):
            return
        self._gate.host_defaults(**_defaults(trainer))
        if not any(isinstance(callback, KondoCallback) for callback in trainer.callback_handler.callbacks):
            callback = KondoCallback(self._gate)
            trainer.add_callback(callback)
            self._added.append((trainer, callback))

    def close(self) -> None:
        """Leave no trace in the trainers."""
        for trainer, callback in self._added:
            callback.close()
            trainer.remove_callback(callback)
        for trainer in self._met:
            trainer.remove_callback(self)
        self._added, self._met = [], []


def _nothing() -> None:
    pass


def _calling_trainer(callback: TrainerCallback) -> Any:
    """The Trainer that calls a callback now. It tells callbacks nothing of itself, but stands in the frames above."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back
    return None


def _closing_on_error(trainer: Any, name: str, close: Callable[[], None]) -> Callable[[], None]:
    """Have an error in a method of a trainer take the gate off, of which no event tells; returns what undoes that."""
    own = getattr(trainer, name)

    @functools.wraps(own)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return own(*args, **kwargs)
        except BaseException:
            close()
            raise

    def undo() -> None:
        if vars(trainer).get(name) is guarded:
            if own == getattr(type(trainer), name).__get__(trainer):
                delattr(trainer, name)
            else:
                setattr(trainer, name, own)

    setattr(trainer, name, guarded)
    return undo


def _uncompiled_loss(model: nn.Module) -> Callable[[], None]:
    """Keep a model's own loss out of the compiled graph, where it could not be seen; returns what puts it back."""
    if not any(isinstance(module, torch._dynamo.OptimizedModule) for module in model.modules()):
        return _nothing
    owner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if owner is None:
        return _nothing
    before = owner.__dict__.get("_loss_function")
    owner.loss_function = torch.compiler.disable(owner.loss_function)

    def restore() -> None:
        if before is None:
            owner.__dict__.pop("_loss_function", None)
        else:
            owner.loss_function = before

    return restore


def _defaults(trainer: Any) -> dict[str, Any]:
    """What forms a population in this trainer."""
    from kondo_hooks.integrations import trl

    return {"window": "auto", "pairs": trl.makes_pairs(trainer)}


def _trainers(model: nn.Module) -> list[Any]:
    """The Trainers that hold a model: transformers keeps no list of them, and a model does not know its own."""
    found: list[Any] = []
    for holder in gc.get_referrers(model):
        if type(holder) is dict and "callback_handler" in holder:  # an object's attributes, where they are a dictionary
            found += [owner for owner in gc.get_referrers(holder) if getattr(owner, "__dict__", None) is holder]
        else:
            found.append(holder)
    return [owner for owner in found if isinstance(owner, Trainer) and "callback_handler" in vars(owner)]


def _first(trainer: Any, callback: KondoCallback) -> None:
    """Have ``callback`` see the logs before those that send them on; an order that nothing public sets."""
    callbacks = trainer.callback_handler.callbacks
    callbacks.remove(callback)
    callbacks.insert(0, callback)


def _file(folder: str, args: Any) -> str:
    return os.path.join(folder, f"kondo_gate_{args.process_index}.pt")
