"""Losses that a model computes itself: exact against a backward masked at its logits, over families of models."""

import copy
import gc
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

import kondo_hooks as kondo

from .cases import FEATURES, K
from .reference import copies, grads, largest_relative_difference

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
B, T = 8, 12


def build(name, **options):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    sizes = SMALL
    if name.startswith("GPT2"):
        sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
    elif name.startswith("T5"):
        sizes = {
            "vocab_size": 50,
            "d_model": 32,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "d_kv": 8,
            "decoder_start_token_id": 0,
        }
    elif name.startswith("DistilBert"):
        sizes = {"vocab_size": 50, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    elif name.startswith("ViT"):
        sizes = {**SMALL, "image_size": 8, "patch_size": 4}
        sizes.pop("vocab_size")
    elif name.startswith("Mixtral"):
        sizes = {**SMALL, "num_local_experts": 4, "num_key_value_heads": 2}
    if name.startswith("Llama"):
        sizes = {**sizes, "pad_token_id": 0}
    model = kind(kind.config_class(**{**sizes, **options}))
    return model if name.startswith("Mixtral") else model.double()  # grouped matrix products are single


def batch_for(name, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (B, T), generator=generator)
    if name.startswith("ViT"):
        images = torch.randn(B, 3, 8, 8, dtype=torch.float64, generator=generator)
        return {"pixel_values": images, "labels": torch.randint(0, 3, (B,), generator=generator)}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "SequenceClassification" in name:
        batch["labels"] = torch.randint(0, 3, (B,), generator=generator)
    elif "TokenClassification" in name:
        batch["labels"] = torch.randint(0, 3, (B, T), generator=generator)
    elif "QuestionAnswering" in name:
        batch["start_positions"] = torch.randint(0, T, (B,), generator=generator)
        batch["end_positions"] = torch.randint(0, T, (B,), generator=generator)
    else:
        batch["labels"] = ids.masked_fill(torch.rand(B, T, generator=generator) < 0.3, -100)
    return batch


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def masked(model, batch, kept, loss_of=lambda out: out.loss, names=("logits",)):
    """The gradient of the same loss with what it sends to dropped rows' logits set to zero."""
    model.zero_grad()
    out = model(**batch)
    tensors = [out[name] for name in names]
    found = torch.autograd.grad(loss_of(out), tensors, retain_graph=True)
    dropped = torch.ones(B, dtype=torch.bool)
    dropped[kept] = False
    torch.autograd.backward(tensors, [g.masked_fill(dropped.view(-1, *[1] * (g.dim() - 1)), 0) for g in found])
    wanted = gradients(model)
    model.zero_grad()
    return wanted


def assert_same(found, wanted, bar=1e-10):
    scale = max(g.abs().max() for g in wanted.values())
    assert scale > 0
    for name, grad in wanted.items():
        assert (found[name] - grad).abs().max() <= bar * scale, name


def check(model, batch, loss_of=lambda out: out.loss, names=("logits",), **options):
    full = loss_of(model(**batch)).item()
    with kondo.gated(model, **{"rate": 0.25, **options}) as gate:
        torch.manual_seed(3)
        loss = loss_of(model(**batch))
        loss.backward()
    found = gradients(model)
    kept = gate.last.kept
    assert len(kept) == 2 and gate.stats.forwarded == 2
    assert loss.item() == pytest.approx(full)
    assert_same(found, masked(model, batch, kept, loss_of, names))
    return gate


MODELS = {
    "LlamaForCausalLM": {},
    "GPT2LMHeadModel": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "Qwen3ForCausalLM": {"head_dim": 8, "num_key_value_heads": 2},
    "T5ForConditionalGeneration": {"dropout_rate": 0},
    "BertForMaskedLM": {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    "ModernBertForMaskedLM": {"pad_token_id": 0, "reference_compile": False},
    "DistilBertForSequenceClassification": {
        "num_labels": 3,
        "dropout": 0,
        "attention_dropout": 0,
        "seq_classif_dropout": 0,
    },
    "LlamaForSequenceClassification": {"num_labels": 3},
    "BertForTokenClassification": {"num_labels": 3, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    "ViTForImageClassification": {"num_labels": 3},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_computed_in_the_model_is_exact(name):
    check(build(name, **MODELS[name]).train(), batch_for(name))


def test_question_answering_has_two_terms():
    name = "BertForQuestionAnswering"
    model = build(name, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    check(model, batch_for(name), names=("start_logits", "end_logits"))


@pytest.mark.parametrize("items", [37, torch.tensor(37)])
def test_num_items_in_batch_and_a_factor_after_it(items):
    model, batch = build("LlamaForCausalLM"), batch_for("Llama")
    batch["num_items_in_batch"] = items
    gate = check(model, batch, lambda out: out.loss * 3)
    assert gate.last.scale == pytest.approx(3 / 37)


def test_logits_to_keep():
    model, batch = build("LlamaForCausalLM"), batch_for("Llama")
    batch["logits_to_keep"] = 5
    batch["labels"] = batch["labels"][:, -5:]
    check(model, batch)


def test_shifted_labels():
    model, batch = build("LlamaForCausalLM"), batch_for("Llama")
    batch["shift_labels"] = batch["labels"]
    check(model, batch)


def test_tuples():
    model, batch = build("LlamaForCausalLM"), batch_for("Llama")
    wanted = check(model, batch).last.kept
    model.zero_grad()
    with kondo.gated(model, rate=0.25) as gate:
        loss, *_ = model(**batch, return_dict=False)
        loss.backward()
    assert gate.last.kept.tolist() == wanted.tolist()
    assert_same(gradients(model), masked(model, batch, wanted))


@pytest.mark.parametrize("shift", [True, False])
def test_label_smoothing_of_the_trainer(shift):
    name = "LlamaForCausalLM" if shift else "BertForTokenClassification"
    model, batch = build(name, **MODELS[name]), batch_for(name)
    labels = batch.pop("labels")
    smooth = LabelSmoother(epsilon=0.1)
    check(model, batch, lambda out: smooth(out, labels, shift_labels=shift))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problems(problem):
    name = "BertForSequenceClassification"
    sizes = {"num_labels": 3, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "problem_type": problem}
    model, batch = build(name, **sizes), batch_for(name)
    batch["labels"] = torch.rand(B, 3, dtype=torch.float64)
    if problem == "regression":
        with kondo.gated(model, rate=0.25), pytest.raises(kondo.DelightError, match="no policy was found"):
            model(**batch).loss.backward()
        assert not gradients(model)
        check(model, batch, priority="uniform")  # random rows need no delight
    else:
        batch["labels"] = batch["labels"].round()
        check(model, batch)


def test_delight_is_the_surprisal_of_the_labels():
    model, batch = build("LlamaForCausalLM"), batch_for("Llama")
    gate = check(model, batch)
    with torch.no_grad():
        logp = model(**batch).logits.log_softmax(-1)[:, :-1]
    labels = batch["labels"][:, 1:]
    picked = logp.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1).masked_fill(labels < 0, 0)
    torch.testing.assert_close(gate.last.delight.double(), -picked.sum(1), rtol=1e-5, atol=1e-5)


def test_dropout_is_that_of_the_full_batch():
    name = "BertForMaskedLM"
    model, batch = build(name).train(), batch_for(name)
    with kondo.gated(model, rate=0.25) as gate:
        torch.manual_seed(3)
        model(**batch).loss.backward()
    found = gradients(model)
    torch.manual_seed(3)
    assert_same(found, masked(model, batch, gate.last.kept))


def test_a_window_over_micro_batches():
    model = build("LlamaForCausalLM")
    batches = [batch_for("Llama", seed) for seed in range(4)]
    with kondo.gated(model, rate=0.1, window=4) as gate:
        for batch in batches:
            model(**batch, num_items_in_batch=200).loss.backward()
    found, kept = gradients(model), gate.last.kept
    assert len(kept) == 3
    total = {}
    for i, batch in enumerate(batches):
        mine = kept[(kept >= i * B) & (kept < (i + 1) * B)] - i * B
        for name, grad in masked(model, {**batch, "num_items_in_batch": 200}, mine).items():
            total[name] = total.get(name, 0) + grad
    assert_same(found, total, 1e-6)  # the model computes its loss in float32


def test_a_window_lets_go_of_the_logits():
    model = build("LlamaForCausalLM")
    with kondo.gated(model, rate=0.02, window=8) as gate:
        for seed in range(4):
            model(**batch_for("Llama", seed)).loss.backward()
        gc.collect()
        logits = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (B, T, 50)]
        assert not logits
        gate.flush()


def test_a_loss_that_comes_and_goes():
    model, batch = build("LlamaForCausalLM"), batch_for("Llama")
    labels = batch.pop("labels")
    with kondo.gated(model, rate=0.25):
        logits = model(**batch).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        wanted = gradients(model)
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
    assert_same(gradients(model), wanted, 1e-6)  # the model computes its loss in float32


def test_a_retained_graph_gives_the_gradient_twice():
    model, batch = build("LlamaForCausalLM"), batch_for("Llama")
    with kondo.gated(model, rate=0.25):
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        once = gradients(model)
        loss.backward()
    assert_same(gradients(model), {name: 2 * grad for name, grad in once.items()})


# What cannot be taken apart.


def test_a_balancing_loss_is_refused_and_named():
    model, batch = build("MixtralForCausalLM", output_router_logits=True), batch_for("Mixtral")
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match=r"tensor that sum .* shared_loss='kept'"):
        model(**batch).loss.backward()
    assert not gradients(model)


def test_a_balancing_loss_on_the_kept_rows_alone():
    model = build("MixtralForCausalLM", output_router_logits=True, router_aux_loss_coef=0.5)
    batch = batch_for("Mixtral")
    with kondo.gated(model, rate=0.25, shared_loss="kept") as gate:
        loss = model(**batch).loss
        loss.backward()
    found, kept = gradients(model), gate.last.kept
    assert loss.item() == pytest.approx(model(**batch).loss.item())
    model.zero_grad()
    # The same: cross-entropy of the whole batch, masked, and the balancing loss of a batch of the kept rows.
    wanted = masked(model, {**batch, "output_router_logits": False}, kept)
    few = {key: value[kept] for key, value in batch.items()}
    (0.5 * model(**few).aux_loss).backward()
    for name, grad in gradients(model).items():
        wanted[name] = wanted.get(name, 0) + grad
    assert_same(found, wanted, 1e-5)


class Contrastive(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x, y):
        logits = self.a(x) @ self.b(y).T
        rows = torch.arange(len(logits))
        return nn.functional.cross_entropy(logits, rows) + nn.functional.cross_entropy(logits.T, rows), logits


def test_a_contrastive_loss_is_refused():
    model = Contrastive()
    with (
        kondo.gated(model, rate=0.25),
        pytest.raises(
            kondo.ReplayMismatchError, match=r"compares rows with each other.*Call the model without its loss"
        ),
    ):
        model(torch.randn(B, 4), torch.randn(B, 5))[0].backward()
    assert not gradients(model)


class Penalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, labels):
        logits = self.layer(x)
        return nn.functional.cross_entropy(logits, labels) + self.layer.bias[0] * 0.1, logits


def test_a_term_that_goes_past_the_rows_is_refused():
    model = Penalised()
    with kondo.gated(model, rate=0.25), pytest.raises((RuntimeError, kondo.ReplayMismatchError), match="rows"):
        model(torch.randn(B, 4), torch.randint(0, 3, (B,)))[0].backward()
    assert not gradients(model)


class OutOfSight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Fused(nn.Module):
    def __init__(self, both):
        super().__init__()
        self.layer, self.both = nn.Linear(4, 3), both

    def forward(self, x, labels):
        logits = self.layer(x)
        loss = OutOfSight.apply(logits)
        return (loss + nn.functional.cross_entropy(logits, labels) if self.both else loss), logits


@pytest.mark.parametrize("both", [True, False])
def test_a_fused_loss_is_refused(both):
    model = Fused(both)
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match="outside"):
        model(torch.randn(B, 4), torch.randint(0, 3, (B,)))[0].backward()
    assert not gradients(model)


