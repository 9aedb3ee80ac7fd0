"""A program written out as PyTorch code, which is what runs.

A model, its data, a call, its loss, and the same loss with every term times ``w``: the slow reference.
"""

from tests.fuzz.programs import DISTRIBUTIONS, NEEDS, ON_LOGP, POOLS, SELECTED, Program, Term


def source(p: Program) -> str:
    """The program as PyTorch code: ``Model``, ``data``, ``call``, ``loss`` and the reference's ``masked_loss``."""
    lines = [
        "from types import SimpleNamespace",
        "from dataclasses import dataclass",
        "",
        "import torch",
        "import torch.nn.functional as F",
        "from torch import nn",
        "from torch.distributions import Bernoulli, Categorical, Independent, Normal",
        "from torch.utils.checkpoint import checkpoint",
        "",
        f"DTYPE = torch.{p.dtype}",
        "",
        "",
        *_data(p),
        "",
        "",
        *_model(p, "Model", "nn.Module", masked=False),
        "",
        "",
        *_call(p),
        "",
        "",
        *_loss(p, "loss", masked=False),
        "",
        "",
    ]
    if p.inner:
        lines += [*_model(p, "Masked", "Model", masked=True), "", ""]
    lines += [*_CUT, "", ""] if p.chooses_parts else []
    lines += _loss(p, "masked_loss", masked=True)
    return "\n".join(lines) + "\n"


_VOCABULARY = 99  # rows that are alike by chance could be misread
_CUT = [
    "def cut(policy, w):",
    "    if isinstance(policy, Normal):",
    "        return Normal(cut(policy.loc, w), cut(policy.scale, w))",
    "    if isinstance(policy, Bernoulli):",
    "        return Bernoulli(logits=cut(policy.logits, w))",
    "    return policy * w + policy.detach() * (1 - w)",
]
_SHAPES = {
    "BB": "batch, batch",
    "B": "batch,",
    "TB": "{T}, batch",
    "TT": "{T}, {T}",
    "BT": "batch, {T}",
    "T": "{T},",
    "H": "{H},",
    "1B": "1, batch",
}


def _positions(p: Program) -> str:
    return f"batch, {p.length}" if p.sequence else "batch,"


def _data(p: Program) -> list[str]:
    shape, size, hidden = _positions(p), f"({_positions(p)})", p.hidden
    x = {
        "vector": f"normal(batch, {hidden})",
        "sequence": f"normal(batch, {p.length}, {hidden})",
        "ids": f"torch.randint(0, {_VOCABULARY}, (batch, {p.length}), generator=g)",
        "image": "normal(batch, 1, 5, 5)",
    }[p.inputs]
    if _is_normal(p):
        actions = f"normal({shape.rstrip(',')}, {p.actions})"
    elif _is_bits(p):
        actions = f"torch.randint(0, 2, ({shape.rstrip(',')}, {p.actions}), generator=g).to(DTYPE)"
    else:
        actions = f"torch.randint(0, {p.actions}, {size}, generator=g)"
    mask = f"torch.arange({p.length}) < torch.randint(1, {p.length + 1}, (batch, 1), generator=g)"
    if not p.sequence:
        mask = "(torch.rand(batch, generator=g) < 0.7) | (torch.arange(batch) == 0)"
    lines = [
        f"def data(seed, batch={p.batch}):",
        "    g = torch.Generator().manual_seed(seed)",
        "",
        "    def normal(*shape):",
        "        return torch.randn(*shape, generator=g, dtype=torch.float64).to(DTYPE)",
        "",
        "    return SimpleNamespace(",
        f"        x={x},",
        f"        actions={actions},",
        f"        advantages=normal({shape.rstrip(',')}),",
        f"        old=-1.2 + 0.3 * normal({shape.rstrip(',')}),",
        f"        ref=-1.2 + 0.3 * normal({shape.rstrip(',')}),",
        f"        returns=normal({shape.rstrip(',')}),",
        f"        mask=({mask}).to(DTYPE),",
    ]
    for i, extra in enumerate(p.extras):
        lines.append(f"        e{i}=normal({_SHAPES[extra].format(T=p.length, H=p.hidden).rstrip(',')}),")
    for name, code in _needed(p):
        lines.append(f"        {name}={code},")
    return [*lines, "    )"]


