"""``gated``: the one line. All of its arguments are looked at here."""

import math
from typing import Any, Literal

from torch import nn

from kondo_hooks import private
from kondo_hooks.core.attach import Method
from kondo_hooks.core.screen import Name, Reading
from kondo_hooks.core.sequences import Named as Counted
from kondo_hooks.core.texts import Named
from kondo_hooks.errors import WarnOnce
from kondo_hooks.handle import Gated
from kondo_hooks.ranks.engines import find_engine
from kondo_hooks.routes.window import Size, Spread
from kondo_hooks.rules.config import (
    Normalize,
    Rate,
    Reduction,
    RuleFunction,
    SelectionConfig,
    Unit,
    Weight,
    additive,
    is_number,
)
from kondo_hooks.same.rounding import Checks

DEFAULT_RATE = 0.03
_warn = WarnOnce()


def gated(
    model: nn.Module,
    rate: Rate | None = None,
    *,
    price: float | None = None,
    noise: float | None = None,
    rule: RuleFunction | None = None,
    priority: str | additive | RuleFunction = "delight",
    groups: int | None = None,
    temperature: float = 0.1,
    hard: bool = True,
    deterministic: bool = True,
    unit: Unit = "sample",
    reduction: Reduction = "sum",
    history: int = 0,
    weight: Weight = "pg",
    unbiased: bool = False,
    normalize: Normalize = "batch",
    warmup_steps: int = 0,
    enabled: bool = True,
    seed: int = 0,
    method: Method | None = None,
    logp: Name | None = None,
    logits: Name | None = None,
    probs: Name | None = None,
    batch_dim: int = 0,
    segments: Named = None,
    sequences: Counted = None,
    pairs: bool | None = None,
    shared_loss: Literal["refuse", "kept"] = "refuse",
    window: Size | None = None,
    scope: Literal["local", "global"] = "local",
    balance: bool = False,
    micro_batch_size: int | None = None,
    tensor_parallel_group: Any = None,
    tolerance: float | None = None,
    audit: int | None = None,
) -> Gated:
    """Skip most backward passes of ``model`` in whatever training loop runs inside the context.

        with kondo.gated(model, rate=0.03) as gate:
            for batch in loader:
                loss = policy_loss(model(batch.obs), batch)
                loss.backward()
                optimizer.step(); optimizer.zero_grad()

    Each call of the model runs without a graph. The loss code runs as it is. A rule gives every sample a factor, and
    the kept samples alone run again, with a graph. The gradient is exactly that of the same loss with each sample's
    terms multiplied by its factor, zero where it was dropped, and with the user's own denominators. A dropped sample
    loses all of its terms, its value loss and entropy bonus too.

    Args:
        model: any ``nn.Module``; give the object that the loop calls.
        rate: fraction of samples to keep, in (0, 1], or a function of the step; 1.0 passes straight through.
            "lossless" drops exactly the samples without a gradient; "auto" draws as ``noise`` does, as many as pay.
            0.03 if nothing else says how many are kept.
        price: keep samples of more delight than this, in advantage x nats, instead of a rate.
        noise: instead of a rate, draw the fewest samples that add no more noise than this, and weigh them. The
            gradient stays right on average.
        rule: instead of a rate, a function of :class:`Rows` that gives each sample a factor, 0 to drop it.
        priority, groups, temperature, hard, deterministic, unit, reduction, history, weight, unbiased, normalize, seed:
            see :class:`SelectionConfig`. docs/choose.md says which rule is for what.
        warmup_steps: backwards that pass straight through at first.
        enabled: False, or ``KONDO_DISABLE=1`` in the environment, makes the context do nothing.
        method: gate this method instead of the call, e.g. "get_action_and_value"; or an attribute of another object
            that calls the model, ``(actor, "compute_log_probs")``: what goes from rows to rows there is gated as one,
            and what it takes on the way (logits, a head in chunks) is never held.
        logp, logits, probs: the output that holds the policy, where the gate cannot tell: a field name, an
            index, or a function of the model's output. At most one.
        batch_dim: axis of the inputs and outputs that holds the samples.
        segments: for rows that hold many texts. The texts then are the samples. It names the input that tells where
            they begin, or is a function of the call's arguments that gives their lengths. By default the input is
            known by its name (``position_ids`` that start again, ``cu_seqlens``, ``seq_lens``, ``seq_idx``, a block
            mask). False: rows are the samples.
        sequences: for rows that are the steps of sequences, (n * T, F) with a recurrent state of (layers, n, H). The
            sequences then are the samples. It is a function of the call's arguments that gives n. By default the state
            tells. False: rows are the samples.
        pairs: row i and the row half a batch below it are one sample, kept or dropped as one: chosen and rejected
            answers, as DPO concatenates them. By default so in TRL's ``DPOTrainer``, ``CPOTrainer`` and
            ``ORPOTrainer``, and nowhere else.
        shared_loss: what to do with a term of a loss computed inside the model that is no sum over rows (a router's
            balancing loss): "refuse" it, or take it on the "kept" rows alone, which is another term.
        window: how many backwards form one population, whose kept rows are replayed together at the end of the last:
            3% of 8 rows is no row, 3% of 8 backwards of 32 is 8. "auto" takes the host's gradient accumulation
            (accelerate, DeepSpeed, ``no_sync``), and is the default inside of a transformers Trainer; elsewhere it is
            1. "step" is for micro-batches whose number nobody knows: they wait until the gradient of a parameter is
            first read (clipping, unscaling), the optimizer steps, or the context ends. What has not been decided when
            the optimizer steps is an error elsewhere.
        scope: "local", each rank chooses among its own rows, or "global", among the rows of all ranks as one batch.
        balance: with ``scope="global"``, move kept rows between ranks so that each replays as many, within one.
        micro_batch_size: most rows in one pass of the replay; by default all kept rows are one pass.
        tensor_parallel_group: process group of the ranks that see the same rows as this one; they share its decisions.
        tolerance: how far a kept row's output may differ between screen and replay, relative to the largest in its
            column; by default it goes by the type (1e-10 in float64, 1e-4 in float32, 8e-2 in bfloat16), and a control
            run decides beyond it whether that is rounding.
        audit: how many decisions apart to look for rows that are tied where the outputs do not show it. Some rows are
            run alone and in the company of others, and the parameters' gradients are compared. None: at the first
            decision of each structure of calls alone. 0: never.

    Raises:
        ValueError, TypeError: on an argument that cannot be right, naming it.

    Source: Osband 2026, "Does This Gradient Spark Joy?", arXiv 2603.20526.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> with kondo.gated(model, noise=0.5) as gate:
        ...     loss(model(obs)).backward()
        >>> gate.stats.rows, gate.stats.kept < 20, model.weight.grad.shape
        (20, True, torch.Size([4, 8]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if rate is None and price is None and noise is None and rule is None:
        rate = DEFAULT_RATE
    config = SelectionConfig(
        rate=rate,
        price=price,
        noise=noise,
        rule=rule,
        priority=priority,
        groups=groups,
        temperature=temperature,
        hard=hard,
        deterministic=deterministic,
        unit=unit,
        reduction=reduction,
        history=history,
        weight=weight,
        unbiased=unbiased,
        normalize=normalize,
        seed=seed,
    )
    named = [(kind, name) for kind, name in (("logp", logp), ("logits", logits), ("probs", probs)) if name is not None]
    if len(named) > 1:
        raise ValueError("give at most one of logp, logits and probs")
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(f"warmup_steps must be a number of backwards >= 0, got {warmup_steps!r}")
    _check_method(model, method)
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise ValueError(f"batch_dim must be an axis >= 0, got {batch_dim!r}")
    if pairs is not None and not isinstance(pairs, bool):
        raise ValueError(f"pairs must be True or False, got {pairs!r}")
    if not (segments is None or segments is False or isinstance(segments, str) or callable(segments)):
        raise ValueError(f"segments must be the name of an input, a function of the call, or False, got {segments!r}")
    if not (sequences is None or sequences is False or callable(sequences)):
        raise ValueError(
            f"sequences must be a function of the call that gives their number, or False, got {sequences!r}"
        )
    if sequences and (pairs or batch_dim or segments):
        raise ValueError("sequences are of rows on axis 0, one a sample: leave pairs, segments and batch_dim away")
    if segments and (pairs or batch_dim):
        raise ValueError("segments are of rows on axis 0, one a sample: leave pairs and batch_dim away")
    if pairs and config.tokens:
        raise ValueError("pairs are kept or dropped as one: they need unit='sample'")
    if unit == "prefix" and balance:
        raise ValueError("balance=True moves whole rows between ranks, and unit='prefix' cuts them: leave one away")
    if shared_loss not in ("refuse", "kept"):
        raise ValueError(f"shared_loss must be 'refuse' or 'kept', got {shared_loss!r}")
    if shared_loss == "kept" and balance:
        raise ValueError("shared_loss='kept' takes a term on each rank's own kept rows, which balance=True moves away")
    if tolerance is not None and not (is_number(tolerance) and 0 <= tolerance < math.inf):
        raise ValueError(f"tolerance must be a relative difference >= 0, got {tolerance!r}")
    if audit is not None and (isinstance(audit, bool) or not isinstance(audit, int) or audit < 0):
        raise ValueError(f"audit must be a number of decisions >= 0, got {audit!r}")
    spread = Spread(1 if window is None else window, scope, balance, micro_batch_size)
    if (untested := private.untested_version()) is not None:
        _warn("version", untested)
    return Gated(
        model,
        config,
        find_engine=lambda found: find_engine(found, tensor_parallel_group, scope == "global", balance),
        spread=spread,
        checks=Checks(tolerance),
        audit=audit,
        enabled=enabled,
        method=method,
        reading=Reading(
            named[0] if named else None,
            batch_dim,
            bool(pairs),
            shared_loss == "kept",
            warmup_steps,
            segments,
            False if pairs or segments else sequences,
        ),
        unsaid={name for name, value in (("pairs", pairs), ("window", window)) if value is None},
    )


def _check_method(model: nn.Module, method: Any) -> None:
    if method is None:
        return
    if isinstance(method, tuple):
        owner, name = method if len(method) == 2 else (None, None)
        if not isinstance(name, str) or not callable(getattr(owner, name, None)):
            raise ValueError(f"method={method!r}: give an object and the name of something on it that is called")
        if not isinstance(getattr(owner, "__dict__", None), dict):
            raise ValueError(
                f"method=: {name} of {owner!r} cannot be replaced (a class, or an object with slots): give the object "
                "whose attribute the loop calls"
            )
    elif not (isinstance(method, str) and callable(getattr(model, method, None))):
        raise ValueError(f"method={method!r} is no method of {type(model).__name__}")
