"""The grammar of the programs: a :class:`Program` is a few plain values. Sizes coincide on purpose."""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Term:
    """One term of a loss: ``coef * reduction(kind)``."""

    kind: str = "pg"
    reduction: str = "mean"
    coef: float = 1.0


@dataclass(frozen=True)
class Program:
    """A model, a loss, and how they are used; the defaults are the plainest program there is.

    Attributes:
        inputs: what the model gets: "vector" (B, H), "sequence" (B, T, H), "ids" (B, T) or "image" (B, 1, 5, 5).
        passing: "positional", "keyword", "dict" or "object".
        extras: shapes of inputs that the model does not use.
        head: what the model returns of its policy.
        layout: where a sequence's rows and positions stand in the outputs.
        arrangement: how the loss lays them out: "BT", "TB" or "flat".
        inner: the loss is computed in the model, which returns it.
        combine: how the terms become a loss.
        route: "hook", "screen" or "select".
        backward: "backward", "grad", "twice", "separate", "inputs".
    """

    seed: int = 0
    batch: int = 4
    length: int = 3
    hidden: int = 4
    actions: int = 3
    dtype: str = "float64"
    inputs: str = "vector"
    passing: str = "positional"
    numpy: bool = False
    extras: tuple[str, ...] = ()
    extras_first: bool = False
    time_first: bool = False
    blocks: tuple[str, ...] = ()
    head: str = "logits"
    value: bool = False
    features: bool = False
    layout: str = "plain"
    container: str = "bare"
    pick: str = "gather"
    arrangement: str = "BT"
    shift: bool = False
    mark: bool = False
    inner: bool = False
    terms: tuple[Term, ...] = (Term(),)
    combine: str = "plus"
    scale: float = 1.0
    options: tuple[tuple[str, Any], ...] = (("rate", 0.5),)
    route: str = "hook"
    backward: str = "backward"
    calls: int = 1
    ragged: bool = False
    steps: int = 1
    force: bool = False
    autocast: bool = False
    input_grad: bool = False

    @property
    def sequence(self) -> bool:
        """Whether there are positions where the policy's head stands."""
        return self.inputs in ("sequence", "ids") and not any(b in POOLS for b in self.blocks)

    @property
    def tokens(self) -> bool:
        """Whether the gate chooses positions one by one."""
        return self.option("unit") in ("token", "prefix")

    @property
    def chooses_parts(self) -> bool:
        """Whether the gate may choose parts of an action one by one."""
        return self.tokens and self.head in ("bits", "bernoulli", "normal", "mean_std")

    def option(self, name: str, default: Any = None) -> Any:
        return dict(self.options).get(name, default)

    def __repr__(self) -> str:
        default = Program()
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(default, f.name)]
        return f"Program({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


POOLS = ("mean_pool", "last_pool", "masked_pool", "max_pool", "gru_last")
_TIMED = (
    "conv",
    "attention",
    "attention_causal",
    "attention_TT",
    "attention_BT",
    "attention_B1TT",
    "attention_dropout",
)
_TIMED += ("torch_attention", "transformer", "gru", "lstm", "gru_state", "lstm_state", "position", *POOLS)
_BATCH_FIRST = (*_TIMED[: _TIMED.index("gru")], "masked_pool", "group_norm")
_ROWWISE = ("linear", "mlp", "residual", "layer_norm", "rms_norm", "group_norm", "gate", "frozen", "weight_tied")
_RANDOM = ("dropout", "dropout_fn", "noise", "row_noise", "rrelu", "checkpoint_dropout", "attention_dropout")
_STATE = ("batch_norm", "batch_norm_eval", "counter", "running_mean", "left_behind")
_CHECKPOINT = ("checkpoint", "checkpoint_reentrant", "checkpoint_dropout")
COUPLED = ("center", "batch_size", "zero_center")
DISTRIBUTIONS = ("categorical", "normal", "bernoulli")
SELECTED = ("logp", "nll")
_PICKS = {
    "logits": (
        "gather take_along index cross_entropy nll_loss categorical logsumexp one_hot softmax_log "
        "flipped written halves"
    ).split(),
    "log_probs": "gather take_along index nll_loss categorical one_hot flipped written".split(),
    "probs": "gather index categorical".split(),
    "mean_std": ["normal", "normal_by_hand", "independent"],
    "bits": ["bernoulli", "binary_cross_entropy"],
}
ON_LOGP = ("pg", "ppo", "grpo", "nll", "is", "kl", "ce")
NEEDS = {
    "pg": ("advantages",),
    "ppo": ("advantages", "old"),
    "grpo": ("advantages", "old", "ref"),
    "is": ("advantages", "old"),
    "kl": ("ref",),
    "value": ("returns",),
    "huber": ("returns",),
}


