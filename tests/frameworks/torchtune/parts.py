"""What torchtune's GRPO recipe takes from its configuration, small and made here.

The wheel of torchtune 0.6.1 has the recipe and leaves out what that imports of ``torchtune.dev.grpo``, and two
functions that its own version does not have yet. They stand here, under the names that the recipe asks for.
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchtune
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtune import generation, rlhf, training
from torchtune.datasets import PackedDataset

VOCABULARY, PAD, STOP = 24, 0, 1
NAMES = ("input_ids", "labels")


class GRPOTrajectory(NamedTuple):
    """What the recipe fills in, one row an answer."""

    query_responses: Any = None
    logprobs: Any = None
    ref_logprobs: Any = None
    rewards: Any = None
    successes: Any = None
    advantages: Any = None
    masks: Any = None
    position_ids: Any = None
    response_padding_masks: Any = None
    seq_lens: Any = None


class GRPOStats(NamedTuple):
    """What a step of the recipe reports."""

    loss: Any
    policy_loss: Any
    kl_loss: Any
    ratios: Any
    clipfrac: Any
    approx_policy_kls: Any


def generate(model, prompt, *, return_logits, **options):
    """torchtune's own generation, without the logits."""
    return generation.generate(model, prompt, **options)[0], None


def reward(tokenizer, responses, answers):
    """A score of each answer that differs within most groups: (B, G) of responses (B, G, L)."""
    place = torch.arange(1, responses.shape[-1] + 1)
    scores = ((responses * place).sum(-1) % 11) / 11
    return scores, (scores > 0.5).float()


def collate(batch, padding_idx):
    """Prompts of other lengths, padded to the left."""
    longest = max(len(item["tokens"]) for item in batch)
    tokens = [[padding_idx] * (longest - len(item["tokens"])) + item["tokens"] for item in batch]
    return {"tokens": torch.tensor(tokens), "answers": [item["answer"] for item in batch]}


class Loss(nn.Module):
    """Clipped ratios and a KL term, the mean over all tokens; ``simple``: on-policy, the mean of each answer's mean."""

    def __init__(self, epsilon=0.1, kl_coeff=0.1, simple=False):
        super().__init__()
        self.epsilon, self.kl_coeff, self.simple = epsilon, kl_coeff, simple

    def forward(self, old, new, reference, advantages, padding_masks):
        old = new.detach() if self.simple else old
        ratio, u = (new - old).exp(), advantages[:, None]
        clipped = u * ratio.clamp(1 - self.epsilon, 1 + self.epsilon)
        log = reference - new
        kl = log.exp() - log - 1
        gain = torch.minimum(u * ratio, clipped)
        if self.simple:
            policy, distance = (rlhf.masked_mean(x, padding_masks, dim=1).mean() for x in (gain, kl))
        else:
            policy, distance = (rlhf.masked_mean(x, padding_masks) for x in (gain, kl))
        fraction = rlhf.masked_mean((clipped < u * ratio).to(new), padding_masks)
        loss = -(policy - self.kl_coeff * distance)
        return loss, policy.detach(), distance.detach(), ratio.mean().detach(), fraction.detach()


def reshard(model):
    """Give back what the layers gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def log_probs_by_rows(logits, sequences, temperature=1.0, chunk_size=8):
    """Log-probs of the tokens, a few rows at a time, each written to its place."""
    found = logits.new_empty(sequences.shape)
    for rows in (slice(first, first + chunk_size) for first in range(0, len(sequences), chunk_size)):
        found[rows] = rlhf.logits_to_logprobs(logits[rows], sequences[rows], temperature)
    return found


class Tokenizer:
    """As much of one as the recipe asks for."""

    pad_id, eos_id, stop_tokens = PAD, STOP, [STOP]


def prompts(tokenizer, count=16):
    """Prompts of two to four tokens."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 5, (count,), generator=g).tolist()
    return [{"tokens": torch.randint(2, VOCABULARY, (n,), generator=g).tolist(), "answer": ""} for n in lengths]


def texts(tokenizer, packed=False, count=48):
    """Texts of 3 to 9 tokens, of which the first two are a prompt; packed, as many as fit into 24 tokens."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 10, (count,), generator=g).tolist()
    every = [torch.randint(2, VOCABULARY, (n,), generator=g).tolist() for n in lengths]
    found = [{"tokens": text, "labels": [-100, -100, *text[2:]]} for text in every]
    return PackedDataset(found, max_seq_len=24) if packed else found


def queries(tokenizer):
    """Prompts, as the PPO recipe takes them."""
    return [{"tokens": item["tokens"], "labels": item["tokens"]} for item in prompts(tokenizer)]


def preferences(tokenizer, count=32):
    """Pairs of answers to a prompt."""
    chosen, rejected = texts(tokenizer, count=count), texts(tokenizer, count=2 * count)[count:]
    return [
        {
            f"{side}_{name}": text["tokens" if name == "input_ids" else name]
            for side, text in pair.items()
            for name in NAMES
        }
        for pair in ({"chosen": a, "rejected": b} for a, b in zip(chosen, rejected, strict=True))
    ]


class Logger:
    """Keeps what the recipe logs."""

    def __init__(self):
        self.logged = []

    def log_config(self, config):
        """Nothing."""

    def log_dict(self, payload, step):
        """One step."""
        self.logged.append({name: float(value) for name, value in payload.items()})

    def close(self):
        """Nothing."""


def optimizer(parameters, lr):
    """SGD: the parameters after a step tell the gradients apart."""
    return torch.optim.SGD(parameters, lr=lr)


def load_recipe(path):
    """The module of a recipe, which torchtune ships as a file and not as a package."""
    names = {
        "generation": {"generate": generate},
        "rewards": {"batch_shaped_correctness_reward": reward},
        "types": {"GRPOStats": GRPOStats, "GRPOTrajectory": GRPOTrajectory},
    }
    for name, members in {"": {}, ".grpo": {}, **{f".grpo.{name}": found for name, found in names.items()}}.items():
        module = types.ModuleType(f"torchtune.dev{name}")
        module.__path__ = []
        vars(module).update(members)
        sys.modules[module.__name__] = module
    # The recipes ask the device for its memory, for which a CPU has no answer.
    training.get_memory_stats = training.log_memory_stats = training.cleanup_before_training = lambda *_, **__: {}
    training._distributed.recursive_reshard = reshard
    rlhf.batched_logits_to_logprobs = log_probs_by_rows
    file = Path(torchtune.__file__).parent.parent / "recipes" / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def masked(tensor, factors):
    """The same values, whose gradients are multiplied by factors: of rows, or of rows and positions."""
    shape = [*factors.shape, *[1] * (tensor.dim() - factors.dim())]
    found = tensor.clone()
    found.register_hook(lambda grad: grad * factors.view(shape).to(grad))
    return found