def _needed(p: Program) -> list[tuple[str, str]]:
    """Inputs that blocks take, and how they are made."""
    t, h = p.length, p.hidden
    made = {
        "attention_TT": ("causal", f"torch.full(({t}, {t}), -torch.inf, dtype=DTYPE).triu(1)"),
        "transformer": ("causal", f"torch.full(({t}, {t}), -torch.inf, dtype=DTYPE).triu(1)"),
        "attention_BT": ("padding", f"torch.arange({t}) < torch.randint(1, {t + 1}, (batch, 1), generator=g)"),
        "torch_attention": ("ignored", f"torch.arange({t}) >= torch.randint(1, {t + 1}, (batch, 1), generator=g)"),
        "masked_pool": ("weights", f"(torch.rand(batch, {t}, generator=g) + 0.1).to(DTYPE)"),
        "attention_B1TT": (
            "full",
            f"(torch.rand(batch, 1, {t}, {t}, generator=g) < 0.6) | torch.eye({t}, dtype=torch.bool)",
        ),
        "gru_state": ("h0", f"normal(1, batch, {h})"),
        "lstm_state": ("h1", f"(normal(1, batch, {h}), normal(1, batch, {h}))"),
    }
    return list(dict(made[b] for b in p.blocks if b in made).items())


def _parameters(p: Program) -> list[str]:
    """The names of the model's inputs, in order."""
    extras = [f"e{i}" for i in range(len(p.extras))]
    names = ["x", *(name for name, _ in _needed(p))]
    names = [*extras, *names] if p.extras_first else [*names, *extras]
    if p.inner:
        names += ["actions", "advantages", "old", "ref", "returns", "mask"]
    elif p.head in SELECTED:
        names.append("actions")
    return names


def _call(p: Program) -> list[str]:
    def given(name: str) -> str:
        swap = p.time_first and name in (
            "x",
            *(["actions"] if p.head in SELECTED and p.sequence and not p.inner else []),
        )
        code = f"b.{name}.transpose(0, 1)" if swap else f"b.{name}"
        return f"{code}.numpy()" if p.numpy and name == "x" else code

    names = _parameters(p)
    keywords = ", ".join(f"{name}={given(name)}" for name in names)
    inside = {
        "positional": ", ".join(map(given, names)),
        "keyword": keywords,
        "dict": f"dict({keywords})",
        "object": f"SimpleNamespace({keywords})",
    }[p.passing]
    return ["def call(model, b):", f"    return model({inside})"]


def _is_normal(p: Program) -> bool:
    return p.head in ("normal", "mean_std")


def _is_bits(p: Program) -> bool:
    return p.head in ("bernoulli", "bits")


def _model(p: Program, name: str, base: str, masked: bool) -> list[str]:
    init, forward = _layers(p)
    forward += _heads(p, init)
    if p.inner:
        loss = _loss_lines(p, masked)
        forward += [*(["w = self.w"] if masked else []), *loss]
        forward += ["self.probe = (logp, probe, scales)"] if masked else []
    forward.append(_returned(p))
    names = _parameters(p)
    if p.passing in ("dict", "object"):
        getter = "obs[{0!r}]" if p.passing == "dict" else "obs.{0}"
        head = ["    def forward(self, obs):"]
        head += [f"        {n} = {getter.format(n)}" for n in names if not (n.startswith("e") and n[1:].isdigit())]
    else:
        head = [f"    def forward(self, {', '.join(names)}):"]
    if p.numpy:
        head.append("        x = torch.as_tensor(x)")
    lines = [f"class {name}({base}):"]
    if not masked:
        lines += ["    def __init__(self):", "        super().__init__()", *(f"        {line}" for line in init), ""]
    lines += [*head, *(f"        {line}" for line in forward)]
    if p.container == "dataclass" and not masked:
        fields = [f"    {n}: object" for n in _outputs(p)]
        lines = ["@dataclass", "class Output:", *fields, "", "", *lines]
    return lines


