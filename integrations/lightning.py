"""Lightning's ``Trainer``: a callback that gates the module that ``training_step`` calls; metrics, schedules, state.

``Trainer(callbacks=[KondoCallback(rate=0.1)])`` needs no context, on one rank or with DDP on several. Lightning's
Fabric needs no callback: gate what ``fabric.setup`` returned.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import kondo_hooks as kondo

Rate = float | Literal["lossless", "auto"] | Callable[[Trainer], float]


class KondoCallback(Callback):
    """Gates a LightningModule, or one of its submodules, while ``trainer.fit`` trains it.

    Every decision logs ``kondo/rate``, ``kondo/kept``, ``kondo/skipped``, ``kondo/delight_kept``,
    ``kondo/delight_dropped`` and ``kondo/price`` as metrics of its step, for the loggers, ``trainer.logged_metrics``
    and ``trainer.callback_metrics``; with several callbacks the names are ``kondo/<module>/rate`` and so on.
    Checkpoints hold the gate's state, and a run that resumes continues with it. Validation, testing and prediction
    run ungated.

    With automatic optimization the batches of ``accumulate_grad_batches`` are one population; what an accumulation
    that ends early has left is decided before the optimizer steps. With manual optimization every
    ``self.manual_backward`` is one, or as many as ``window`` says; then a step in between is an error.

    Args:
        module: dotted name of the submodule that ``training_step`` calls: "net" where it calls ``self.net(x)``.
            None gates the LightningModule itself, for a ``training_step`` that calls ``self(x)``.
        rate: as of :func:`kondo_hooks.gated`, or a function of the ``Trainer`` (``trainer.global_step``,
            ``trainer.current_epoch``), asked at the start of every training batch.
        options: other keywords of :func:`kondo_hooks.gated`; ``window="auto"`` is the default described above.

    Attributes:
        gate: the open gate while the trainer trains, else None.

    Raises:
        ValueError, TypeError: here, on an option that cannot be right; when the fit starts, on a module or a method
            that is not there, and where the strategy wraps the module in something else than DDP.
    """

    def __init__(self, module: str | None = None, *, rate: Rate | None = None, **options: Any):
        if module is not None and not isinstance(module, str):
            raise TypeError(f"KondoCallback: module is the name of a submodule, as a str; got {type(module).__name__}")
        self.module = module
        self.gate: kondo.Gated | None = None
        self._rate = rate
        self._options = {k: v for k, v in options.items() if not (k == "window" and v == "auto")}
        self._now = 1.0
        self._window = 1
        self._batches = 0
        self._state: dict[str, Any] = {}
        self._before = kondo.Stats()
        self._used = False
        # Bad options fail here; a method is looked for when there is a module to look at.
        early = {name: value for name, value in self._options.items() if name != "method"}
        self._enabled = kondo.gated(nn.Identity(), rate=None if callable(rate) else rate, **early).discard().enabled

    @property
    def state_key(self) -> str:
        """Where a checkpoint has this callback's state: there may be one callback for each of several submodules."""
        return self._generate_state_key(module=self.module)

    # The gate, and where it goes on and off.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the module, which ``configure_model`` may have made only now, and at what is around it."""
        wrapped = trainer.model is not pl_module
        if self._enabled and wrapped and not isinstance(trainer.model, DistributedDataParallel):
            raise ValueError(
                f"KondoCallback: the strategy has put a {type(trainer.model).__name__} around the LightningModule. "
                "Lightning runs training_step inside of its forward, where parameters are gathered for that pass "
                "alone, so the kept rows could not run again. Train with strategy='ddp' or 'auto', or use Lightning's "
                "Fabric and gate what fabric.setup returned: with kondo.gated(model, rate=...): ..."
            )
        self._make(trainer, pl_module).discard()

    def _make(self, trainer: Trainer, pl_module: LightningModule) -> kondo.Gated:
        try:
            found = pl_module if self.module is None else pl_module.get_submodule(self.module)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"KondoCallback: module={self.module!r} names no submodule of {type(pl_module).__name__} ({error}); it "
                f"has {names or 'none'}"
            ) from error
        rate: Any = self._at if callable(self._rate) else self._rate
        if not isinstance(trainer.model, DistributedDataParallel):
            return kondo.gated(found, rate=rate, **self._options)
        # Within DDP's forward: what is called is the module, and DDP's are the parameters and the ranks.
        called = self._options.get("method") or "forward"
        return kondo.gated(trainer.model, rate=rate, **{**self._options, "method": (found, called)})

    def _at(self, _step: int) -> float:
        return self._now

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the gate on, with the state of the checkpoint that the fit resumes from."""
        self._close(RuntimeError)
        gate = self._make(trainer, pl_module)
        if self._state:
            gate.load_state_dict(self._state)
        self._window = 1
        self._before = copy.copy(gate.stats)
        self._used = False
        gate.__enter__()
        self.gate = gate

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the gate off."""
        self._flush()
        self._close(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the gate off; what waited for a decision is dropped."""
        self._close(type(exception))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the gate off where no other event did."""
        self._close(RuntimeError)

    def _close(self, kind: type[BaseException] | None) -> None:
        if self.gate is not None:
            gate, self.gate = self.gate, None
            self._state = gate.state_dict()
            gate.__exit__(kind, None, None)

    # What forms a population.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask the schedule, and follow an accumulation that changed with the epoch."""
        self._batches = batch_idx + 1
        if callable(self._rate):
            self._now = self._rate(trainer)
        if self.gate is not None and self._window != trainer.accumulate_grad_batches:
            self._window = trainer.accumulate_grad_batches  # 1 with manual optimization, Lightning sees to that
            self.gate.host_defaults(window=self._window, pairs=False)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide at the last batch of an epoch, where an accumulation may be incomplete.

        A gradient scaler unscales before ``on_before_optimizer_step``, so that one would be too late.
        """
        last = trainer.is_last_batch or self._batches >= trainer.num_training_batches
        if last and pl_module.automatic_optimization:
            self._flush()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let no optimizer step without the gradients of what still waits."""
        if self.gate is None or not self.gate.enabled:
            return
        if not pl_module.automatic_optimization:
            mine = {id(p) for p in self.gate.model.parameters()}
            if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
                return  # another module's: a critic's, a discriminator's
            if waited := self._flush():
                raise RuntimeError(
                    f"KondoCallback: optimizer.step() while {waited} calls of window={self._options.get('window')!r} "
                    "waited for their decision. Let window divide the accumulation, or call callback.gate.flush() "
                    "before clipping and stepping."
                )
        self._flush()
        if not self._used and self.gate.stats.steps == self._before.steps:
            self._warn_unused(pl_module)
        self._used = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide on what an epoch leaves that was ended within an accumulation."""
        self._flush()

    def _flush(self) -> int:
        return 0 if self.gate is None else self.gate.flush()

    def _warn_unused(self, pl_module: LightningModule) -> None:
        names = ", ".join(repr(name) for name, _ in pl_module.named_children())
        called = "self" if self.module is None else f"self.{self.module}"
        warnings.warn(
            f"KondoCallback: the optimizer steps, but {called}(...) was not called with a gradient, so nothing was "
            f"gated. If training_step calls a submodule, name it: module=..., one of {names}. If it calls a method, "
            "name that: method=...",
            kondo.KondoWarning,
            stacklevel=2,
        )

    # Metrics.

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what has been decided since the last decision that was logged."""
        if self.gate is None or trainer.barebones:
            return
        stats = self.gate.stats
        if stats.steps == self._before.steps:
            return  # a window is being collected; Lightning keeps the values of the last one
        several = sum(isinstance(callback, KondoCallback) for callback in trainer.callbacks) > 1
        prefix = f"kondo/{self.module or 'self'}" if several else "kondo"
        pl_module.log_dict(stats.metrics(self._before, prefix), on_step=True, on_epoch=False, batch_size=1)
        self._before, self._used = copy.copy(stats), True

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The gate's history, generator and counters; also after the fit."""
        return self._state if self.gate is None else self.gate.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with them: now, or when the training starts."""
        self._state = state_dict
        if self.gate is not None:
            self.gate.load_state_dict(state_dict)
            self._before = copy.copy(self.gate.stats)