def numbered(seed: int, number: int) -> Program:
    """The random program of this number."""
    return draw(random.Random(f"{seed}-{number}"))


def draw(rng: random.Random) -> Program:
    """A random program."""
    choose, chance = rng.choice, lambda p: rng.random() < p
    batch = choose([2, 3, 4, 4, 5, 6, 8])
    length = batch if chance(0.35) else choose([2, 3, 4])
    inputs = choose(["vector", "sequence", "sequence", "ids", "image"])
    head = choose(
        ["logits"] * 5
        + ["log_probs", "probs", "categorical", "normal", "bernoulli", "mean_std", "bits"]
        + list(SELECTED)
    )
    names = [*_ROWWISE, *_ROWWISE, *_RANDOM, *_STATE, *_CHECKPOINT]
    names += [*_TIMED, *_TIMED] if inputs in ("sequence", "ids") else []
    blocks = [choose(names) for _ in range(choose([0, 1, 1, 2, 2, 3]))]
    if chance(0.02):
        blocks.append(choose(COUPLED))
    value = chance(0.4)
    features = chance(0.15)
    kinds = [choose(["pg", "pg", "pg", "ppo", "grpo", "nll", "is", "ce"])]
    more = ["entropy", "z", "kl", *(["value", "huber", "value"] if value else []), *(["feature"] if features else [])]
    kinds += [choose(more) for _ in range(choose([0, 0, 1, 1, 2]))]
    rng.shuffle(kinds)
    one = choose(["mean", "mean", "sum", "masked", "rows", "rowsum"])
    terms = tuple(
        Term(kind, one if chance(0.8) else choose(["mean", "sum", "masked"]), choose([1.0, 1.0, 0.5, 0.04, 2.0]))
        for kind in kinds
    )
    return normal(
        Program(
            seed=rng.randrange(1000),
            batch=batch,
            length=length,
            hidden=choose([4, 4, 6, 8, batch + batch % 2]),
            actions=batch if chance(0.2) else choose([2, 3, 4, 5]),
            dtype=choose(["float64"] * 5 + ["float32"]),
            inputs=inputs,
            passing=choose(["positional"] * 3 + ["keyword", "dict", "object"]),
            numpy=chance(0.04),
            extras=tuple(choose(["BB", "B", "TB", "TT", "BT", "T", "H", "1B"]) for _ in range(choose([0, 0, 0, 1, 2]))),
            extras_first=chance(0.3),
            time_first=chance(0.12),
            blocks=tuple(blocks),
            head=head,
            value=value,
            features=features,
            layout=choose(["plain"] * 4 + ["flat", "time_first", "time_flat", "classes"]),
            container=choose(["bare", "tuple", "list", "dict", "dataclass", "namespace", "nested", "attribute"]),
            pick=choose(_PICKS.get(head, ["gather"])),
            arrangement=choose(["BT", "BT", "flat", "TB"]),
            shift=chance(0.15),
            mark=chance(0.1),
            inner=chance(0.12),
            terms=terms,
            combine=choose(["plus", "plus", "minus", "sum", "stack", "nested", "divide", "negative", "inside"]),
            scale=choose([1.0, 1.0, 1.0, 0.25, 1024.0, 1e-3]),
            options=_draw_options(rng),
            route=choose(["hook"] * 8 + ["screen", "select"]),
            backward=choose(["backward"] * 8 + ["grad", "twice", "separate", "inputs"]),
            calls=choose([1, 1, 1, 2, 3]),
            ragged=chance(0.3),
            steps=choose([1, 1, 2, 3]),
            force=chance(0.06),
            autocast=chance(0.05),
            input_grad=chance(0.08),
        )
    )


