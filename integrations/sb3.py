"""stable-baselines3 and sb3-contrib: a callback that gates ``train()``, from the rollout buffer where its rule can."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn

import kondo_hooks as kondo
from kondo_hooks.integrations.attributes import put
from kondo_hooks.rules.config import Rate


class KondoCallback(BaseCallback):  # type: ignore[misc]
    """Gates the policy of PPO, A2C, MaskablePPO or RecurrentPPO while the algorithm trains.

        model.learn(100_000, callback=KondoCallback(noise=0.5))

    The rollout buffer holds the log-probs, values and advantages of its rows. Each batch is decided on from these, so
    no batch is screened in any epoch: the policy runs the kept rows alone. For dropped rows the loss is given the old
    log-probs and values, so in what the algorithm logs they count as rows that have not moved.
    Rules that need the loss's own gradient (``rate="lossless"``, ``rate="auto"``, single tokens) screen each batch
    instead. So does an algorithm with a ``target_kl``, which has to see how far all rows have moved.

    The logger gets ``kondo/rate``, ``kondo/kept``, ``kondo/skipped`` and so on after each ``train()``. Rollouts and
    evaluations run ungated, and after an error in training nothing is left on the algorithm.

    Args:
        rate: as of :func:`kondo_hooks.gated`.
        screen_first: False screens each batch whatever the rule.
        verbose: as of every callback.
        options: other keywords of :func:`kondo_hooks.gated`.

    Attributes:
        gate: of the policy, once training has started.

    Raises:
        ValueError, TypeError: here, on an option that cannot be right; when the training starts, on an algorithm
            without a policy gradient.
    """

    def __init__(self, rate: Rate | None = None, *, screen_first: bool = True, verbose: int = 0, **options: Any):
        super().__init__(verbose)
        self.gate: Any = None
        self._options = {"rate": rate, **options}
        sees_gradient = rate in ("lossless", "auto") or options.get("unit", "sample") != "sample"
        self._from_buffer = screen_first and not sees_gradient
        self._by_norm = "noise" in options or options.get("priority") == "norm"
        self._dropped: tuple[Tensor, Any] | None = None
        kondo.gated(nn.Identity(), **self._options).discard()  # bad options fail here

    def _on_training_start(self) -> None:
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise ValueError(
                f"KondoCallback: {type(self.model).__name__} has no policy gradient over a rollout. Gate the critic "
                "alone, by a rule that needs none: with kondo.gated(model.critic, noise=0.5): model.learn(...); DQN's "
                "is model.q_net"
            )
        if self.gate is None or self.gate.model is not self.model.policy:
            self.gate = kondo.gated(self.model.policy, method=(self, "evaluate_actions"), **self._options)

    def _on_rollout_end(self) -> None:
        self.model.__dict__["train"] = self._train  # which is what comes next

    def _on_step(self) -> bool:
        return True

    def _train(self, *args: Any, **kwargs: Any) -> None:
        model: Any = self.model
        before = copy.copy(self.gate.stats)
        del model.train
        with contextlib.ExitStack() as stack:
            put(stack, model.policy, "evaluate_actions", self._evaluate)
            if self._from_buffer and self.gate.enabled and getattr(model, "target_kl", None) is None:
                put(stack, model.rollout_buffer, "get", self._decided)
            stack.callback(lambda: setattr(self, "_dropped", None))
            with self.gate:
                model.train(*args, **kwargs)
        for name, value in self.gate.stats.metrics(before).items():
            self.logger.record(name, value)

    def evaluate_actions(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's own method. The gate stands in front of it; the algorithm calls :meth:`_evaluate`."""
        policy: Any = self.model.policy
        return type(policy).evaluate_actions(policy, *args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        values, log_prob, entropy = self.evaluate_actions(*args, **kwargs)
        if self._dropped is not None:
            (dropped, batch), self._dropped = self._dropped, None
            values = torch.where(dropped.view(-1, 1), batch.old_values.view(-1, 1).to(values.dtype), values)
            log_prob = torch.where(dropped, batch.old_log_prob.to(log_prob.dtype), log_prob)
        return values, log_prob, entropy

    def _decided(self, batch_size: int | None = None) -> Iterator[Any]:
        """The buffer's batches, each decided on before it is taken."""
        buffer: Any = self.model.rollout_buffer
        for batch in type(buffer).get(buffer, batch_size):
            states = getattr(batch, "lstm_states", None)
            rows = len(batch.advantages) if states is None else states.pi[0].shape[1]  # sequences are whole
            mask = batch.mask > 0 if states is not None else torch.ones_like(batch.advantages, dtype=torch.bool)
            decision = self._decide(batch, mask, rows)
            dropped = torch.ones(rows, dtype=torch.bool, device=mask.device)
            dropped[decision.kept] = False
            self._dropped = dropped.repeat_interleave(len(mask) // rows), batch
            yield batch

    def _decide(self, batch: Any, mask: Tensor, rows: int) -> Any:
        model: Any = self.model
        advantages = batch.advantages
        if model.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages[mask].mean()) / (advantages[mask].std() + 1e-8)
        if not self._by_norm:
            given = {"logp": batch.old_log_prob, "advantages": advantages, "mask": mask}
            return self.gate.preselect(**{name: tensor.view(rows, -1) for name, tensor in given.items()})
        # As a screen would find them before the first step: policy, value and entropy count by their shares.
        each = [advantages * mask, (batch.returns - batch.old_values) * mask]
        each += [mask.to(advantages.dtype)] * bool(model.ent_coef)
        squares = torch.stack([term.view(rows, -1).square().sum(1) for term in each])
        return self.gate.preselect(norm=(squares / squares.sum(1, keepdim=True).clamp_min(1e-30)).sum(0).sqrt())
