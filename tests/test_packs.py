"""Rows that hold many texts: the texts are the samples, and the replay is a shorter pack with the same gradient."""

import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import kondo_hooks as kondo
from kondo_hooks.rows.segments import Segments
from tests.kernels import cross_entropy
from tests.reference import TORCH, Runs, copies, grads, largest_relative_difference

V = 29


class Attention(nn.Module):
    """One block in which a text's tokens see each other, told as a training library would tell it."""

    def __init__(self, told, causal=True):
        super().__init__()
        self.told, self.causal = told, causal
        self.token, self.place = nn.Embedding(V, 12), nn.Embedding(32, 12)
        self.qkv, self.head = nn.Linear(12, 36), nn.Linear(12, V)

    def forward(self, ids, doc_lens=None, **told):
        if self.told == "block mask":  # its backward does not run on a CPU
            mask = told["extra"].block_mask
            sees = create_mask(mask.mask_mod, 1, 1, *mask.shape[2:], device="cpu")[0, 0]
            assert torch.equal(mask.to_dense()[0, 0], blocks_of(sees, mask.BLOCK_SIZE[0]))
            return self.attended(ids, sees.sum(1) - 1, sees)
        if self.told == "cu_seqlens":
            lengths = told["cu_seqlens"].diff()
            assert told["max_seqlen"] >= lengths.max()
        elif self.told in ("list", "by position"):
            assert type(doc_lens) is list or self.told == "by position"
            lengths = torch.as_tensor(doc_lens)
        elif self.told == "seq_lens":
            lengths = told["seq_lens"].flatten()
        elif self.told == "doc_lens":
            lengths = told["packing"]["doc_lens"]
        else:
            lengths = told["seq_idx"].flatten().unique_consecutive(return_counts=True)[1]
        text = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        sees = text[:, None] == text
        sees = sees & (torch.ones_like(sees).tril() if self.causal else True)
        return self.attended(ids, torch.cat([torch.arange(int(n)) for n in lengths]), sees)

    def attended(self, ids, place, sees):
        x = (self.token(ids[0]) + self.place(place))[None]

        def attend(x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=sees)

        return self.head(x + checkpoint(attend, x, use_reentrant=False))


def blocks_of(sees, size):
    """Which blocks of this size have any pair."""
    padded = F.pad(sees, (0, -len(sees) % size, 0, -len(sees) % size))
    return padded.unflatten(0, (-1, size)).unflatten(2, (-1, size)).any(3).any(1).int()


SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL |= {"max_position_embeddings": 64, "num_key_value_heads": 1}
TOLD = ("cu_seqlens", "seq_lens", "seq_idx", "doc_lens", "block mask", "list", "by position")
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
    **{told: (lambda told=told: Attention(told)) for told in TOLD},
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
        if kind == "block mask":
            text, n = self.text[0], self.total
            mask = create_block_mask(lambda b, h, q, k: (text[q] == text[k]) & (q >= k), 1, None, n, n, "cpu", 8)
            return (self.ids,), {"extra": SimpleNamespace(block_mask=mask)}
        if kind in ("cu_seqlens", "both ways"):
            longest = int(self.lengths.max())
            longest = longest if kind == "cu_seqlens" else torch.tensor(longest)
            return (self.ids,), {"cu_seqlens": self.bounds.int(), "max_seqlen": longest}
        if kind == "list":
            return (self.ids,), {"doc_lens": self.lengths.tolist()}
        if kind == "by position":
            return (self.ids, self.lengths), {}
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


def jagged(gate, logp, pack):
    """The same marked as rows of a jagged tensor."""
    return gate.logp(torch.nested.nested_tensor_from_jagged(logp, pack.bounds)).values()


# Of (T, V) logits and labels: (T,) log-probs.
FLAT = {
    "gather": lambda gate, y, a, pack: y.log_softmax(-1).gather(-1, a[:, None]).squeeze(-1),
    "gather of logits": lambda gate, y, a, pack: y.gather(-1, a[:, None]).squeeze(-1) - y.logsumexp(-1),
    "gather of logits, others by rows": lambda gate, y, a, pack: (
        y.gather(-1, a[:, None]).squeeze(-1) - torch.stack([row.logsumexp(-1) for row in y])
    ),
    "cross_entropy": lambda gate, y, a, pack: -F.cross_entropy(y, a, reduction="none"),
    "indexing": lambda gate, y, a, pack: y.log_softmax(-1)[torch.arange(len(a)), a],
    "a kernel, marked": lambda gate, y, a, pack: gate.logp(-cross_entropy(y, a)),
    "a kernel, marked as jagged": lambda gate, y, a, pack: jagged(gate, -cross_entropy(y, a), pack),
    "in the logits' place, marked": lambda gate, y, a, pack: gate.logp(-cross_entropy(y, a, "backward")),
}
ONE_ROW = {"squeeze(0)": lambda y: y.squeeze(0), "[0]": lambda y: y[0], "view": lambda y: y.view(-1, V)}