def _layers(p: Program) -> tuple[list[str], list[str]]:
    """The lines of ``__init__`` and ``forward`` from the input to ``h``."""
    n = p.hidden
    init, forward = {
        "vector": ([f"self.embed = nn.Linear({n}, {n})"], ["h = self.embed(x)"]),
        "sequence": ([f"self.embed = nn.Linear({n}, {n})"], ["h = self.embed(x)"]),
        "ids": ([f"self.embed = nn.Embedding({_VOCABULARY}, {n})"], ["h = self.embed(x)"]),
        "image": (
            ["self.conv = nn.Conv2d(1, 2, 3)", f"self.embed = nn.Linear(18, {n})"],
            ["h = self.embed(torch.relu(self.conv(x)).flatten(1))"],
        ),
    }[p.inputs]
    init, forward = list(init), list(forward)
    sequence = p.inputs in ("sequence", "ids")
    for i, block in enumerate(p.blocks):
        more_init, more_forward = _block(p, block, f"self.b{i}", sequence)
        init += more_init
        forward += more_forward
        sequence = sequence and block not in POOLS
    return init, forward


def _block(p: Program, block: str, b: str, sequence: bool) -> tuple[list[str], list[str]]:
    n, t = p.hidden, p.length
    linear, time = f"nn.Linear({n}, {n})", 0 if p.time_first else 1
    rows = 1 if p.time_first and sequence else 0
    mlp = f"nn.Sequential(nn.Linear({n}, {n}), nn.Tanh(), nn.Linear({n}, {n}))"
    first = f"batch_first={not p.time_first}"
    attend = [f"q, k, v = {b}(h).chunk(3, -1)"]

    def sdpa(options: str) -> list[str]:
        return [*attend, f"h = h + F.scaled_dot_product_attention(q, k, v{options})"]

    state = b.replace("self.", "self.state_")
    each = "1, h.shape[1], 1" if rows else "len(h), 1, 1" if sequence else "len(h), 1"
    table: dict[str, tuple[list[str], list[str]]] = {
        "linear": ([f"{b} = {linear}"], [f"h = torch.tanh({b}(h))"]),
        "mlp": ([f"{b} = {mlp}"], [f"h = {b}(h)"]),
        "residual": (
            [f"{b} = {mlp}", f"{b}_scale = nn.Parameter(torch.full((), 0.3))"],
            [f"h = h + {b}_scale * {b}(h)"],
        ),
        "layer_norm": ([f"{b} = nn.LayerNorm({n})"], [f"h = {b}(h)"]),
        "rms_norm": ([f"{b} = nn.RMSNorm({n})"], [f"h = {b}(h)"]),
        "group_norm": (
            [f"{b} = nn.GroupNorm(2, {n})"],
            [f"h = {b}(h.transpose(1, 2)).transpose(1, 2)" if sequence else f"h = {b}(h)"],
        ),
        "gate": ([f"{b} = {linear}"], [f"h = h * torch.sigmoid({b}(h))"]),
        "frozen": ([f"{b} = {linear}.requires_grad_(False)"], [f"h = h + torch.relu({b}(h))"]),
        "weight_tied": ([f"{b} = {linear}"], [f"h = h + torch.tanh({b}(torch.tanh({b}(h))))"]),
        "dropout": ([f"{b} = nn.Dropout(0.3)"], [f"h = {b}(h)"]),
        "dropout_fn": ([], ["h = F.dropout(h, 0.3, self.training)"]),
        "noise": ([], ["h = h + 0.1 * torch.randn_like(h)"]),
        "row_noise": ([], [f"h = h + torch.rand({each}, dtype=h.dtype)"]),
        "rrelu": ([], ["h = h + F.rrelu(h, training=True)"]),
        "batch_norm": ([f"{b} = nn.BatchNorm1d({n})"], [_norm(b, sequence)]),
        "batch_norm_eval": ([f"{b} = nn.BatchNorm1d({n}).eval()"], [_norm(b, sequence)]),
        "counter": (
            [f"self.register_buffer({(b + '_n')[5:]!r}, torch.zeros(()))"],
            [f"h = h * (1 + 0.01 * {b}_n)", f"{b}_n += 1"],
        ),
        "running_mean": (
            [f"self.register_buffer({(b + '_m')[5:]!r}, torch.zeros({n}))"],
            [f"h = h - {b}_m", f"{b}_m = 0.9 * {b}_m + 0.1 * h.detach().flatten(0, -2).mean(0)"],
        ),
        "left_behind": (
            [f"{state} = None"],
            [
                f"if {state} is not None and {state}.shape == h.shape:",
                f"    h = h + 0.1 * {state}",
                f"{state} = h.detach()",
            ],
        ),
        "checkpoint": ([f"{b} = {mlp}"], [f"h = checkpoint({b}, h, use_reentrant=False)"]),
        "checkpoint_reentrant": ([f"{b} = {mlp}"], [f"h = checkpoint({b}, h, use_reentrant=True)"]),
        "checkpoint_dropout": (
            [f"{b} = nn.Sequential({linear}, nn.Dropout(0.3), nn.Tanh())"],
            [f"h = checkpoint({b}, h, use_reentrant=False)"],
        ),
        "center": ([], [f"h = h - h.mean({rows}, keepdim=True)"]),
        "batch_size": ([], [f"h = h * h.shape[{rows}]"]),
        "zero_center": (
            [f"{b} = nn.Parameter(torch.zeros({n}))"],
            [f"h = h + {b} * h.mean({rows}, keepdim=True)"],
        ),
        "conv": ([f"{b} = nn.Conv1d({n}, {n}, 3, padding=1)"], [f"h = h + {b}(h.transpose(1, 2)).transpose(1, 2)"]),
        "attention": ([f"{b} = nn.Linear({n}, {3 * n})"], sdpa("")),
        "attention_causal": ([f"{b} = nn.Linear({n}, {3 * n})"], sdpa(", is_causal=True")),
        "attention_TT": ([f"{b} = nn.Linear({n}, {3 * n})"], sdpa(", attn_mask=causal")),
        "attention_BT": ([f"{b} = nn.Linear({n}, {3 * n})"], sdpa(", attn_mask=padding[:, None, :]")),
        "attention_dropout": ([f"{b} = nn.Linear({n}, {3 * n})"], sdpa(", dropout_p=0.2")),
        "attention_B1TT": (
            [f"{b} = nn.Linear({n}, {3 * n})"],
            [
                f"q, k, v = {b}(h).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)",
                "a = F.scaled_dot_product_attention(q, k, v, attn_mask=full)",
                "h = h + a.transpose(1, 2).flatten(2)",
            ],
        ),
        "torch_attention": (
            [f"{b} = nn.MultiheadAttention({n}, 2, batch_first=True)"],
            [f"h = h + {b}(h, h, h, key_padding_mask=ignored)[0]"],
        ),
        "transformer": (
            [f"{b} = nn.TransformerEncoderLayer({n}, 2, {n}, 0.1, batch_first=True)"],
            [f"h = {b}(h, src_mask=causal)"],
        ),
        "position": (
            [f"{b} = nn.Parameter(torch.randn({t}, {n}))"],
            [f"h = h + {b}.unsqueeze({1})" if p.time_first else f"h = h + {b}"],
        ),
        "gru": ([f"{b} = nn.GRU({n}, {n}, {first})"], [f"h, _ = {b}(h)"]),
        "gru_state": ([f"{b} = nn.GRU({n}, {n}, {first})"], [f"h, _ = {b}(h, h0)"]),
        "lstm": ([f"{b} = nn.LSTM({n}, {n}, {first})"], [f"h, _ = {b}(h)"]),
        "lstm_state": ([f"{b} = nn.LSTM({n}, {n}, {first})"], [f"h, _ = {b}(h, h1)"]),
        "gru_last": ([f"{b} = nn.GRU({n}, {n}, {first})"], [f"h = {b}(h)[1][-1]"]),
        "mean_pool": ([], [f"h = h.mean({time})"]),
        "max_pool": ([], [f"h = h.amax({time})"]),
        "last_pool": ([], ["h = h[-1]" if p.time_first else "h = h[:, -1]"]),
        "masked_pool": ([], ["h = (h * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)"]),
    }
    return table[block]


