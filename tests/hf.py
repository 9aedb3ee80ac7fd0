"""Small models, tokenizers and trainers of the Hugging Face stack, made here and not downloaded."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kondo_hooks.integrations.transformers import KondoCallback

DIGITS = 12
TRAINING = {
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
}


class Recorder(KondoCallback):
    """A KondoCallback that keeps the decisions."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.decisions = []

    def on_optimizer_step(self, *_, **__):
        self.decisions.append(self.gate.last)
        self.engine = self.gate._step.shared.engine.name

    def kept(self):
        return [decision.kept.tolist() for decision in self.decisions]

    def masks(self, batch):
        """Each row's factor, 0 where it was dropped, for each micro-batch."""
        for decision in self.decisions:
            yield from decision.factors().split(batch)


def tokenizer():
    """One token a word: d0 to d11."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"d{i}" for i in range(DIGITS))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],  # older versions add token types
    )


def llama(**options):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": DIGITS + 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # a policy that is not uniform
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def saved(model, folder):
    """The same from a folder, where TRL finds a reference model."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def words(count, seed, length=4):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (count,), generator=generator).tolist()
    return [" ".join(f"d{i}" for i in torch.randint(DIGITS, (n,), generator=generator).tolist()) for n in lengths]


def prompts(count=16):
    return Dataset.from_dict({"prompt": words(count, 1)})


def texts(count=32):
    return Dataset.from_dict({"text": words(count, 2, 8)})


def rows(count=64):
    """Texts of several lengths as token ids and labels."""
    encoded = tokenizer()(list(texts(count)["text"]))["input_ids"]
    return [{"input_ids": ids, "labels": ids} for ids in encoded]


def pad(items):
    """Collate rows to the longest of a micro-batch."""
    longest = max(len(item["input_ids"]) for item in items)

    def padded(name, value):
        return torch.tensor([[*item[name], *[value] * (longest - len(item[name]))] for item in items])

    labels = [item["labels"] for item in items]
    batch = {"input_ids": padded("input_ids", 0), "attention_mask": (padded("input_ids", -1) >= 0).long()}
    batch["labels"] = padded("labels", -100) if isinstance(labels[0], list) else torch.tensor(labels)
    return batch


def preferences(count=32):
    return Dataset.from_dict({"prompt": words(count, 3), "chosen": words(count, 4, 6), "rejected": words(count, 5, 6)})


def reward(completion_ids, **_):
    """A function of the answer that differs within most groups."""
    return [sum((i * 7 + t * 3) % 11 for i, t in enumerate(ids)) / 20 for ids in completion_ids]


def mask_head(trainer, masks, head=lambda model: model.get_output_embeddings()):
    """Mask the gradient at a head's output, row by row, in each micro-batch that trains."""

    def hook(module, args, output):
        if not (torch.is_grad_enabled() and module.training):
            return output
        keep = next(masks).view(-1, *[1] * (output.dim() - 1))
        output = output.clone()
        output.register_hook(lambda grad: grad * keep.to(grad))
        return output

    head(trainer.model).register_forward_hook(hook)


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(found, wanted, start, bar=2e-5):
    moved = max((wanted[name] - start[name]).abs().max() for name in wanted)
    assert moved > 1e-3
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= bar * moved, name