class Detaching(nn.Module):
    """Weighs a term by another, detached."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, labels):
        logits = self.layer(x)
        loss = nn.functional.cross_entropy(logits, labels)
        return loss * logits.square().mean().detach(), logits


def test_a_detached_factor_is_refused():
    model = Detaching()
    with kondo.gated(model, rate=0.25), pytest.raises(kondo.ReplayMismatchError, match="a factor that was detached"):
        model(torch.randn(B, 4), torch.randint(0, 3, (B,)))[0].backward()
    assert not gradients(model)


class InPlace(nn.Module):
    """Sums its terms in place and stacks some of them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, labels):
        logits = self.layer(x)
        loss = torch.zeros((), dtype=x.dtype)
        loss += nn.functional.cross_entropy(logits, labels)
        loss *= 2
        terms = [nn.functional.cross_entropy(logits / t, labels, reduction="sum") / len(x) for t in (1.5, 2.0)]
        return loss + torch.stack(terms).mean(), logits


def test_losses_summed_in_place_and_stacked():
    model = InPlace().double()
    x, labels = torch.randn(B, 4, dtype=torch.float64), torch.randint(0, 3, (B,))
    with kondo.gated(model, rate=0.25) as gate:
        loss, _ = model(x, labels)
        loss.backward()
    found = gradients(model)
    model.zero_grad()
    full, logits = model(x, labels)
    assert loss.item() == pytest.approx(full.item())
    (grad,) = torch.autograd.grad(full, logits, retain_graph=True)
    dropped = torch.ones(B, 1, dtype=torch.bool)
    dropped[gate.last.kept] = False
    logits.backward(grad.masked_fill(dropped, 0))
    assert_same(found, gradients(model))