def _norm(b: str, sequence: bool) -> str:
    return f"h = {b}(h.flatten(0, 1)).view_as(h)" if sequence else f"h = {b}(h)"


def _heads(p: Program, init: list[str]) -> list[str]:
    n, k = p.hidden, p.actions
    init.append(f"self.policy = nn.Linear({n}, {k})")
    lines = ["policy = self.policy(h)"]
    if _is_normal(p):
        init.append(f"self.log_std = nn.Parameter(torch.full(({k},), -0.3))")
        lines += ["std = self.log_std.exp().expand_as(policy)"]
        lines += ["policy = Normal(policy, std)"] if p.head == "normal" else []
    lines += {
        "log_probs": ["policy = policy.log_softmax(-1)"],
        "probs": ["policy = policy.softmax(-1)"],
        "categorical": ["policy = Categorical(logits=policy)"],
        "bernoulli": ["policy = Bernoulli(logits=policy)"],
        "logp": ["policy = policy.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)"],
        "nll": ["policy = F.cross_entropy(policy.movedim(-1, 1), actions, reduction='none')"],
    }.get(p.head, [])
    outputs = [] if p.head in DISTRIBUTIONS else ["policy"]
    if p.head == "mean_std":
        outputs.append("std")
    if p.value:
        init.append(f"self.value = nn.Linear({n}, 1)")
        lines.append("value = self.value(h).squeeze(-1)")
        outputs.append("value")
    if p.features:
        lines.append("features = h")
        outputs.append("features")
    if p.sequence and not p.time_first:
        change = {
            "flat": ".flatten(0, 1)",
            "time_first": ".transpose(0, 1)",
            "time_flat": ".transpose(0, 1).flatten(0, 1)",
        }.get(p.layout)
        if change:
            lines += [f"{name} = {name}{change}" for name in outputs]
        elif p.layout == "classes":
            lines.append("policy = policy.transpose(1, 2)")
    return lines


