"""TRL: screen-first for ``GRPOTrainer`` and ``RLOOTrainer``. The one line around ``train()`` needs nothing of this.

The seams: ``_generate_and_score_completions`` returns the generation batch, whose tensors TRL shuffles and splits by
row; ``compute_loss`` gets a micro-batch; ``_get_per_token_logps_and_entropies`` is where the loss calls the model.
"""

from typing import Any

import torch
from torch import Tensor

from kondo_hooks.integrations.transformers import KondoCallback

_OF_PAIRS = ("DPOTrainer", "CPOTrainer", "ORPOTrainer")
_IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes")


class KondoMixin:
    """Forwards only the kept rows: ``class MyTrainer(KondoMixin, GRPOTrainer)``, then ``MyTrainer(..., kondo={...})``.

    The gate chooses once for every generation batch, from the advantages and the old log-probs: TRL's own
    (``num_iterations > 1``, or more steps a generation than are accumulated), the sampler's (vLLM), else those of one
    pass without a graph. Each micro-batch then runs its kept rows alone. TRL's loss code sees tensors
    of full size, so every loss type keeps its own denominators, and its collectives run once a rank: dropped rows hold
    their old log-probs, so ratios, clipping and KL are logged as before this update. Their entropy is that of the pass
    without a graph, or else the mean of the kept ones.

    A dropped row loses its KL and entropy terms, too. Args, beside those of the trainer:
        kondo: keywords of :func:`kondo_hooks.gated`; ``rate`` may be a function of the ``TrainerState``.

    Raises:
        ValueError: with images, whose tensors do not keep a sample a row, and with ``top_entropy_quantile`` below 1,
            which compares the entropies of rows that were not run: use the one line there.
    """

    def __init__(self, *args: Any, kondo: dict[str, Any] | None = None, **kwargs: Any):
        options = dict(kondo or {})
        if options.get("unit", "sample") != "sample":
            raise ValueError("KondoMixin: kondo['unit'] must be 'sample': whole answers are forwarded or not")
        self.kondo = KondoCallback(**options)
        super().__init__(*args, **kwargs)
        if getattr(self, "top_entropy_quantile", 1.0) < 1.0:
            raise ValueError(
                "KondoMixin: top_entropy_quantile < 1 needs the entropies of all rows; use the one line instead: "
                "with kondo.gated(trainer.model, rate=...): trainer.train()"
            )
        self._kondo_inputs: dict[str, Any] | None = None
        self.add_callback(self.kondo)  # type: ignore[attr-defined]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        gate = self.kondo.gate
        if gate is None or not self.model.training:  # type: ignore[attr-defined]
            return output
        if any(name in output for name in _IMAGES):
            raise ValueError(
                "KondoMixin: images do not keep a sample a row, so kept rows cannot be taken out of them; use the one "
                "line instead: with kondo.gated(trainer.model, rate=...): trainer.train()"
            )
        mask = output["completion_mask"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        logps, entropies = self._kondo_logps(output, mask)
        decision = gate.select(logp=logps, advantages=output["advantages"], mask=mask)
        output["kondo_factors"] = decision.factors().to(logps)
        output["kondo_logps"] = logps
        if entropies is not None:
            output["kondo_entropies"] = entropies
        return output

    def _kondo_logps(self, output: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, T) log-probs of the answers before this update, and entropies if they were computed for it."""
        known = output.get("old_per_token_logps", output.get("sampling_per_token_logps"))
        if known is not None:
            return known.nan_to_num(0.0), None  # NaN where the sampler could not score a token
        if "old_logps" in output:  # RLOO keeps the sum of each row
            each = output["old_logps"] / mask.sum(1).clamp(min=1)
            return each.unsqueeze(1) * mask, None
        with torch.no_grad():
            logps, entropies, *_ = self._get_per_token_logps_and_entropies(
                self.model,  # type: ignore[attr-defined]
                torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
                output["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,  # type: ignore[attr-defined]
                compute_entropy=True,
                token_type_ids=output.get("token_type_ids"),
            )
        return logps, entropies

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's own, on the kept rows where the gate has chosen."""
        self._kondo_inputs = inputs if "kondo_factors" in inputs else None
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._kondo_inputs = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        inputs, gate = self._kondo_inputs, self.kondo.gate
        if inputs is None or gate is None or not torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        factors = inputs["kondo_factors"]
        gate.preselect(kept=factors)
        # With a router's loss behind them, from TRL 1.0 on.
        logps, entropies, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        dropped = (factors == 0).unsqueeze(1)
        logps = torch.where(dropped, inputs["kondo_logps"].to(logps.dtype), logps)
        if entropies is not None:
            old = inputs.get("kondo_entropies")
            if old is None:
                kept = inputs["completion_mask"] * ~dropped
                old = ((entropies * kept).sum() / kept.sum().clamp(min=1)).detach().expand_as(entropies)
            entropies = torch.where(dropped, old.to(entropies.dtype), entropies)
        return logps, entropies, *others


def makes_pairs(trainer: Any) -> bool:
    """Whether a trainer concatenates chosen and rejected answers to one batch, so that row i and i + B/2 are a pair."""
    return any(kind.__name__ in _OF_PAIRS for kind in type(trainer).__mro__)