def test_without_a_loss_no_tape_runs():
    model, batch = build("LlamaForCausalLM"), batch_for("Llama")
    batch.pop("labels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with kondo.gated(model, rate=0.25) as gate:
            for _ in range(2):
                model(**batch).logits.logsumexp(-1)
            assert gate._forward.tape is False
            assert model(**batch, labels=batch["input_ids"]).loss.grad_fn is not None
            assert gate._forward.tape is True


# Odd forms, each against the same with every term of a dropped row times zero.

CE, MSE = nn.functional.cross_entropy, nn.functional.mse_loss


def ce(logits, labels, w):
    return (CE(logits, labels, reduction="none") * w).mean()


def mse(a, b, w):
    return ((a - b).square().mean(-1) * w).mean()


def quantised(q, h, w):
    return mse(q, h.detach(), w) + 0.25 * mse(q.detach(), h, w)


FORMS = {
    # name: (what the model computes from features h, logits z, labels y; the same with weights)
    "a detached alias is returned": (lambda h, z, y: (CE(z, y), z.detach()), lambda h, z, y, w: ce(z, y, w)),
    "a vector quantiser": (
        lambda h, z, y: (MSE(z, h.detach()) + 0.25 * MSE(z.detach(), h) + CE(z, y), h, z),
        lambda h, z, y, w: quantised(z, h, w) + ce(z, y, w),
    ),
    "a loss that is logged, too": (
        lambda h, z, y: {"loss": (loss := CE(z, y)), "log": loss.detach(), "again": loss, "twice": loss.detach() * 2},
        lambda h, z, y, w: ce(z, y, w),
    ),
    "a metric under no_grad": (
        lambda h, z, y: (CE(z, y), no_grad(lambda: z.std() * 2)),
        lambda h, z, y, w: ce(z, y, w),
    ),
    "a sum of weighted terms": (
        lambda h, z, y: (CE(z, y, reduction="none") * (y + 1)).sum() / (y + 1).double().sum(),
        lambda h, z, y, w: (CE(z, y, reduction="none") * (y + 1) * w).sum() / (y + 1).double().sum(),
    ),
    "a policy gradient": (
        lambda h, z, y: -(h.detach()[:, 0] * z.log_softmax(-1).gather(1, y[:, None])[:, 0]).mean(),
        lambda h, z, y, w: -(w * h.detach()[:, 0] * z.log_softmax(-1).gather(1, y[:, None])[:, 0]).mean(),
    ),
    "smoothed labels": (
        lambda h, z, y: CE(z, y, label_smoothing=0.1),
        lambda h, z, y, w: (CE(z, y, label_smoothing=0.1, reduction="none") * w).mean(),
    ),
    "weights of classes": (
        lambda h, z, y: CE(z, y, weight=torch.tensor([1.0, 2.0, 3.0], dtype=z.dtype)),
        lambda h, z, y, w: (
            (CE(z, y, torch.tensor([1.0, 2.0, 3.0], dtype=z.dtype), reduction="none") * w).sum()
            / torch.tensor([1.0, 2.0, 3.0], dtype=z.dtype)[y].sum()
        ),
    ),
}


def no_grad(make):
    with torch.no_grad():
        return make()


class Form(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.body, self.head, self.form = nn.Linear(4, 3), nn.Linear(3, 3), form

    def features(self, x):
        h = self.body(x).tanh()
        return h, self.head(h)

    def forward(self, x, y):
        return self.form(*self.features(x), y)


@pytest.mark.parametrize("name", FORMS)
def test_odd_forms(name):
    form, weighted = FORMS[name]
    torch.manual_seed(0)
    model = Form(form).double()
    x, y = torch.randn(B, 4, dtype=torch.float64), torch.randint(0, 3, (B,))
    with kondo.gated(model, rate=0.25) as gate:
        out = model(x, y)
        loss = out["loss"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
        loss.backward()
    found = gradients(model)
    model.zero_grad()
    w = torch.zeros(B, dtype=torch.float64)
    w[gate.last.kept] = 1
    assert len(gate.last.kept) == 2 and gate.stats.forwarded == 2
    h, logits = model.features(x)
    weighted(h, logits, y, w).backward()
    assert_same(found, gradients(model))
    assert loss.item() == pytest.approx(weighted(h, logits, y, torch.ones_like(w)).item())


def test_delight_of_weighted_terms_is_their_own():
    torch.manual_seed(0)
    model = Form(FORMS["a policy gradient"][0]).double()
    x, y = torch.randn(B, 4, dtype=torch.float64), torch.randint(0, 3, (B,))
    with kondo.gated(model, rate=0.25) as gate:
        model(x, y).backward()
    h, logits = model.features(x)
    wanted = -h[:, 0] * logits.log_softmax(-1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(gate.last.delight, wanted.detach())


REFUSED = {
    "a factor made under no_grad": lambda h, z, y: CE(z, y) / no_grad(lambda: z.std()),
    "a ratio made under no_grad": lambda h, z, y: (c := CE(z, y)) + no_grad(lambda: c / 2) * c,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_forms(name):
    torch.manual_seed(0)
    model = Form(REFUSED[name]).double()
    x, y = torch.randn(B, 4, dtype=torch.float64), torch.randint(0, 3, (B,))
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match="gated: "):
        model(x, y).backward()
    assert not gradients(model)


class Averaging(nn.Module):
    """Divides its loss by a buffer that it changes afterwards."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("mean", torch.ones(()))

    def forward(self, x, y):
        loss = CE(self.layer(x), y)
        scaled = loss / self.mean
        with torch.no_grad():
            self.mean.mul_(0.99).add_(0.01 * loss.detach())
        return scaled


def test_a_constant_that_the_forward_changes_is_refused():
    model = Averaging()
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match="changed what it was made of afterwards"):
        model(torch.randn(B, 4), torch.randint(0, 3, (B,))).backward()


class Normalised(nn.Module):
    """Batch norm: a replay of the whole batch could not tell a wrong reading of rows."""

    def __init__(self, both):
        super().__init__()
        self.a, self.b, self.norm, self.both = nn.Linear(4, B), nn.Linear(4, B), nn.BatchNorm1d(B), both

    def forward(self, x, y):
        logits = self.norm(self.a(x))
        if self.both:
            logits = logits @ self.b(x).T
            return CE(logits, y) + CE(logits.T, y)
        return CE(logits[:, :3], y % 3)


@pytest.mark.filterwarnings("ignore")
def test_whole_batches_take_no_doubtful_rows():
    x, y = torch.randn(B, 4), torch.arange(B)
    model = Normalised(both=True)
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match="has no row for each sample"):
        model(x, y).backward()
    model = Normalised(both=False)
    with kondo.gated(model, rate=0.25) as gate:
        model(x, y).backward()
    assert gate.stats.kept == 2 and gate.stats.forwarded == B and gradients(model)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMaskedLM", "T5ForConditionalGeneration"])
def test_autocast_around_and_inside_of_the_model(name):
    sizes = {"num_labels": 3} if "Sequence" in name else {}
    model, batch = build(name, **sizes).float().eval(), batch_for(name)
    with kondo.gated(model, rate=0.25) as gate:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    found, kept = gradients(model), gate.last.kept
    with torch.autocast("cpu", torch.bfloat16):
        wanted = masked(model, batch, kept)
        assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-3)
    assert_same(found, wanted, 2e-2)


class AutocastInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            loss = CE(self.layer(x), y)
        return loss.float()


def test_the_loss_runs_under_the_models_own_autocast():
    torch.manual_seed(0)
    model, x, y = AutocastInside(), torch.randn(B, 4), torch.randint(0, 3, (B,))
    full = model(x, y).item()
    with kondo.gated(model, rate=0.25) as gate:
        loss = model(x, y)
        loss.backward()
    assert loss.item() == full and gate.stats.kept == 2


def test_a_compiled_model_runs_compiled():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, batch = build("LlamaForCausalLM").float(), batch_for("Llama")
    labels = batch.pop("labels")
    fast = torch.compile(model, backend=backend)
    with kondo.gated(fast, rate=0.25) as gate:
        for _ in range(3):
            logits = fast(**batch, use_cache=False).logits
            CE(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    assert compiled and gate.stats.kept == 6
    found = gradients(model)
    model.zero_grad()
    with kondo.gated(model, rate=0.25):
        for _ in range(3):
            CE(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    assert_same(found, gradients(model), 1e-5)


@pytest.mark.parametrize("change", ["none", "div_", "imul", "to"])
def test_a_loss_that_is_changed_in_place_is_still_held_against_the_models(change):
    """Trainers divide the loss that they were given in place; a model moves a count to where it is."""

    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, labels, count):
            logits = self.layer(x)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count.to(loss_device)
            return {"loss": loss.to(loss.dtype) if change == "to" else loss, "logits": logits}

    loss_device = torch.device("cpu")
    model = Counted().double()
    reference = copy.deepcopy(model)
    x, labels, count = torch.randn(6, 4).double(), torch.randint(3, (6,)), torch.tensor(6.0, dtype=torch.float64)
    with kondo.gated(model, rate=0.5) as gate:
        loss = model(x, labels, count)["loss"]
        if change == "div_":
            loss.div_(2)
        elif change == "imul":
            loss *= 0.5
        loss.backward()
    assert gate.stats.forwarded == 3
    logits = reference.layer(x)
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none") * gate.last.factors()
    (each.sum() / 6 * (1 if change in ("none", "to") else 0.5)).backward()
    torch.testing.assert_close(model.layer.weight.grad, reference.layer.weight.grad)


def test_one_row_goes_with_whatever_all_rows_share_and_is_not_taken_for_a_doubt():
    """A value of one row and the returns of all broadcast; beside copies of itself it shows that these have rows."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.policy, self.value = nn.Linear(4, 3), nn.Linear(4, 1)

        def forward(self, x, labels, advantages, returns):
            nll = torch.nn.functional.cross_entropy(self.policy(x), labels, reduction="none")
            value = self.value(x).squeeze(-1)
            return (nll * advantages).mean() + torch.nn.functional.mse_loss(value, returns)

    model = Both().double()
    with kondo.gated(model) as gate:
        for _ in range(3):
            x, labels, numbers = torch.randn(16, 4).double(), torch.randint(3, (16,)), torch.randn(2, 16).double()
            model(x, labels, *numbers).backward()
    assert gate.stats.forwarded == 3


def test_a_term_without_rows_is_named_by_its_last_name():
    class Router(nn.Linear):
        def forward(self, x):
            logits = super().forward(x)
            return logits, {"losses": {"balance": logits.softmax(-1).mean(0).square().sum()}}

    model, x = Router(4, 3), torch.randn(B, 4)
    with kondo.gated(model, rate=0.25), pytest.raises(RuntimeError, match="the model's balance of has no row"):
        logits, more = model(x)
        (CE(logits, torch.zeros(B, dtype=torch.long)) + more["losses"]["balance"]).backward()


class Own(nn.Module):
    """A model that computes its loss itself from its outputs, as loss modules of RL libraries do."""

    def __init__(self, terms):
        super().__init__()
        self.layer, self.terms = nn.Linear(FEATURES, K), terms

    def forward(self, x, actions, advantages, w=1.0):
        return sum((term * w).mean() for term in self.terms(self.layer(x), actions, advantages))


def _log_prob(y, a):
    return torch.distributions.Categorical(logits=y).log_prob(a)


def _picked(y, a):
    return y.gather(1, a.unsqueeze(1)).squeeze(1)


def _ratio(y, a):
    return (_log_prob(y, a) + 1.4).exp()


NO_POLICY = {
    "square": lambda y, a, adv: [(_picked(y, a) - adv).square()],
    "square, negative": lambda y, a, adv: [-torch.neg((_picked(y, a) - adv).pow(2))],
    "absolute": lambda y, a, adv: [(_picked(y, a) - adv).abs() * 0.5],
    "smooth": lambda y, a, adv: [nn.functional.smooth_l1_loss(_picked(y, a), adv, reduction="none")],
    "ratio": lambda y, a, adv: [-_ratio(y, a) * adv],
    "clipped ratio": lambda y, a, adv: [-torch.min(_ratio(y, a) * adv, _ratio(y, a).clamp(0.8, 1.2) * adv)],
    "stacked": lambda y, a, adv: [-torch.stack([_ratio(y, a) * adv, 2 * adv], -1).min(-1).values],
    "ratio and entropy": lambda y, a, adv: [
        -_ratio(y, a) * adv,
        -torch.distributions.Categorical(logits=y).entropy(),
    ],
}


@pytest.mark.parametrize("terms", NO_POLICY.values(), ids=NO_POLICY)
def test_terms_that_hold_no_multiple_of_a_log_prob_are_told(terms):
    torch.manual_seed(0)
    model, reference = copies(Own(terms).double())
    x, actions, advantages = torch.randn(12, FEATURES).double(), torch.randint(K, (12,)), torch.randn(12).double()
    with (
        pytest.raises(kondo.DelightError, match=r"no policy was found in the model's own loss.*priority='norm'"),
        kondo.gated(model, rate=0.25),
    ):
        model(x, actions, advantages).backward()
    with kondo.gated(model, rate=0.25, priority="norm") as gate:
        model.zero_grad()
        model(x, actions, advantages).backward()
    reference(x, actions, advantages, gate.last.factors()).backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


@pytest.mark.parametrize(
    "log_prob", [_log_prob, lambda y, a: torch.distributions.Normal(y, 1.0).log_prob(a[:, None]).sum(1)]
)
@pytest.mark.parametrize("value", [False, True])
def test_terms_that_hold_a_log_prob_give_delight_without_those_of_a_value(log_prob, value):
    torch.manual_seed(0)
    model = Own(lambda y, a, adv: [-log_prob(y, a) * adv, *([(y[:, 0] - adv).square()] if value else [])]).double()
    x, actions, advantages = torch.randn(12, FEATURES).double(), torch.randint(K, (12,)), torch.randn(12).double()
    with warnings.catch_warnings(), kondo.gated(model, rate=0.25) as gate:
        warnings.simplefilter("ignore")
        model(x, actions, advantages).backward()
    torch.testing.assert_close(gate.last.delight, -advantages * log_prob(model.layer(x), actions).detach())


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_transform_inside_of_a_model_that_computes_its_loss(reduction):
    torch.manual_seed(0)

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4).double()

        def forward(self, x, a, u):
            logits = torch.vmap(lambda row: self.linear(row) * 2)(x)
            loss = u * nn.functional.cross_entropy(logits, a, reduction="none")
            return loss if reduction == "none" else loss.mean()

    x, a, u = torch.randn(8, 3).double(), torch.randint(4, (8,)), torch.randn(8).double()
    ours, theirs = copies(Mapped())
    with kondo.gated(ours, noise=0.5) as gate:
        ours(x, a, u).mean().backward()
    logits = theirs.linear(x) * 2
    (u * nn.functional.cross_entropy(logits, a, reduction="none") * gate.last.factors()).mean().backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