def _outputs(p: Program) -> list[str]:
    names = ["policy", *(["std"] if p.head == "mean_std" else [])]
    names += [*(["value"] if p.value else []), *(["features"] if p.features else [])]
    return ["loss", *names] if p.inner else names


def _returned(p: Program) -> str:
    names = _outputs(p)
    joined = ", ".join(names)
    if p.container == "attribute":
        rest = ", ".join(names[1:])
        return f"self.left = policy; return ({rest},)" if rest else "self.left = policy; return h"
    return {
        "bare": f"return {joined}",
        "tuple": f"return ({joined},)",
        "list": f"return [{joined}]",
        "dict": f"return dict({', '.join(f'{n}={n}' for n in names)})",
        "dataclass": f"return Output({joined})",
        "namespace": f"return SimpleNamespace({', '.join(f'{n}={n}' for n in names)})",
        "nested": f"return {{'first': [{names[0]}], 'rest': [{', '.join(names[1:])}], 'n': 3}}",
    }[p.container]


def _unpack(p: Program) -> list[str]:
    names = _outputs(p)
    joined = ", ".join(names)
    if p.container == "attribute":
        return ["policy = model.left", *([f"{', '.join(names[1:])}, = out"] if names[1:] else [])]
    if p.container in ("dict", "dataclass", "namespace"):
        getter = "out[{0!r}]" if p.container == "dict" else "out.{0}"
        return [f"{name} = {getter.format(name)}" for name in names]
    if p.container == "nested":
        rest = [f"{', '.join(names[1:])}, = out['rest']"] if names[1:] else []
        return [f"{names[0]} = out['first'][0]", *rest]
    return [f"{joined} = out"] if p.container == "bare" else [f"{joined}, = out"]


