"""Rows that hold many texts: the texts are the samples, and the replay is a shorter pack with the same gradient."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import kondo_hooks as kondo
from kondo_hooks.rows.segments import Segments
from tests.reference import Runs, copies, grads, largest_relative_difference

V = 29


class Attention(nn.Module):
    """One block in which a text's tokens see each other, told as a training library would tell it."""

    def __init__(self, told, causal=True):
        super().__init__()
        self.told, self.causal = told, causal
        self.token, self.place = nn.Embedding(V, 12), nn.Embedding(32, 12)
        self.qkv, self.head = nn.Linear(12, 36), nn.Linear(12, V)

    def forward(self, ids, **told):
        if self.told == "cu_seqlens":
            lengths = told["cu_seqlens"].diff()
        elif self.told == "seq_lens":
            lengths = told["seq_lens"].flatten()
        elif self.told == "doc_lens":
            lengths = told["packing"]["doc_lens"]
        else:
            lengths = told["seq_idx"].flatten().unique_consecutive(return_counts=True)[1]
        text = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        place = torch.cat([torch.arange(int(n)) for n in lengths])
        x = (self.token(ids[0]) + self.place(place))[None]
        sees = text[:, None] == text
        sees = sees & (torch.ones_like(sees).tril() if self.causal else True)

        def attend(x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=sees)

        return self.head(x + checkpoint(attend, x, use_reentrant=False))


SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL |= {"max_position_embeddings": 64, "num_key_value_heads": 1}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama, eager": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation="eager")),
    "llama, checkpointed": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama, 4D mask": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ),
    **{told: (lambda told=told: Attention(told)) for told in ("cu_seqlens", "seq_lens", "seq_idx", "doc_lens")},
    "both ways": lambda: Attention("cu_seqlens", causal=False),
}


def made(kind):
    torch.manual_seed(0)
    model = KINDS[kind]().double()
    if kind == "llama, checkpointed":
        model.gradient_checkpointing_enable()
    return model


class Pack:
    """Texts of these lengths in one row, or in as many rows as there are lists of lengths."""

    def __init__(self, *rows, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.lengths = torch.tensor([n for row in rows for n in row])
        self.rows, self.total = len(rows), sum(rows[0])
        assert all(sum(row) == self.total for row in rows)
        self.ids = torch.randint(V, (self.rows, self.total), generator=g)
        self.text = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths).view(self.rows, self.total)
        self.place = torch.cat([torch.arange(int(n)) for n in self.lengths]).view(self.rows, self.total)
        self.u = torch.randn(len(self.lengths), generator=g, dtype=torch.float64)
        self.labelled = self.place[:, 1:] != 0  # a text's first token is nobody's label

    @property
    def bounds(self):
        return torch.cat([torch.zeros(1, dtype=torch.long), self.lengths.cumsum(0)])

    def given(self, kind):
        """The model's arguments."""
        if kind in ("cu_seqlens", "both ways"):
            return (self.ids,), {"cu_seqlens": self.bounds.int(), "max_seqlen": int(self.lengths.max())}
        if kind == "seq_lens":
            return (self.ids,), {"seq_lens": self.lengths[None]}
        if kind == "doc_lens":
            return (self.ids,), {"packing": {"doc_lens": self.lengths}}
        if kind == "seq_idx":
            return (self.ids,), {"seq_idx": self.text.int()}
        named = {"input_ids": self.ids, "position_ids": self.place, "use_cache": False}
        if kind == "llama, 4D mask":
            sees = (self.text[0, :, None] == self.text[0]).tril()
            nothing = torch.zeros(sees.shape, dtype=torch.float64)
            named["attention_mask"] = nothing.masked_fill(~sees, torch.finfo(torch.float64).min)[None, None]
        return (), named


def logits_of(model, kind, pack):
    args, named = pack.given(kind)
    out = model(*args, **named)
    return out if isinstance(out, torch.Tensor) else out.logits


def loss_of(model, kind, pack, loss="gather", factors=None):
    """A loss of the tokens after each text's first; ``factors`` of each text, (S,), or of its tokens, (S, L)."""
    every = logits_of(model, kind, pack)[:, :-1].log_softmax(-1)
    logp = every.gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
    text = pack.text[:, :-1]
    u = pack.u[text]
    if loss == "clip":
        ratio = (logp - logp.detach() - 0.1).exp()
        terms = -torch.min(ratio * u, ratio.clamp(0.8, 1.2) * u)
    else:
        terms = -u * logp
    if loss == "entropy":
        terms = terms + 0.1 * (every.exp() * every).sum(-1)
    terms = terms * pack.labelled
    if factors is not None:
        terms = terms * (factors[text] if factors.dim() == 1 else factors[text, pack.place[:, :-1]])
    return terms.sum() / pack.ids.numel()