def _draw_options(rng: random.Random) -> tuple[tuple[str, Any], ...]:
    choose, chance = rng.choice, lambda p: rng.random() < p
    options: dict[str, Any] = (
        {"price": choose([0.0, 0.3, -0.5])} if chance(0.2) else {"rate": choose([0.25, 0.5, 0.75])}
    )
    if chance(0.3):
        options["priority"] = choose(["uniform", "advantage", "abs_advantage", "surprisal", "additive"])
    if chance(0.15):
        options["unit"] = choose(["token", "prefix"])
    if chance(0.1):
        options["deterministic"] = False
        options["unbiased"] = chance(0.5)
    elif chance(0.06):
        options["hard"] = False
    if chance(0.08):
        options["weight"] = "dg"
    if chance(0.08):
        options["normalize"] = "kept"
    if chance(0.08):
        options["reduction"] = choose(["mean", "max"])
    if chance(0.06):
        options["history"] = 2
    if chance(0.2):
        options["window"] = choose([2, 3, 4])
    if chance(0.2):
        options["micro_batch_size"] = choose([1, 2, 3])
    if chance(0.05):
        options["warmup_steps"] = 1
    if chance(0.1):
        options["pairs"] = True
    if chance(0.3):
        options = {name: value for name, value in options.items() if name not in _OF_RANKS} | choose(WEIGHING)
    return tuple(options.items())


# What a rule that draws has no use for, or says itself.
_OF_RANKS = ("rate", "price", "priority", "unbiased", "deterministic", "hard", "history", "normalize")
WEIGHING: list[dict[str, Any]] = [
    {"rate": "lossless"},
    {"noise": 0.6},
    {"rate": 0.5, "priority": "norm", "unbiased": True},
    {"rate": 0.5, "priority": "norm"},
    {"rate": 0.5, "priority": "abs_advantage", "unbiased": True},
]
"""Rules that draw, or go by the norm of the gradients."""