def _loss(p: Program, name: str, masked: bool) -> list[str]:
    """``loss(model, out, b, mark)``; or ``masked_loss(model, out, b, w)``, which returns what gives delight, too."""
    lines = [f"def {name}(model, out, b, {'w' if masked else 'mark'}):"]
    if p.inner:
        body = [*_unpack(p), "return loss, *model.probe" if masked else "return loss"]
    else:
        body = _unpack(p)
        body += [f"{n} = b.{n}" for n in _data_names(p)]
        body += _loss_lines(p, masked)
        body.append("return loss, logp, probe, scales" if masked else "return loss")
    return lines + [f"    {line}" for line in body]


def _data_names(p: Program) -> list[str]:
    used = {name for t in p.terms for name in NEEDS.get(t.kind, ())}
    if any(t.reduction in ("masked", "rows", "rowsum") for t in p.terms):
        used.add("mask")
    return ["actions", *sorted(used)]


def _loss_lines(p: Program, masked: bool) -> list[str]:
    """From policy, value and data, laid out as the model returned them and as ``data`` made them, to ``loss``."""
    lines = []
    names = _data_names(p)
    if p.sequence:
        lead = "actions.shape[:2]"
        outputs = [] if p.head in DISTRIBUTIONS else ["policy"]
        outputs += ["std"] if p.head == "mean_std" else []
        outputs += [n for n, there in (("value", p.value), ("features", p.features)) if there]
        for name in outputs:
            change = _relaid(p, name, lead)
            lines += [f"{name} = {name}{change}"] if change else []
        if p.shift:
            lines += [f"{name} = {name}[:, :-1]" for name in outputs]
            lines += [f"{name} = {name}[:, 1:]" for name in names]
        change = {"flat": ".flatten(0, 1)", "TB": ".transpose(0, 1)"}.get(p.arrangement)
        if change:
            lines += [f"{name} = {name}{change}" for name in [*names, *(["w"] if masked else [])]]
    w = "w"
    if masked and p.chooses_parts:
        w = "whole"
        lines += ["parts, whole = w, w", "if w.dim() == actions.dim():", "    w = w.amax(-1)"]
        lines += ["    whole, policy = torch.ones_like(w), cut(policy, parts)"]
        lines += ["    std = cut(std, parts)"] if p.head == "mean_std" else []
    only_ce = any(t.kind == "ce" for t in p.terms)
    if not (only_ce and not masked):
        lines += _pick_lines(p)
        if p.mark and not masked:
            lines.append("logp = mark(logp)")
    results, probes, scales = [], [], []
    if any(t.kind in ("ppo", "grpo", "is") for t in p.terms):
        lines.append("ratio = (logp - old).exp()")
    inside = p.combine == "inside"
    for i, term in enumerate(p.terms):
        if term.kind == "ce" and not masked:
            lines.append(f"t{i} = F.cross_entropy(policy.movedim(-1, 1), actions)")
        else:
            lines.append(f"t{i} = {_term(p, term)}")
        if inside:
            continue
        if masked and term.kind in ON_LOGP:
            lines.append(f"p{i} = {_reduce(p, f't{i}', term.reduction)}")
            probes.append(f"{term.coef} * p{i}")
            scales.append(f"{term.coef} * {_reduction_scale(p, term.reduction)}")
        if term.kind != "ce" or masked:
            factor = w if term.kind not in ("value", "huber", "feature") else "w"
            lines.append(f"t{i} = {_reduce(p, f't{i} * {factor}' if masked else f't{i}', term.reduction)}")
        results.append((term.coef, f"t{i}"))
    if inside:
        total = " + ".join(f"{t.coef} * t{i}" if t.coef != 1 else f"t{i}" for i, t in enumerate(p.terms))
        if masked:
            on_logp = " + ".join(f"{t.coef} * t{i}" for i, t in enumerate(p.terms) if t.kind in ON_LOGP)
            probes.append(_reduce(p, f"({on_logp})", p.terms[0].reduction))
            scales.append(_reduction_scale(p, p.terms[0].reduction))
        lines.append(f"loss = {_reduce(p, f'({total}) * {w}' if masked else f'({total})', p.terms[0].reduction)}")
    else:
        lines.append(f"loss = {_combined(p.combine, results)}")
    if masked:
        lines += [f"probe = {' + '.join(probes)}", f"scales = [{', '.join(scales)}]"]
    return lines


