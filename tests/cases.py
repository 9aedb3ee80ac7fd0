"""The table of models and losses that exactness is tested over. A new feature adds a row.

A model takes a :class:`Batch` and returns a policy over K actions for each row, or each position of a row. A loss
takes that policy and row weights: None in the user's code, the 0/1 mask of the kept rows in the slow reference,
which multiplies every term of a dropped row by zero and keeps the denominators.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

K = 7
T = 5
FEATURES = 6


@dataclass
class Batch:
    """Inputs of every kind a model may want; actions, advantages and mask are (B,) or (B, T)."""

    x: Tensor
    ids: Tensor
    image: Tensor
    actions: Tensor
    advantages: Tensor
    old_logp: Tensor
    mask: Tensor
    returns: Tensor

    def rows(self, index: Any) -> "Batch":
        return Batch(**{name: value[index] for name, value in vars(self).items()})

    def to(self, device: str) -> "Batch":
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def make_batch(n: int, sequence: bool, dtype: torch.dtype, seed: int = 0, length: int = T) -> Batch:
    g = torch.Generator().manual_seed(seed)
    shape = (n, length) if sequence else (n,)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    mask = torch.ones(shape, dtype=dtype)
    if sequence:
        lengths = torch.randint(1, length + 1, (n, 1), generator=g)
        mask = (torch.arange(length) < lengths).to(dtype)
    return Batch(
        x=normal(n, length, FEATURES) if sequence else normal(n, FEATURES),
        ids=torch.randint(0, K, (n, length), generator=g),
        image=normal(n, 1, 6, 6),
        actions=torch.randint(0, K, shape, generator=g),
        advantages=normal(*shape),
        old_logp=-2 + 0.3 * normal(*shape),
        mask=mask,
        returns=normal(*shape),
    )


class Mlp(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, K))

    def forward(self, x):
        return self.body(x)


class ScalarOutput(Mlp):
    """Returns a penalty of its own beside the logits, which has no rows."""

    def forward(self, x):
        logits = super().forward(x)
        return logits, next(self.parameters()).pow(2).mean()


class CnnBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, K))

    def forward(self, image):
        return self.body(image)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], dropout: float = 0.0):
        super().__init__()
        self.rnn = kind(FEATURES, 12, num_layers=2, batch_first=True, dropout=dropout)
        self.head = nn.Linear(12, K)

    def forward(self, x, hidden=None):
        output, hidden = self.rnn(x, hidden)
        return self.head(output), hidden


class Transformer(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.embed = nn.Linear(FEATURES, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, K)

    def forward(self, x, *, causal_mask):
        hidden = self.encoder(F.dropout(self.embed(x), 0.1, self.training), mask=causal_mask)
        return {"logits": self.head(hidden)}


class PolicyAndValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh())
        self.policy = nn.Linear(16, K)
        self.value = nn.Linear(16, 1)

    def forward(self, x):
        hidden = self.body(x)
        return self.policy(hidden), self.value(hidden).squeeze(-1), hidden.argmax(-1), None


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(K, 12, mode="mean")
        self.head = nn.Linear(12, K)

    def forward(self, ids, scale):
        return (self.head(self.bag(ids)) * scale,)


class Probabilities(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, K), nn.Softmax(-1))

    def forward(self, x):
        return self.body(x)


class Named(NamedTuple):
    features: Tensor
    log_pi: Tensor


class NamedTupleLogProbs(Mlp):
    def forward(self, x):
        hidden = self.body[:2](x)
        return Named(hidden, self.body[3](hidden).log_softmax(-1))


@dataclass
class Output:
    pi: Tensor
    aux: list


class Flattened(nn.Module):
    """Outputs flattened to (B * T, K), in a dataclass."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, K))

    def forward(self, x):
        flat = x.flatten(0, 1)
        return Output(self.body(flat), [flat.sum(-1), "note", None])