@pytest.mark.parametrize("flat", ONE_ROW)
@pytest.mark.parametrize("name", FLAT)
def test_delight_of_log_probs_of_a_flattened_pack_is_that_of_their_definition(name, flat):
    """Also with a temperature and an entropy bonus, which the gradient at the logits would mix in."""
    ours, theirs = copies(made("llama"))
    pack = Pack(*ONE)
    labels = pack.ids[0].roll(-1)
    u = (pack.u[pack.text] * F.pad(pack.labelled, (0, 1)))[0]

    def loss(model, log_probs, factors=None):
        logits = ONE_ROW[flat](logits_of(model, "llama", pack)) / 0.7
        every = logits.log_softmax(-1)
        terms = -u * log_probs(logits) + 0.1 * u.ne(0) * (every.exp() * every).sum(-1)
        return (terms if factors is None else terms * factors[pack.text[0]]).mean()

    with kondo.gated(ours, rate=0.34) as gate:
        loss(ours, lambda y: FLAT[name](gate, y, labels, pack)).backward()
    plain = FLAT["gather"]
    loss(theirs, lambda y: plain(None, y, labels, pack), gate.last.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    logp = plain(None, (logits_of(theirs, "llama", pack)[0] / 0.7).detach(), labels, pack)
    wanted = torch.zeros(len(pack.lengths), dtype=torch.float64).index_add(0, pack.text[0], -u * logp)
    assert torch.allclose(gate.last.delight, wanted)


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
    if not options:
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
    assert found.tokens(torch.tensor([9, 0, 9])).tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert found.tokens(torch.tensor([1, 0, 2])).tolist() == [0, 4, 5]
    assert found.last.tolist() == [2, 3, 7] and found.next.tolist() == [1, 2, -1]
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


class Masked(Shifted):
    """The same, zero where the label is ignored, as a head has it that is given labels."""

    def forward(self, ids, labels, **told):
        logp = super().forward(ids, **told)["log_probs"]
        return {"log_probs": logp.masked_fill(labels[:, 1:] == -100, 0)}


FACTORS = {
    "one": [0, 0, 1, 0, 0, 0],
    "apart": [0, 2, 0, 1, 0, 0.5],
    "side by side": [1, 1, 0, 0, 1, 1],
    "the last": [0, 0, 0, 0, 0, 1],
}


@pytest.mark.parametrize(
    ("kept", "route"),
    [*itertools.product(FACTORS, ["screen", "window", "first"]), ("one", "token"), ("one", "prefix")],
)
@pytest.mark.parametrize("kind", [Shifted, Masked])
def test_what_a_text_predicts_of_the_next_is_its_own(kind, kept, route):
    torch.manual_seed(0)
    ours, theirs = copies(kind().double())
    packs = [Pack(*ONE, seed=i) for i in range(2 if route == "window" else 1)]
    wanted = torch.tensor(FACTORS[kept], dtype=torch.float64)

    def loss(model, pack, factors=None):
        labels = {"labels": torch.where(pack.place == 0, -100, pack.ids)} if kind is Masked else {}
        logp = model(pack.ids, seq_lens=pack.lengths, **labels)["log_probs"]
        terms = -pack.u[pack.text[:, :-1]] * logp  # nothing is masked here
        return (terms if factors is None else terms * factors[pack.text[:, :-1], pack.place[:, :-1]]).sum()

    def rule(rows):
        return wanted[torch.arange(6) if route != "window" else torch.arange(12) % 6]

    tokens = {"unit": route, "rate": 0.5, "priority": "uniform"} if route in ("token", "prefix") else {"rule": rule}
    with kondo.gated(ours, window=len(packs), audit=0, **tokens) as gate:
        if route == "first":
            gate.preselect(kept=wanted)
        for pack in packs:
            loss(ours, pack).backward()
    every = wanted[:, None].expand(6, 9)
    if "unit" in tokens:
        every = gate.last.factors().double().view(6, 9)
    for pack in packs:
        loss(theirs, pack, every).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


@pytest.mark.parametrize("first", [False, True])
def test_padding_that_a_text_predicts_is_named(first):
    torch.manual_seed(0)
    model, pack = Shifted().double(), Pack(*ONE)
    pack.ids = F.pad(pack.ids, (0, 3))
    bounds = torch.cat([pack.lengths.cumsum(0).new_zeros(1), pack.lengths.cumsum(0)])

    class Bounds(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, cu_seqlens):
            lengths = torch.cat([cu_seqlens.diff(), ids.shape[1] - cu_seqlens[-1:]])
            return self.model(ids, seq_lens=lengths[lengths > 0])

    gated = Bounds()
    last = torch.arange(6) == 5  # the padding is predicted by it
    with kondo.gated(gated, rule=lambda rows: last.float(), audit=0) as gate:
        if first:
            gate.preselect(kept=last)
        loss = -gated(pack.ids, cu_seqlens=bounds)["log_probs"][:, : pack.total].sum()
        with pytest.raises(kondo.PackError, match="where padding follows"):
            loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(TORCH < (2, 9), reason="torch 2.8 runs no mode's functions around flex attention")
def test_flex_attention_is_screened_as_it_runs():
    """Its backward does not run on a CPU, so its output is a constant here."""
    torch.manual_seed(0)

    class Flex(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.head = nn.Embedding(V, 16), nn.Linear(16, V)

        def forward(self, ids, block_mask):
            x = self.token(ids)
            q = x.detach()[:, None]
            seen = flex_attention(q, q, q, block_mask=block_mask)[:, 0]
            return self.head(x + seen)

    ours, theirs = copies(Flex())
    pack = Pack(*ONE)
    text, n = pack.text[0], pack.total
    mask = create_block_mask(lambda b, h, q, k: (text[q] == text[k]) & (q >= k), 1, None, n, n, "cpu", 16)

    def loss(model, factors=None):
        logp = model(pack.ids, block_mask=mask)[:, :-1].log_softmax(-1).gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
        u = pack.u if factors is None else pack.u * factors
        return -(u[pack.text[:, :-1]] * logp * pack.labelled).sum()

    runs = Runs(ours, V)
    with kondo.gated(ours, rate=0.4) as gate:
        loss(ours).backward()
    loss(theirs, gate.last.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-5
    assert int(pack.lengths[gate.last.factors() != 0].sum()) in runs.tokens


@pytest.mark.parametrize("window", [1, 2])
def test_block_masks_of_rows_are_cut_by_rows(window):
    """One with a mask of its own for each row, of other lengths in each call."""
    torch.manual_seed(0)

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.head = nn.Embedding(V, 16), nn.Linear(16, V)

        def forward(self, ids, mask):
            sees = create_mask(mask.mask_mod, len(ids), 1, *mask.shape[2:], device="cpu")
            x = self.token(ids)[:, None]
            return self.head(x + F.scaled_dot_product_attention(x, x, x, attn_mask=sees))[:, 0]

    ours, theirs = copies(Rows().double())

    def batch(n, t):
        left = torch.randint(1, t, (n,))
        mask = create_block_mask(lambda b, h, q, k: (k < left[b]) | (q == k), n, None, t, t, "cpu", 4)
        return torch.randint(V, (n, t)), mask, torch.randn(n, 1).double()

    def loss(model, ids, mask, u, factors=1.0):
        logp = model(ids, mask).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        return -(u * factors * logp).sum()

    batches = [batch(6, 9), batch(5, 11)]
    with kondo.gated(ours, rate=0.4, window=window) as gate:
        for n, each in enumerate(batches):
            loss(ours, *each).backward()
            if window == 1:
                loss(theirs, *each, gate.last.factors()[:, None]).backward()
            elif n:
                factors = gate.last.factors().split([6, 5])
                for one, mine in zip(batches, factors, strict=True):
                    loss(theirs, *one, mine[:, None]).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_what_is_given_by_position_has_its_name_behind_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    wrapped = Wrapper(Wrapper(made("by position")))
    with kondo.gated(wrapped, rate=0.4) as gate:
        loss_of(wrapped, "by position", Pack(*ONE)).backward()
    assert gate.stats.rows == 6


def in_chunks(hidden, head, actions):
    def log_probs(hidden, actions):
        return F.linear(hidden, head).log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    pieces = zip(hidden.split(4, 1), actions.split(4, 1), strict=True)
    return torch.cat([checkpoint(log_probs, h, a, use_reentrant=False) for h, a in pieces], 1)


def squeezed(hidden, head, actions):
    logits = F.linear(hidden.squeeze(0), head)
    return logits.gather(-1, actions[0].unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def squeezed_chunks(hidden, head, actions):
    pieces = zip(hidden[0].split(5), actions[0].split(5), strict=True)
    return torch.cat([-F.cross_entropy(F.linear(h, head), a, reduction="none") for h, a in pieces])[None]


@pytest.mark.parametrize("log_probs", [in_chunks, squeezed, squeezed_chunks], ids=lambda f: f.__name__)
def test_heads_outside_of_the_model_are_marked(log_probs):
    ours, theirs = copies(made("llama"))
    pack = Pack(*ONE)
    head = torch.randn(V, 16, dtype=torch.float64)

    def loss(model, mark, factors=None):
        hidden = model.model(input_ids=pack.ids, position_ids=pack.place, use_cache=False)[0][:, :-1]
        u = pack.u if factors is None else pack.u * factors
        return -(u[pack.text[:, :-1]] * mark(log_probs(hidden, head, pack.ids[:, 1:])) * pack.labelled).sum()

    with kondo.gated(ours.model, rate=0.4) as gate:
        loss(ours, gate.logp).backward()
    delight = kondo_delight(theirs.model, pack, head)
    assert torch.equal(gate.last.factors() != 0, delight >= delight.sort(descending=True).values[1])
    loss(theirs, lambda t: t, gate.last.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def kondo_delight(model, pack, head):
    with torch.no_grad():
        hidden = model(input_ids=pack.ids, position_ids=pack.place, use_cache=False)[0][:, :-1]
        logp = F.linear(hidden, head).log_softmax(-1).gather(-1, pack.ids[:, 1:, None]).squeeze(-1)
    return (
        torch.zeros(len(pack.u))
        .double()
        .index_add(0, pack.text[0, :-1], (-pack.u[pack.text[:, :-1]] * logp * pack.labelled)[0])
    )


@pytest.mark.parametrize("loss_of_tokens", ["gather", "cross entropy", "last tokens"])
@pytest.mark.parametrize("only", [lambda logits: logits.squeeze(0), lambda logits: logits[0]], ids=["squeeze", "[0]"])
def test_a_policy_is_seen_where_the_only_row_has_lost_its_axis(only, loss_of_tokens):
    """Beside a value that would hide it at the boundary."""
    ours, theirs = copies(made("llama"))
    pack = Pack(*ONE)
    first = 7 if loss_of_tokens == "last tokens" else 0

    def loss(model, factors=None):
        logits = only(logits_of(model, "llama", pack))[:-1]
        u = ((pack.u if factors is None else pack.u * factors)[pack.text[:, :-1]] * pack.labelled)[0]
        a, more = pack.ids[0, 1:], 0.1 * (logits.logsumexp(-1).square() * (u != 0)).sum()
        if loss_of_tokens == "cross entropy":
            return (u * F.cross_entropy(logits, a, reduction="none")).sum() + more
        return -(u * logits.log_softmax(-1).gather(-1, a[:, None])[:, 0])[first:].sum() + more

    with kondo.gated(ours, rate=0.4) as gate:
        loss(ours).backward()
    loss(theirs, gate.last.factors()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    head = torch.tensor(theirs.lm_head.weight.detach())
    if not first:
        delight = kondo_delight(theirs.model, pack, head)
        assert torch.equal(gate.last.factors() != 0, delight >= delight.sort(descending=True).values[1])


@pytest.mark.parametrize("kind", ["llama", "cu_seqlens", "by position"])
def test_steps_that_pass_through_count_texts(kind):
    model, pack = made(kind), Pack(*ONE)
    segments = {"segments": "doc_lens"} if kind == "by position" else {}
    with kondo.gated(model, rate=1.0, **segments) as gate:
        loss_of(model, kind, pack).backward()
    assert gate.stats.rows == gate.stats.kept == 6


@pytest.mark.parametrize("window", [3, "step"])
@pytest.mark.parametrize("loss", ["gather", "clip", "entropy", "each another"])
@pytest.mark.parametrize("kind", ["llama", "cu_seqlens"])
def test_packs_that_wait_hold_no_logits(kind, loss, window):
    ours, theirs = copies(made(kind))
    packs = [Pack(lengths, seed=i) for i, lengths in enumerate(THREE)]
    losses = ["gather", "entropy", "clip"] if loss == "each another" else [loss] * 3
    with kondo.gated(ours, window=window, rate=0.4) as gate:
        for pack, each in zip(packs, losses, strict=True):
            loss_of(ours, kind, pack, each).backward()
    factors = gate.last.factors().split([len(pack.lengths) for pack in packs])
    for pack, each, mine in zip(packs, losses, factors, strict=True):
        loss_of(theirs, kind, pack, each, factors=mine).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < EXACT[kind]
    one_pack = packs[0].total * V * 8
    if loss in ("gather", "clip"):
        assert gate.stats.waiting_bytes < one_pack
    elif loss == "entropy":
        assert gate.stats.waiting_bytes > 2 * one_pack


def test_a_pack_that_waits_is_replayed_whole_where_texts_cannot_run_alone():
    ours, theirs = copies(made("llama"))
    packs = [Pack(lengths, seed=i) for i, lengths in enumerate(THREE)]
    for model in (ours, theirs):
        model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: F.dropout(out, 0.3, m.training))
    seeds = iter([*range(3), *range(3)])
    with kondo.gated(ours, window=3, rate=0.4) as gate:
        for pack in packs:
            torch.manual_seed(next(seeds))
            loss_of(ours, "llama", pack).backward()
    assert gate.stats.waiting_bytes < packs[0].total * V * 8
    factors = gate.last.factors().split([len(pack.lengths) for pack in packs])
    for pack, mine in zip(packs, factors, strict=True):
        torch.manual_seed(next(seeds))
        loss_of(theirs, "llama", pack, factors=mine).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_a_head_that_texts_reach_which_were_not_run_is_refused():
    torch.manual_seed(0)
    model, head, pack = Attention("seq_lens").double(), nn.Linear(V, V).double(), Pack(*ONE)
    with kondo.gated(model, rate=0.34) as gate:
        gate.preselect(kept=torch.arange(6) == 2)
        out = head(model(pack.ids, seq_lens=pack.lengths))
        with pytest.raises(RuntimeError, match=r"preselect.* the loss code applies"):
            out.sum().backward()
        gate.preselect(kept=torch.arange(6) == 2)
        out = head(model(pack.ids, seq_lens=pack.lengths)[pack.text == 2])
        out.sum().backward()


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


class Alone(nn.Module):
    """Reads each token by itself, and is told nothing of texts."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, ids):
        return self.head(self.token(ids))


def lone_row(model, u, **options):
    ids = torch.arange(len(u))[None] % V
    with kondo.gated(model, rate=0.5, window=2, **options) as gate:
        for _ in range(2):
            logp = model(ids).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
            (-u * logp).sum().backward()
    return gate


def test_rows_of_a_window_that_look_packed_are_told():
    u = torch.repeat_interleave(torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([4, 6, 3, 5]))
    with pytest.warns(kondo.KondoWarning, match=r"has 3 advantages, each for some tokens.*name it with segments="):
        assert lone_row(Alone(), u).stats.rows == 2
    for options, values in (
        ({"segments": False}, u),
        ({"segments": lambda ids: [4, 6, 3, 5]}, u),
        ({}, torch.full((18,), 0.5)),
        ({}, torch.randn(18)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error", kondo.KondoWarning)
            lone_row(Alone(), values, **options)


@pytest.mark.parametrize("window", [1, 3])
def test_bfloat16_is_within_its_noise(window):
    """Apart from the masked loss by less than that is from float32."""
    ours, theirs = copies(made("llama").bfloat16())
    exact = made("llama").float()
    exact.load_state_dict(theirs.state_dict())
    packs = [Pack(lengths, seed=i) for i, lengths in enumerate(THREE[:window])]
    with kondo.gated(ours, rate=0.4, window=window) as gate:
        for pack in packs:
            loss_of(ours, "llama", pack).backward()
    factors = gate.last.factors().split([len(pack.lengths) for pack in packs])
    for pack, mine in zip(packs, factors, strict=True):
        loss_of(theirs, "llama", pack, factors=mine).backward()
        loss_of(exact, "llama", pack, factors=mine).backward()
    for (name, mine), other, true in zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True):
        apart = (mine.grad.float() - other.grad.float()).norm()
        assert apart <= 1.5 * (other.grad.float() - true.grad).norm() + 1e-6, name