def _relaid(p: Program, name: str, lead: str) -> str:
    """From the model's layout to the loss's arrangement."""
    layout, arrangement = p.layout, p.arrangement
    if layout == "classes":
        first = ".transpose(1, 2)" if name == "policy" else ""
        return first + {"BT": "", "flat": ".flatten(0, 1)", "TB": ".transpose(0, 1)"}[arrangement]
    if layout == "flat":
        return {
            "BT": f".unflatten(0, {lead})",
            "flat": "",
            "TB": f".unflatten(0, {lead}).transpose(0, 1)",
        }[arrangement]
    if layout == "plain":
        return {"BT": "", "flat": ".flatten(0, 1)", "TB": ".transpose(0, 1)"}[arrangement]
    first = f".unflatten(0, {lead}[::-1])" if layout == "time_flat" else ""
    return first + {"BT": ".transpose(0, 1)", "flat": ".transpose(0, 1).flatten(0, 1)", "TB": ""}[arrangement]


def _pick_lines(p: Program) -> list[str]:
    index = "torch.arange(len(actions))"
    if p.sequence and p.arrangement != "flat":
        index = "torch.arange(len(actions))[:, None], torch.arange(actions.shape[1])"
    table = {"logits": "policy.log_softmax(-1)", "log_probs": "policy", "probs": "policy"}.get(p.head, "policy")
    log = ".log()" if p.head == "probs" else ""
    at = "actions.unsqueeze(-1)"
    kind = "probs" if p.head == "probs" else "logits"
    if p.head == "categorical":
        return ["logp = policy.log_prob(actions)"]
    if p.head in ("normal", "bernoulli"):
        return ["logp = policy.log_prob(actions).sum(-1)"]
    if p.head in SELECTED:
        return ["logp = policy" if p.head == "logp" else "logp = -policy"]
    order = "order = torch.arange(len(actions)).flip(0)"
    return {
        "gather": [f"logp = {table}.gather(-1, {at}).squeeze(-1){log}"],
        "take_along": [f"logp = torch.take_along_dim({table}, {at}, -1)[..., 0]"],
        "index": [f"logp = {table}[{index}, actions]{log}"],
        "cross_entropy": ["logp = -F.cross_entropy(policy.movedim(-1, 1), actions, reduction='none')"],
        "nll_loss": [f"logp = -F.nll_loss({table}.movedim(-1, 1), actions, reduction='none')"],
        "categorical": [f"logp = Categorical({kind}=policy).log_prob(actions)"],
        "logsumexp": [f"logp = policy.gather(-1, {at}).squeeze(-1) - policy.logsumexp(-1)"],
        "one_hot": [f"logp = ({table} * F.one_hot(actions, {p.actions})).sum(-1)"],
        "softmax_log": [f"logp = policy.softmax(-1).gather(-1, {at}).squeeze(-1).log()"],
        "flipped": [order, f"logp = {table}[order].gather(-1, {at}[order]).squeeze(-1)[order]"],
        "written": [
            order,
            "written = torch.zeros_like(policy)",
            "written[order] = policy",
            f"logp = written.log_softmax(-1).gather(-1, {at}[order]).squeeze(-1)[order]",
        ],
        "halves": [
            "half = len(actions) // 2",
            "swapped = torch.cat([policy[half:], policy[:half]]).log_softmax(-1)",
            f"taken = swapped.gather(-1, torch.cat([{at}[half:], {at}[:half]])).squeeze(-1)",
            "rest = len(actions) - half",
            "logp = torch.cat([taken[rest:], taken[:rest]])",
        ],
        "normal": ["logp = Normal(policy, std).log_prob(actions).sum(-1)"],
        "independent": ["logp = Independent(Normal(policy, std), 1).log_prob(actions)"],
        "normal_by_hand": ["logp = (-0.5 * ((actions - policy) / std) ** 2 - std.log() - 0.9189385332046727).sum(-1)"],
        "bernoulli": ["logp = Bernoulli(logits=policy).log_prob(actions).sum(-1)"],
        "binary_cross_entropy": [
            "logp = -F.binary_cross_entropy_with_logits(policy, actions, reduction='none').sum(-1)"
        ],
    }[p.pick]