class TokenNll(nn.Module):
    """Returns the nll of each action, and no logits."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, K))

    def forward(self, x, actions):
        return F.cross_entropy(self.body(x).transpose(1, 2), actions, reduction="none")


def gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=K, n_positions=16, n_embd=16, n_layer=2, n_head=2, **options))


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=K,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            **options,
        )
    )


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=K,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            num_labels=K,
        )
    )


def _causal_mask(x: Tensor) -> Tensor:
    return torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype, device=x.device).triu(1)


@dataclass
class ModelCase:
    """How to build a model, call it on a batch, and read the policy's logits (B, [T,] K) off its output."""

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Batch], Any]
    logits: Callable[[Any, Batch], Tensor] = lambda out, batch: out
    sequence: bool = False
    value: Callable[[Any], Tensor] | None = None
    whole_batch: bool = False  # exact only by replaying every row


def _unflatten(out: Output, batch: Batch) -> Tensor:
    return out.pi.view(*batch.actions.shape, K)


MODELS = [
    ModelCase("mlp", Mlp, lambda m, b: m(b.x)),
    ModelCase("mlp_dropout", lambda: Mlp(0.3), lambda m, b: m(b.x)),
    ModelCase("cnn_batch_norm", CnnBatchNorm, lambda m, b: m(b.image), whole_batch=True),
    ModelCase("lstm", lambda: Recurrent(nn.LSTM), lambda m, b: m(b.x), lambda o, b: o[0], sequence=True),
    ModelCase("lstm_dropout", lambda: Recurrent(nn.LSTM, 0.2), lambda m, b: m(b.x), lambda o, b: o[0], sequence=True),
    ModelCase(
        "gru_hidden_state",
        lambda: Recurrent(nn.GRU),
        lambda m, b: m(
            b.x, torch.linspace(-1, 1, 24 * len(b.x), dtype=b.x.dtype, device=b.x.device).view(2, len(b.x), 12)
        ),
        lambda o, b: o[0],
        sequence=True,
    ),
    ModelCase(
        "transformer_dropout",
        lambda: Transformer(0.1),
        lambda m, b: m(x=b.x, causal_mask=_causal_mask(b.x)),
        lambda o, b: o["logits"],
        sequence=True,
    ),
    ModelCase(
        "gpt2",
        lambda: gpt2(attn_implementation="sdpa"),
        lambda m, b: m(input_ids=b.ids, attention_mask=torch.ones_like(b.ids), use_cache=False),
        lambda o, b: o.logits,
        sequence=True,
    ),
    ModelCase("llama", llama, lambda m, b: m(b.ids, use_cache=False), lambda o, b: o.logits, sequence=True),
    ModelCase("bert_classifier", _bert, lambda m, b: m(input_ids=b.ids), lambda o, b: o.logits),
    ModelCase("policy_and_value", PolicyAndValue, lambda m, b: m(b.x), lambda o, b: o[0], value=lambda o: o[1]),
    ModelCase("embedding_bag", Bag, lambda m, b: m(b.ids, b.x.new_full((1,), 0.7)), lambda o, b: o[0]),
    ModelCase("probabilities", Probabilities, lambda m, b: m(b.x), lambda o, b: o.log()),
    ModelCase("named_tuple_log_probs", NamedTupleLogProbs, lambda m, b: m(b.x), lambda o, b: o.log_pi),
    ModelCase("flattened", Flattened, lambda m, b: m(b.x), _unflatten, sequence=True),
]


@dataclass
class LossCase:
    """A loss of the policy's logits, and the weight U on each log-prob that it amounts to.

    ``loss(logits, value, batch, w)``: ``w`` is None, or (B,) weights that multiply each row's terms.
    ``weight(logp, batch)``: U (B,) or (B, T) by hand, so that delight is ``U * -logp``.
    """

    name: str
    loss: Callable[[Tensor, Tensor | None, Batch, Tensor | None], Tensor]
    weight: Callable[[Tensor, Batch], Tensor]


def _w(terms: Tensor, w: Tensor | None) -> Tensor:
    return terms if w is None else terms * w.view(-1, *[1] * (terms.dim() - 1))


def _logp(logits: Tensor, batch: Batch) -> Tensor:
    return logits.log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)


def reinforce_gather(logits, value, batch, w):
    return _w(-batch.advantages * _logp(logits, batch), w).mean()


def reinforce_indexing(logits, value, batch, w):
    logp = logits.flatten(0, -2).log_softmax(-1)
    logp = logp[torch.arange(len(logp)), batch.actions.flatten()].view(batch.actions.shape)
    return _w(-batch.advantages * logp, w).sum()