def normal(p: Program) -> Program:
    """The nearest program that plain PyTorch runs and whose masked loss is well defined."""
    new: dict[str, Any] = {}
    options = dict(p.options)
    blocks = list(p.blocks)
    if p.inputs not in ("sequence", "ids"):
        blocks = [b for b in blocks if b not in _TIMED]
        new.update(time_first=False)
    p = dataclasses.replace(p, **new)
    if p.time_first:
        blocks = [b for b in blocks if b not in _BATCH_FIRST]
    if p.autocast:
        # No recurrence in bfloat16 on a CPU.
        blocks = [b for b in blocks if not b.startswith(("gru", "lstm"))]
    pooled = False
    kept = []
    for block in blocks:  # after a pool there are no positions
        if not (pooled and block in _TIMED):
            kept.append(block)
        pooled = pooled or block in POOLS
    blocks = kept
    if p.route != "hook":
        blocks = [
            b
            for b in blocks
            if b not in (*_RANDOM, "batch_norm", "running_mean", "left_behind", "transformer", *COUPLED)
        ]
        new.update(backward="backward" if p.backward == "inputs" else p.backward, force=False, mark=False)
        options.pop("pairs", None)
        if p.backward == "twice":
            new["backward"] = "backward"
    if p.backward in ("grad", "inputs"):
        blocks = ["checkpoint" if b == "checkpoint_reentrant" else b for b in blocks]
    new["blocks"] = tuple(blocks)
    p = dataclasses.replace(p, **new)
    new = {}
    sequence = p.sequence
    if not sequence:
        new.update(layout="plain", arrangement="BT", shift=False)
    elif p.time_first:
        new.update(layout="time_first", shift=False, arrangement="TB" if p.arrangement == "BT" else p.arrangement)
    if p.head in (*DISTRIBUTIONS, *SELECTED):
        new["layout"] = "time_first" if p.time_first and sequence else "plain"
        if p.head in DISTRIBUTIONS:
            new["arrangement"] = "TB" if p.time_first and sequence else "BT"
            new["shift"] = False
    if p.head in ("mean_std", "bits") and new.get("layout", p.layout) == "classes":
        new["layout"] = "plain"
    if (sequence and p.length < 2) or p.inner:
        new["shift"] = False
    if p.inner and p.time_first and p.head in SELECTED:
        p = dataclasses.replace(p, head="logits")
    picks = _PICKS.get(p.head, ["gather"])
    new["pick"] = p.pick if p.pick in picks else picks[0]
    p = dataclasses.replace(p, **new)
    new = {}
    if p.chooses_parts:
        new["shift"] = False
    if p.shift and not p.chooses_parts:
        new["arrangement"] = "BT"
    floats = p.inputs != "ids"
    new["numpy"] = p.numpy and p.passing != "object" and floats
    new["input_grad"] = (p.input_grad or p.backward == "inputs") and floats and not p.numpy
    if p.backward == "inputs" and not new["input_grad"]:
        new["backward"] = "backward"
    if p.inner:
        new.update(mark=False, backward="backward" if p.backward in ("twice", "inputs") else p.backward, route="hook")
        new.update(container="dict" if p.container in ("bare", "attribute") else p.container)
        if p.backward == "inputs":
            new["input_grad"] = False
    if p.container == "bare" and (p.value or p.features or p.head == "mean_std"):
        new["container"] = "tuple"
    if p.autocast:
        new["dtype"] = "float32"
    terms = [t for t in p.terms if _possible(p, t)]
    if p.head in ("normal", "mean_std"):  # the exponential of a density's logarithm leaves the range of numbers
        terms = [dataclasses.replace(t, kind="pg") if t.kind in ("grpo", "is", "ppo") else t for t in terms]
    if "ce" in [t.kind for t in terms]:
        ce = p.head == "logits" and not p.mark and not p.shift and sum(t.kind in ON_LOGP for t in terms) == 1
        fix = {"reduction": "mean"} if ce else {"kind": "nll"}
        terms = [dataclasses.replace(t, **fix) if t.kind == "ce" else t for t in terms]
    if not any(t.kind in ("pg", "ppo", "grpo", "nll", "is", "ce") for t in terms):
        terms.insert(0, Term())
    arrangement = new.get("arrangement", p.arrangement)
    if not sequence or arrangement == "flat":
        flat = {"rows": "masked", "rowsum": "sum"}
        terms = [dataclasses.replace(t, reduction=flat.get(t.reduction, t.reduction)) for t in terms]
    if p.combine == "inside":
        if (
            p.chooses_parts
            or any(t.kind == "ce" for t in terms)
            or (p.shift and any(t.kind in ("z", "entropy") for t in terms))
        ):
            new["combine"] = "plus"
        else:
            terms = [dataclasses.replace(t, reduction=terms[0].reduction) for t in terms]
    new["terms"] = tuple(terms)
    if "unit" in options:
        options.pop("pairs", None)
    if p.batch % 2:
        options.pop("pairs", None)
    if options.get("history") and "price" in options:
        options.pop("history")
    if not options.get("hard", True):
        options.pop("unbiased", None)
        options.pop("deterministic", None)
    if options.get("deterministic", True) and "price" in options:
        options.pop("unbiased", None)
    if p.route != "hook" and (options.get("rate") == "lossless" or "noise" in options):
        options.pop("noise", None)
        options["rate"] = 0.5  # before the forward they need more than delight
    if p.route != "hook" and "unbiased" in options and options.get("deterministic", True):
        options.pop("unbiased")
    if p.route != "hook" and options.get("priority") == "norm":
        options.pop("priority")
    window = options.get("window", 1)
    if window > 1 and (p.input_grad or new["input_grad"] or p.route != "hook"):
        options.pop("window")
        window = 1
    if window > 1 and p.backward in ("twice", "separate", "grad"):
        new["backward"] = "backward"
    calls = 1 if new["input_grad"] else p.calls  # each such call is a decision of its own, of which only the last shows
    new["calls"] = calls
    if calls == 1 or "pairs" in options or p.batch < 3:
        new["ragged"] = False
    if p.backward == "separate" and calls == 1:
        new["backward"] = "backward"
    if options.get("hard") is False or not options.get("deterministic", True) or p.backward == "separate":
        new["force"] = False
    new["options"] = tuple(options.items())
    return dataclasses.replace(p, **new)


def _possible(p: Program, term: Term) -> bool:
    if term.kind in ("value", "huber"):
        return p.value
    if term.kind == "feature":
        return p.features
    if term.kind == "z":
        return p.head == "logits"
    if term.kind == "kl":
        return p.head not in ("normal", "mean_std")
    if term.kind == "entropy":
        return p.head not in SELECTED
    return True