def _term(p: Program, term: Term) -> str:
    entropy = {
        "logits": "(policy.softmax(-1) * policy.log_softmax(-1)).sum(-1)",
        "log_probs": "(policy.exp() * policy).sum(-1)",
        "probs": "(policy * policy.log()).sum(-1)",
        "categorical": "-policy.entropy()",
        "normal": "-policy.entropy().sum(-1)",
        "bernoulli": "-policy.entropy().sum(-1)",
        "mean_std": "-Normal(policy, std).entropy().sum(-1)",
        "bits": "-Bernoulli(logits=policy).entropy().sum(-1)",
    }.get(p.head, "")
    if p.pick == "categorical" and p.head == "logits":
        entropy = "-Categorical(logits=policy).entropy()"
    kl = "((ref - logp).exp() - (ref - logp) - 1)"
    return {
        "pg": "-(advantages * logp)",
        "ppo": "-torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)",
        "grpo": f"-ratio * advantages + 0.04 * {kl}",
        "nll": "-logp",
        "ce": "-logp",
        "is": "-advantages * ratio",
        "kl": kl,
        "entropy": entropy,
        "value": "0.5 * (value - returns).pow(2)",
        "huber": "F.smooth_l1_loss(value, returns, reduction='none')",
        "z": "policy.logsumexp(-1).pow(2)",
        "feature": "features.pow(2).mean(-1)",
    }[term.kind]


def _time(p: Program) -> int:
    return 0 if p.arrangement == "TB" else 1


def _reduce(p: Program, term: str, reduction: str) -> str:
    wrapped = term if term.isidentifier() or (term.startswith("(") and term.endswith(")")) else f"({term})"
    axis = _time(p)
    return {
        "mean": f"{wrapped}.mean()",
        "sum": f"{wrapped}.sum()",
        "masked": f"({term} * mask).sum() / mask.sum().clamp(min=1)",
        "rows": f"(({term} * mask).sum({axis}) / mask.sum({axis}).clamp(min=1)).mean()",
        "rowsum": f"({term} * mask).sum({axis}).mean()",
    }[reduction]


def _reduction_scale(p: Program, reduction: str) -> str:
    rows = f"logp.shape[{1 - _time(p)}]" if p.sequence and p.arrangement != "flat" else "len(logp)"
    return {
        "mean": "1 / logp.numel()",
        "sum": "1",
        "masked": "1 / float(mask.sum().clamp(min=1))",
        "rows": f"1 / {rows}",
        "rowsum": f"1 / {rows}",
    }[reduction]


def _combined(style: str, terms: list[tuple[float, str]]) -> str:
    def product(coef: float, name: str) -> str:
        return name if coef == 1 else f"{coef} * {name}"

    each = [product(*term) for term in terms]
    if style == "sum":
        return f"sum([{', '.join(each)}])"
    if style == "stack":
        return f"torch.stack([{', '.join(each)}]).sum()"
    if style == "divide":
        return " + ".join(name if coef == 1 else f"{name} / {1 / coef}" for coef, name in terms)
    if style == "minus":
        return " - ".join([each[0], *(product(-coef, name) for coef, name in terms[1:])])
    if style == "negative":
        return f"-({' '.join(f'- {one}' for one in each)})"
    if style == "nested":
        text = each[-1]
        for one in reversed(each[:-1]):
            text = f"({one} + 1.0 * ({text}))"
        return text
    return " + ".join(each)