def cross_entropy_times_advantage(logits, value, batch, w):
    nll = F.cross_entropy(logits.flatten(0, -2), batch.actions.flatten(), reduction="none")
    return _w(batch.advantages * nll.view(batch.actions.shape), w).mean()


def nll_loss_times_advantage(logits, value, batch, w):
    nll = F.nll_loss(logits.log_softmax(-1).flatten(0, -2), batch.actions.flatten(), reduction="none")
    return 3 * _w(batch.advantages * nll.view(batch.actions.shape), w).mean()


def categorical(logits, value, batch, w):
    return _w(-Categorical(logits=logits).log_prob(batch.actions) * batch.advantages, w).mean()


def selective_log_softmax(logits, value, batch, w):
    picked = logits.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    return _w(-(picked - logits.logsumexp(-1)) * batch.advantages, w).mean()


def ppo(logits, value, batch, w):
    policy = Categorical(logits=logits)
    ratio = (policy.log_prob(batch.actions) - batch.old_logp).exp()
    clipped = ratio.clamp(0.8, 1.2)
    loss = _w(-torch.min(ratio * batch.advantages, clipped * batch.advantages), w).mean()
    loss = loss - 0.01 * _w(policy.entropy(), w).mean()
    if value is not None:
        loss = loss + 0.5 * _w((value - batch.returns) ** 2, w).mean()
    return loss


def _ppo_weight(logp, batch):
    ratio = (logp - batch.old_logp).exp()
    clipped = ratio.clamp(0.8, 1.2) * batch.advantages < ratio * batch.advantages
    return torch.where(clipped, 0, ratio * batch.advantages)


def grpo(logits, value, batch, w):
    """Per-token masks, a sequence mean, and the k3 estimate of the KL to the old policy."""
    logp = _logp(logits, batch)
    k3 = (batch.old_logp - logp).exp() - (batch.old_logp - logp) - 1
    ratio = (logp - logp.detach()).exp()
    terms = (-ratio * batch.advantages + 0.05 * k3) * batch.mask
    if terms.dim() == 2:
        terms = terms.sum(1) / batch.mask.sum(1)
    return _w(terms, w).mean()


def _grpo_weight(logp, batch):
    weight = (batch.advantages - 0.05 * (1 - (batch.old_logp - logp).exp())) * batch.mask
    return weight / batch.mask.sum(1, keepdim=True) if weight.dim() == 2 else weight


def plain_cross_entropy(logits, value, batch, w):
    flat, actions = logits.flatten(0, -2), batch.actions.flatten()
    if w is None:
        return F.cross_entropy(flat, actions)
    return _w(F.cross_entropy(flat, actions, reduction="none").view(batch.actions.shape), w).mean()


def one_hot(logits, value, batch, w):
    """Nothing to see in the loss code: delight is read off the boundary."""
    logp = (logits.log_softmax(-1) * F.one_hot(batch.actions, logits.shape[-1])).sum(-1)
    return _w(-logp * batch.advantages, w).mean()


LOSSES = [
    LossCase("reinforce_gather", reinforce_gather, lambda logp, b: b.advantages),
    LossCase("reinforce_indexing_sum", reinforce_indexing, lambda logp, b: b.advantages),
    LossCase("cross_entropy", cross_entropy_times_advantage, lambda logp, b: b.advantages),
    LossCase("nll_loss", nll_loss_times_advantage, lambda logp, b: b.advantages),
    LossCase("categorical", categorical, lambda logp, b: b.advantages),
    LossCase("selective_log_softmax", selective_log_softmax, lambda logp, b: b.advantages),
    LossCase("ppo_entropy_value", ppo, _ppo_weight),
    LossCase("grpo_masks_kl", grpo, _grpo_weight),
    LossCase("plain_cross_entropy", plain_cross_entropy, lambda logp, b: torch.ones_like(logp)),
    LossCase("one_hot", one_hot, lambda logp, b: b.advantages),
]


def hand_delight(case: ModelCase, loss: LossCase, out: Any, batch: Batch) -> Tensor:
    """(B,) delight as the definition has it: sum of U * -logp over a row's positions."""
    logp = _logp(case.logits(out, batch), batch).detach()
    delight = loss.weight(logp, batch) * -logp
    return delight.sum(1) if delight.dim() == 2 else delight