# Eager attention in transformers takes its softmax in float32, whatever the model's type.
EXACT = dict.fromkeys(KINDS, 1e-10) | {"llama, eager": 1e-5}
ONE = [(5, 7, 4, 9, 6, 3)]
THREE = [(5, 7, 4, 9, 6), (3, 3, 8), (12, 2, 6, 5)]


@pytest.mark.parametrize("rule", [{"rate": 0.34}, {"noise": 0.7}, {"price": 0.0}], ids=str)
@pytest.mark.parametrize("loss", ["gather", "entropy", "clip"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_masked_loss(kind, loss, rule):
    ours, theirs = copies(made(kind))
    pack = Pack(*ONE)
    runs = Runs(ours, V)
    with kondo.gated(ours, **rule) as gate:
        loss_of(ours, kind, pack, loss).backward()
        runs.shapes.clear()
        ours.zero_grad()
        loss_of(ours, kind, pack, loss).backward()
    factors = gate.last.factors()
    assert len(factors) == len(pack.lengths) and gate.stats.rows == 12
    loss_of(theirs, kind, pack, loss, factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < EXACT[kind]
    kept = int(pack.lengths[factors != 0].sum())
    assert 0 < kept < pack.total and {*runs.tokens} == {kept}
    assert gate.stats.forwarded == gate.stats.kept and gate.stats.rows_screened == 12


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1}, {"rate": 0.01}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kept_texts_of_a_window_are_one_pack(kind, options):
    ours, theirs = copies(made(kind))
    packs = [Pack(lengths, seed=i) for i, lengths in enumerate(THREE)]
    runs = Runs(ours, V)
    with kondo.gated(ours, window=3, audit=0, **{"rate": 0.4, **options}) as gate:
        for pack in packs:
            loss_of(ours, kind, pack).backward()
    factors = gate.last.factors().split([len(pack.lengths) for pack in packs])
    for pack, mine in zip(packs, factors, strict=True):
        loss_of(theirs, kind, pack, factors=mine).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < EXACT[kind]
    kept = [int(pack.lengths[mine != 0].sum()) for pack, mine in zip(packs, factors, strict=True)]
    if not options and kind not in ("cu_seqlens", "both ways"):  # whose max_seqlen differs
        assert sum(kept) in runs.tokens
    if "micro_batch_size" in options:
        assert max(runs.tokens) <= max(n for lengths in THREE for n in lengths)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_several_rows_of_texts_become_one_shorter_row(kind):
    ours, theirs = copies(made(kind))
    pack = Pack((5, 7, 4), (8, 8), (3, 3, 10), (16,))
    runs = Runs(ours, V)
    with kondo.gated(ours, rate=0.4) as gate:
        loss_of(ours, kind, pack).backward()
    factors = gate.last.factors()
    assert len(factors) == 9
    loss_of(theirs, kind, pack, factors=factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert int(pack.lengths[factors != 0].sum()) in runs.tokens


@pytest.mark.parametrize("unit", ["token", "prefix"])
@pytest.mark.parametrize("rule", [{"rate": 0.3}, {"noise": 0.5}, {"rate": "lossless"}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "cu_seqlens"])
def test_tokens_and_prefixes_of_texts(kind, rule, unit):
    ours, theirs = copies(made(kind))
    pack = Pack(*ONE)
    pack.u[:2] = 0
    runs = Runs(ours, V)
    with kondo.gated(ours, unit=unit, **rule) as gate:
        loss_of(ours, kind, pack).backward()
    factors = gate.last.factors().view(len(pack.lengths), -1)
    loss_of(theirs, kind, pack, factors=factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    ends = sum(int(row.nonzero().max()) + 1 for row in factors if row.any())
    kept = int(pack.lengths[factors.any(1)].sum())
    assert (ends if unit == "prefix" else kept) in runs.tokens


def test_groups_force_and_rules_are_of_texts():
    ours, theirs = copies(made("llama"))
    pack = Pack(*ONE)
    with kondo.gated(ours, rule=kondo.rules.cppo(0.34), groups=3) as gate:
        gate.force(torch.tensor([0]))
        loss_of(ours, "llama", pack).backward()
    factors = gate.last.factors()
    expected = torch.zeros(6)
    expected[pack.u[:3].abs().argmax()] = expected[3 + pack.u[3:].abs().argmax()] = expected[0] = 1
    assert torch.equal(factors.float(), expected)
    loss_of(theirs, "llama", pack, factors=factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_dropout_replays_the_whole_pack():
    class Dropped(Attention):
        def forward(self, ids, **told):
            return F.dropout(super().forward(ids, **told), 0.2, self.training)

    torch.manual_seed(0)
    ours, theirs = copies(Dropped("seq_lens").double())
    pack = Pack(*ONE)
    torch.manual_seed(3)
    with kondo.gated(ours, rate=0.34) as gate:
        loss_of(ours, "seq_lens", pack).backward()
    torch.manual_seed(3)
    loss_of(theirs, "seq_lens", pack, factors=gate.last.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_a_regression_over_packs_is_gated_by_its_gradient():
    ours, theirs = copies(made("seq_lens"))
    pack = Pack(*ONE)

    def loss(model, factors=None):
        square = logits_of(model, "seq_lens", pack).square().sum(-1) * pack.u.abs()[pack.text]
        return (square if factors is None else square * factors[pack.text]).mean()

    with kondo.gated(ours, noise=1.0) as gate:
        loss(ours).backward()
    assert len(gate.last.factors()) == 6
    loss(theirs, gate.last.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_log_probs_that_the_model_returns_one_short():
    class Shifted(Attention):
        """Log-probs of the next token, (1, T - 1)."""

        def forward(self, ids, **told):
            logp = super().forward(ids, **told)[:, :-1].log_softmax(-1)
            return {"log_probs": logp.gather(-1, ids[:, 1:, None]).squeeze(-1)}

    torch.manual_seed(0)
    ours, theirs = copies(Shifted("seq_lens").double())
    packs = [Pack(lengths, seed=i) for i, lengths in enumerate(THREE)]

    def loss(model, pack, factors=None):
        logp = model(pack.ids, seq_lens=pack.lengths)["log_probs"]
        u = pack.u if factors is None else pack.u * factors
        return -(u[pack.text[:, :-1]] * logp * pack.labelled).sum() / pack.total

    for window in (1, 3):
        ours.zero_grad(), theirs.zero_grad()
        with kondo.gated(ours, rate=0.4, window=window) as gate:
            for pack in packs:
                loss(ours, pack).backward()
                if window == 1:
                    loss(theirs, pack, gate.last.factors()).backward()
        if window == 3:
            factors = gate.last.factors().split([len(pack.lengths) for pack in packs])
            for pack, mine in zip(packs, factors, strict=True):
                loss(theirs, pack, mine).backward()
        assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


# What is recognised.


def read(**named):
    """How many texts a gate sees in a call of a model that attends to nothing, of rows of 12 tokens."""

    class Each(nn.Embedding):
        def forward(self, ids, *_, **__):
            return super().forward(ids)

    model = Each(V, V).double()
    options, ids = named.pop("options", {}), named.pop("ids", torch.arange(12)[None])
    real = named.pop("real", torch.ones(ids.shape))
    with kondo.gated(model, rate="lossless", **options) as gate:
        logp = model(ids, **named).log_softmax(-1)[..., 0]
        (-torch.randn(ids.shape, dtype=torch.float64) * logp * real).sum().backward()
    return gate.stats.rows


PLACES = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])


@pytest.mark.parametrize(
    "named",
    [
        {"position_ids": PLACES},
        {"positions": PLACES},
        {"position_ids": PLACES.expand(3, 1, 12)},
        {"cu_seqlens": torch.tensor([0, 5, 8, 12], dtype=torch.int32), "max_seqlen": 5},
        {"cu_seq_lens_q": torch.tensor([0, 5, 8, 12]), "cu_seq_lens_k": torch.tensor([0, 5, 8, 12]), "max_length_q": 5},
        {"flash": {"cu_seqlens_q": torch.tensor([0, 5, 8, 12])}},
        {"seq_lens": torch.tensor([5, 3, 4])},
        {"doc_lens": torch.tensor([[5, 3, 4]])},
        {"sequence_ids": torch.tensor([[4] * 5 + [9] * 3 + [4] * 4])},
        {"attention_mask": torch.block_diag(*(torch.ones(n, n).tril() for n in (5, 3, 4)))[None, None] > 0},
        {"attention_mask": torch.block_diag(*(torch.ones(n, n) for n in (5, 3, 4)))[None, None] > 0},
        {"marks": torch.tensor([0, 5, 8, 12]), "options": {"segments": "marks"}},
        {"extra": 1, "options": {"segments": lambda ids, extra: [5, 3, 4]}},
    ],
    ids=lambda named: ", ".join(named),
)
def test_what_tells_texts_is_known(named):
    assert read(**named) == 3


@pytest.mark.parametrize(
    "named",
    [
        {"position_ids": torch.arange(12)[None]},
        {"position_ids": torch.arange(3, 15)[None]},
        {"attention_mask": torch.ones(12, 12).tril()[None, None] > 0},
        {"cu_seqlens": torch.tensor([0, 12])},
    ],
    ids=lambda named: ", ".join(named),
)
def test_one_text_a_row_is_a_row(named):
    assert read(**named) == 1


def test_left_padding_is_no_text():
    """Positions start again where padding ends, which a mask tells."""
    ids = torch.randint(V, (4, 12))
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, :5] = mask[3, :2] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    assert read(ids=ids, attention_mask=mask, position_ids=places) == 4
    assert read(ids=ids, position_ids=places) == 4
    right = torch.arange(12).expand(4, 12) * mask.flip(1)
    assert read(ids=ids, position_ids=right) == 4
    sees = (mask[1][:, None] * mask[1]).tril().bool() | torch.eye(12, dtype=torch.bool)
    assert read(ids=ids[:1], attention_mask=sees[None, None]) == 1


def test_padding_after_the_last_text_is_no_text():
    real = (torch.arange(12) < 8).double()[None]
    assert read(cu_seqlens=torch.tensor([0, 5, 8]), real=real) == 2
    assert read(position_ids=F.pad(PLACES[:, :8], (0, 4)), real=real) == 2
    assert read(segment_ids=torch.tensor([[1] * 5 + [2] * 3 + [0] * 4]), real=real) == 2
    assert read(sequence_ids=torch.tensor([[0] * 5 + [1] * 3 + [-1] * 4]), real=real) == 2
    with pytest.raises(kondo.PackError, match="at tokens that belong to no text"):
        read(cu_seqlens=torch.tensor([0, 5, 8]))


def test_texts_by_brute_force():
    lengths = torch.tensor([3, 1, 4])
    found = Segments.of_lengths(2, 5, lengths)
    assert found.ids.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, -1, -1] and found.places.tolist()[:8] == [
        0,
        1,
        2,
        0,
        0,
        1,
        2,
        3,
    ]
    assert found.row_of.tolist() == [0, 0, 0]
    values = torch.arange(10.0).view(2, 5)
    assert found.by_text(values).tolist() == [[0, 1, 2, 0], [3, 0, 0, 0], [4, 5, 6, 7]]
    assert torch.equal(found.by_token(found.by_text(values))[:8], values.flatten()[:8])
    assert found.tokens(torch.tensor([0, 2])).tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert found.tokens(torch.tensor([0, 2]), torch.tensor([1, 9, 2])).tolist() == [0, 4, 5]
    assert Segments.of_lengths(1, 7, lengths) is None


# What is refused.


def the_last(rows):
    return (torch.arange(len(rows)) == len(rows) - 1).float()


def test_texts_that_leak_into_each_other_are_told_with_how_to_mask():
    model = made("llama")
    pack = Pack(*ONE)
    with (
        kondo.gated(model, rule=the_last),
        pytest.raises(kondo.ReplayMismatchError, match=r"texts of one row see each other.*use_cache=False"),
    ):
        logits = model(input_ids=pack.ids, position_ids=pack.place, attention_mask=torch.ones_like(pack.ids)).logits
        logp = logits[:, :-1].log_softmax(-1).gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
        (-pack.u[pack.text[:, :-1]] * logp * pack.labelled).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_an_output_without_tokens_is_named():
    class Pooled(Attention):
        def forward(self, ids, **told):
            logits = super().forward(ids, **told)
            return logits, logits.mean((1, 2))

    torch.manual_seed(0)
    model, pack = Pooled("seq_lens").double(), Pack(*ONE)
    with kondo.gated(model, rate=0.34), pytest.raises(kondo.PackError, match=r"output \[1\] has shape \(1,\)"):
        logits, value = model(pack.ids, seq_lens=pack.lengths)
        logp = logits[:, :-1].log_softmax(-1).gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
        ((-pack.u[pack.text[:, :-1]] * logp).sum() + value.square().sum()).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("segments", "match"),
    [
        ("nothing", "is no input of the call; it has"),
        ("told", "does not tell texts"),
        (lambda ids, told: [5, 99], r"\[5, 99\] are no lengths of texts"),
    ],
    ids=["no input", "no texts", "no lengths"],
)
def test_what_does_not_tell_texts_is_named(segments, match):
    with pytest.raises(kondo.PackError, match=match):
        read(told=torch.tensor([0.5, 0.5]), options={"segments": segments})


@pytest.mark.parametrize(
    "options", [{"segments": 3}, {"segments": "x", "batch_dim": 1}, {"segments": "x", "pairs": True}]
)
def test_arguments_are_checked(options):
    with pytest.raises(ValueError, match="segments"):
        kondo.gated(nn.Linear(2, 2), **options)


def test_texts_that_are_tied_behind_a_zero_are_told():
    class Tied(Attention):
        def __init__(self):
            super().__init__("seq_lens")
            self.gate = nn.Parameter(torch.zeros(V))

        def forward(self, ids, **told):
            logits = super().forward(ids, **told)
            return logits + self.gate * logits.mean(1, keepdim=True)

    torch.manual_seed(0)
    model, pack = Tied().double(), Pack(*ONE)
    with (
        kondo.gated(model, rate=0.34),
        pytest.raises(kondo.ReplayMismatchError, match="the gradient of gate is not the same without the other texts"),
    ):
        loss_of(model, "seq_lens", pack).backward()
    assert all(p.grad is None for p in model.parameters())


# Before the forward.


@pytest.mark.parametrize("unit", ["sample", "token", "prefix"])
@pytest.mark.parametrize("rule", [{"rate": 0.34}, {"noise": 0.7}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "llama, 4D mask", "cu_seqlens", "seq_idx"])
def test_before_the_forward_kept_texts_run_as_a_shorter_pack(kind, rule, unit):
    ours, theirs = copies(made(kind))
    pack = Pack(*ONE)
    length = int(pack.lengths.max())
    with torch.no_grad():
        logits = logits_of(theirs, kind, pack)
    logp = torch.zeros(6, length, dtype=torch.float64)
    mask = torch.zeros(6, length, dtype=torch.bool)
    at = (pack.text[0, :-1], pack.place[0, :-1])
    logp[at] = logits[0, :-1].log_softmax(-1).gather(-1, pack.ids[0, 1:, None]).squeeze(-1)
    mask[at] = pack.labelled[0]
    runs = Runs(ours, V)
    with kondo.gated(ours, unit=unit, **rule) as gate:
        gate.preselect(logp=logp, advantages=pack.u, mask=mask)
        loss_of(ours, kind, pack).backward()
    factors = gate.last.factors()
    factors = factors if unit == "sample" else factors.view(6, -1)
    loss_of(theirs, kind, pack, factors=factors).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert max(runs.tokens) < pack.total and gate.stats.forwarded < 6


def test_before_the_forward_nothing_kept_is_a_gradient_of_zero():
    model, pack = made("llama"), Pack(*ONE)
    with kondo.gated(model, price=0.0) as gate:
        gate.preselect(delight=-torch.ones(6))
        loss_of(model, "llama", pack).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters()) and gate.stats.kept == 0
    assert any(p.grad is not None for p in model.parameters())


def test_before_the_forward_several_rows_of_texts():
    ours, theirs = copies(made("llama"))
    pack = Pack((5, 7, 4), (8, 8), (3, 3, 10))
    with kondo.gated(ours, rate=0.4, priority="norm") as gate:
        gate.preselect(norm=torch.tensor([1.0, 5, 2, 7, 3, 8, 4, 6]))
        loss_of(ours, "llama", pack).backward()
    loss_of(theirs, "llama", pack, factors=gate.last.factors().double()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


# What another reader found.


def test_a_pack_after_rows_of_one_text_is_held_against_its_screen():
    model, rows, pack = made("llama"), Pack((12,), (12,), (12,), (12,)), Pack(*ONE)

    def loss(pack, **options):
        logits = model(input_ids=pack.ids, position_ids=pack.place, **options).logits
        logp = logits[:, :-1].log_softmax(-1).gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
        return -(pack.u[pack.text[:, :-1]] * logp * pack.labelled).sum()

    with kondo.gated(model, rule=the_last):
        for each in (rows, rows, pack):
            loss(each, use_cache=False).backward()
        with pytest.raises(kondo.ReplayMismatchError, match="texts of one row see each other"):
            loss(pack, use_cache=True).backward()


class ById(Attention):
    """Tokens of one id see each other, in each row."""

    def __init__(self, told="segment_ids"):
        super().__init__(told)

    def forward(self, ids, **told):
        text, t = told[self.told], ids.shape[1]
        q, k, v = self.qkv(self.token(ids)).chunk(3, -1)
        sees = (text[:, :, None] == text[:, None]) & torch.ones(t, t, dtype=torch.bool).tril()
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=sees))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("named", ["segment_ids", "doc"])
def test_ids_that_rows_count_for_themselves(named, first):
    torch.manual_seed(0)
    ours, theirs = copies(ById(named).double())
    pack = Pack((5, 7, 4), (6, 6, 4))
    told = {named: torch.tensor([[0] * 5 + [1] * 7 + [2] * 4, [0] * 6 + [1] * 6 + [2] * 4])}

    def loss(model, factors=None):
        logp = model(pack.ids, **told)[:, :-1].log_softmax(-1).gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
        u = pack.u if factors is None else pack.u * factors
        return -(u[pack.text[:, :-1]] * logp * pack.labelled).sum()

    keep = torch.tensor([1, 0, 0, 1, 0, 1])
    options = {"segments": "doc"} if named == "doc" else {}
    with kondo.gated(ours, rule=lambda rows: keep.float(), **options) as gate:
        if first:
            gate.preselect(kept=keep.bool())
        loss(ours).backward()
    loss(theirs, keep.double()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


class Told(Attention):
    """What tells the texts has a name of its own, and each text has something, too."""

    def __init__(self, told):
        super().__init__("seq_lens")
        self.by, self.more = told, nn.Linear(3, V)

    def forward(self, ids, **told):
        lengths = told["offsets"].diff() if self.by == "offsets" else told["sizes"]
        logits = super().forward(ids, seq_lens=lengths)
        if "cond" not in told:
            return logits
        return logits + torch.repeat_interleave(self.more(told["cond"]), lengths, 0)[None]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("told", ["offsets", "sizes"])
@pytest.mark.parametrize("segments", ["by name", "by a function"])
def test_what_tells_has_any_name_and_texts_have_something_of_their_own(told, segments, first):
    torch.manual_seed(0)
    ours, theirs = copies(Told(told).double())
    pack = Pack(*ONE)
    given = {told: pack.bounds if told == "offsets" else pack.lengths, "cond": torch.randn(6, 3).double()}

    def loss(model, factors=None):
        logp = model(pack.ids, **given)[:, :-1].log_softmax(-1).gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
        u = pack.u if factors is None else pack.u * factors
        return -(u[pack.text[:, :-1]] * logp * pack.labelled).sum()

    keep = torch.tensor([0, 0, 1, 0, 0, 1])
    by = told if segments == "by name" else lambda ids, **given: pack.lengths
    with kondo.gated(ours, rule=lambda rows: keep.float(), segments=by) as gate:
        if first:
            gate.preselect(kept=keep.bool())
        loss(ours).backward()
    loss(theirs, keep.double()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_a_call_that_is_no_pack_follows_none():
    ours, theirs = copies(made("llama"))
    pack = Pack(*ONE)

    def loss(model, factors=None):
        packed = logits_of(model, "llama", pack)[:, :-1].log_softmax(-1).gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
        plain = model(input_ids=pack.ids, use_cache=False).logits.square().mean()
        f = torch.ones(7) if factors is None else factors
        return (-packed * (pack.u * f[:6])[pack.text[:, :-1]] * pack.labelled).sum() + plain * f[6]

    for options in ({"rate": 0.3}, {"noise": 1.0}, {"rate": 0.3, "priority": "uniform"}):
        ours.zero_grad(), theirs.zero_grad()
        with kondo.gated(ours, **options) as gate:
            loss(ours).backward()
        assert len(gate.last.factors()) == 7
        loss(theirs, gate.last.factors()).backward()
        assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


@pytest.mark.parametrize("rule", [{"rate": "lossless"}, {"noise": 0.3}], ids=str)
def test_terms_of_all_texts_count_beside_a_policy_at_one_position(rule):
    ours, theirs = copies(made("llama"))
    pack = Pack(*ONE)

    def loss(model, factors=None):
        logits = logits_of(model, "llama", pack)
        logp = logits[:, 7:8].log_softmax(-1).gather(-1, pack.ids[:, 8:9, None])
        square = 0.1 * logits.square().mean(-1)
        f = torch.ones(6) if factors is None else factors
        return -1.5 * logp.sum() * f[1] + (square * f[pack.text]).mean()

    with kondo.gated(ours, **rule) as gate:
        loss(ours).backward()
    assert gate.last.rate == 1 if rule == {"rate": "lossless"} else gate.last.norm.all()
    loss(theirs, gate.last.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_a_regression_on_two_outputs_reaches_every_text():
    class Two(Attention):
        def forward(self, ids, **told):
            logits = super().forward(ids, **told)
            return logits[..., 0], logits[..., 1]

    torch.manual_seed(0)
    model, pack = Two("seq_lens").double(), Pack(*ONE)
    with kondo.gated(model, noise=0.5) as gate:
        a, b = model(pack.ids, seq_lens=pack.lengths)
        (a.square() * (pack.text < 3) + b.square() * (pack.text >= 3)).mean().backward()
    assert (gate.last.norm > 0).all()


@pytest.mark.parametrize("features", [16, 15, 1])
def test_before_the_forward_features_that_are_as_many_as_tokens_are_none(features):
    class Pooled(Attention):
        def __init__(self):
            super().__init__("seq_lens")
            self.pooled = nn.Linear(V, features)

        def forward(self, ids, **told):
            logits = super().forward(ids, **told)
            return logits, self.pooled(logits.mean(1))

    torch.manual_seed(0)
    model, pack = Pooled().double(), Pack((16, 7, 4, 7)) if features > 1 else Pack((2, 7, 4, 7))
    with kondo.gated(model, rate=0.25) as gate:
        gate.preselect(kept=torch.tensor([1, 0, 0, 0]).bool())
        logits, pooled = model(pack.ids, seq_lens=pack.lengths)
        assert pooled.shape == (1, features) and logits.shape == (1, pack.total, V)
        with pytest.raises(kondo.PackError, match="gets a gradient and has no tokens"):
            (logits.square().mean() + pooled.square().mean()).backward()


@pytest.mark.parametrize("rows", [ONE, [(5, 7, 4), (8, 8)]], ids=str)
def test_inputs_that_want_a_gradient_get_theirs(rows):
    torch.manual_seed(0)
    outer = nn.Embedding(V, 16).double()
    ours, theirs = copies(made("llama"))
    pack = Pack(*rows)

    def loss(model, factors=None):
        embedded = outer(pack.ids)
        logits = model(inputs_embeds=embedded, position_ids=pack.place, use_cache=False).logits
        logp = logits[:, :-1].log_softmax(-1).gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
        u = pack.u if factors is None else pack.u * factors
        return -(u[pack.text[:, :-1]] * logp * pack.labelled).sum()

    with kondo.gated(ours, rate=0.4) as gate:
        loss(ours).backward()
    mine, outer.weight.grad = outer.weight.grad, None
    loss(theirs, gate.last.factors()).backward()
    assert torch.allclose(mine, outer.weight.grad, rtol=1e-10)
    ours.model.embed_tokens.weight.grad = theirs.model.embed_tokens.weight.grad = None
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_continuous_actions_in_packs():
    class Mean(Attention):
        def forward(self, ids, **told):
            return super().forward(ids, **told)[..., :3]

    torch.manual_seed(0)
    ours, theirs = copies(Mean("seq_lens").double())
    pack = Pack(*ONE)
    actions = torch.randn(1, pack.total, 3).double()

    def loss(model, factors=None):
        logp = torch.distributions.Normal(model(pack.ids, seq_lens=pack.lengths), 1.0).log_prob(actions).sum(-1)
        u = pack.u if factors is None else pack.u * factors
        return -(u[pack.text] * logp).mean()

    with kondo.gated(ours, rate=0.34) as gate:
        loss(ours).backward()
    loss(theirs, gate.last.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_before_the_forward_a_wrong_number_of_texts_is_named():
    model, pack = made("cu_seqlens"), Pack(*ONE)
    for n in (5, 7, 1):
        with kondo.gated(model, rate=0.5) as gate:
            gate.preselect(delight=torch.rand(n))
            with pytest.raises(ValueError, match=f"given {n} samples, and the rows of the call hold 6 texts"):
                logits_of(model, "cu_seqlens", pack)


def test_masks_of_several_rows_and_heads():
    class Seen(Attention):
        def forward(self, ids, mask, position_ids):
            q, k, v = self.qkv(self.token(ids) + self.place(position_ids)).chunk(3, -1)
            return self.head(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)[:, 0])

    torch.manual_seed(0)
    for rows in ([(5, 7, 4)], [(5, 7, 4), (8, 8)]):
        ours, theirs = copies(Seen("").double())
        pack = Pack(*rows)
        mask = (pack.text[:, None, :, None] == pack.text[:, None, None]).tril()

        def loss(model, factors=None, pack=pack, mask=mask):
            logits = model(pack.ids, mask=mask, position_ids=pack.place)
            logp = logits[:, :-1].log_softmax(-1).gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
            u = pack.u if factors is None else pack.u * factors
            return -(u[pack.text[:, :-1]] * logp * pack.labelled).sum()

        with kondo.gated(ours, rate=0.5) as gate:
            loss(ours).backward()
        assert len(gate.last.factors()) == len(pack.lengths)
        loss(theirs, gate.last.factors()).backward()
        assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_rows_are_the_samples_where_that_is_said():
    types_of_tokens = torch.tensor([[0] * 5 + [1] * 7] * 4)
    ids = torch.randint(V, (4, 12))
    assert read(ids=ids, segment_ids=types_of_tokens, options={"segments": False}) == 4
    assert read(ids=ids, seq_lens=torch.tensor([12, 7, 9, 5])) == 4  # of a padded batch


def test_a_pack_that_is_replayed_whole_counts_its_texts():
    class Dropped(Attention):
        def forward(self, ids, **told):
            return F.dropout(super().forward(ids, **told), 0.2, self.training)

    model, pack = Dropped("seq_lens").double(), Pack(*ONE)
    with kondo.gated(model, rate=0.34) as gate:
        loss_of(model, "seq_lens", pack).backward()
    assert gate.stats.forwarded == gate.stats.rows_screened == 6 and gate.stats.skipped == 0


def test_packs_are_told_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", kondo.KondoWarning)
        for kind in ("cu_seqlens", "seq_lens", "llama"):
            model = made(kind)
            with kondo.gated(model, rate=0.34):
                loss_of(model, kind, Pack(*ONE)).backward()


class Shifted(Attention):
    """Log-probs of the next token, (1, T - 1)."""

    def __init__(self):
        super().__init__("seq_lens")

    def forward(self, ids, **told):
        logp = super().forward(ids, **told)[:, :-1].log_softmax(-1)
        return {"log_probs": logp.gather(-1, ids[:, 1:, None]).squeeze(-1)}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("unit", ["token", "prefix"])
def test_labels_that_the_model_shifts_are_run_to_the_end(unit, first):
    torch.manual_seed(0)
    ours, theirs = copies(Shifted().double())
    pack = Pack(*ONE)

    def loss(model, factors=None):
        logp = model(pack.ids, seq_lens=pack.lengths)["log_probs"]
        terms = -pack.u[pack.text[:, :-1]] * logp * pack.labelled
        return (terms if factors is None else terms * factors[pack.text[:, :-1], pack.place[:, :-1]]).sum()

    factors = torch.zeros(6, 9)
    factors[1, :3] = factors[3, 2] = factors[4, 0] = 1  # no text to its end
    with kondo.gated(ours, unit=unit, rate=0.2, audit=0, seed=1) as gate:
        if first:
            gate.preselect(delight=factors + 1e-3 * torch.rand(6, 9))
        loss(ours).backward()
    kept = gate.last.factors().double()
    loss(theirs, F.pad(kept.view(6, -1), (0, 9 - kept.view(6, -1).shape[1]))).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_what_a_text_predicts_of_the_next_is_named():
    torch.manual_seed(0)
    model, pack = Shifted().double(), Pack(*ONE)
    with (
        kondo.gated(model, rule=lambda rows: (torch.arange(len(rows)) == 2).float()),
        pytest.raises(kondo.PackError, match="what a text's last token predicts"),
    ):
        (-pack.u[pack.text[:, :-1]] * model(pack.ids, seq_lens=pack.lengths)["log_probs"]).sum().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("first", [False, True], ids=["screened", "decided first"])
@pytest.mark.parametrize("written", ["slice", "whole", "masked"])
@pytest.mark.parametrize("rows", [[(5, 7, 4, 9)], [(5, 7, 4), (8, 8), (3, 3, 10)]], ids=["one row", "three rows"])
def test_loss_code_may_write_to_the_logits(rows, written, first):
    ours, theirs = copies(made("llama"))
    pack = Pack(*rows)

    def loss(model, factors=None):
        logits = logits_of(model, "llama", pack)
        if written == "slice":
            logits = logits[:, :-1]
            logits.div_(0.9)
        elif written == "whole":
            logits.div_(0.9)
            logits = logits[:, :-1]
        else:
            logits = logits[:, :-1]
            logits[..., 0] = -1e4
        u = pack.u if factors is None else pack.u * factors
        logp = logits.log_softmax(-1).gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
        return -(u[pack.text[:, :-1]] * logp * pack.labelled).sum()

    with kondo.gated(ours, rate=0.34) as gate:
        if first:
            gate.preselect(delight=pack.u)
        loss(ours).backward()
    loss(theirs, gate.last.factors()).backward()
    assert 0 < gate.stats.kept < gate.stats.rows
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
