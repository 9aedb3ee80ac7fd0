"""ms-swift's GRPO trainer without a rollout: a model, and batches as its collator makes them."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from swift.rl_core.data import GRPOBatch
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from swift.rlhf_trainers.utils import build_completion_mask_and_seq_lengths
from transformers import LlamaConfig, LlamaForCausalLM

V = 31


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)


class Trainer(GRPOTrainer):
    """Its own log-probs, loss and metrics."""

    def __init__(self, model, padding_free=False, **options):
        self.model = model
        self.template = SimpleNamespace(padding_free=padding_free, sequence_parallel_size=1)
        self.args = SimpleNamespace(
            per_device_train_batch_size=8, log_entropy=False, top_entropy_quantile=1.0, delta=None, report_to=[]
        )
        self.accelerator = Accelerator(cpu=True)
        self.temperature, self.model_kwarg_keys = 0.9, {"use_cache", "logits_to_keep"}
        self.dynamic_num_samples = self.compute_entropy = self.overlong_filter = self.kl_in_reward = False
        self.rollout_importance_sampling_mode = self.off_policy_sequence_mask_delta = self.chord_sft_iterator = None
        self.log_rollout_offpolicy_metrics = self.disable_rollout_importance_sampling = self._has_teacher = False
        self.importance_sampling_level, self.loss_type, self.beta = "token", "grpo", 0.0
        self.epsilon_low = self.epsilon_high = 0.2
        self.sdar_loss_coef, self.max_completion_length = 0.0, 8
        self.tau_pos, self.tau_neg = 1.0, 1.05
        self.model_accepts_loss_kwargs, self.compute_loss_func, self.current_gradient_accumulation_steps = True, None, 1
        self.__dict__.update(options)

    def log_probs(self, batch):
        """(B, T) of the tokens, as its pass of the old policy takes them."""
        with torch.no_grad():
            return self._get_per_token_logps_and_entropies(self.model, {**batch["model_inputs"]}, batch["grpo_batch"])[
                0
            ]

    def loss(self, batch, factors=None):
        """The loss of one batch and what is logged of it; with ``factors``, those on the gradients of the log-probs."""
        self._factors = factors
        return self._compute_loss_and_metrics(self.model, {**batch["model_inputs"]}, batch["grpo_batch"])

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        log_probs, entropies = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if (factors := getattr(self, "_factors", None)) is not None:
            log_probs.register_hook(lambda grad: grad * factors.view(-1, 1).to(grad))
        return log_probs, entropies


def batch(rows=6, seed=0, padding_free=False, prompt=4, answer=7, texts=None):
    """As the trainer's collator and its pass of the old policy make it."""
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, prompt + 1, (rows,), generator=g).tolist()
    answers = torch.randint(1, answer + 1, (rows,), generator=g).tolist()
    ids = [torch.randint(V, (p + a,), generator=g) for p, a in zip(prompts, answers, strict=True)]
    labels = [torch.cat([torch.full((p,), -100), x[p:]]) for p, x in zip(prompts, ids, strict=True)]
    if padding_free:
        given = {
            "input_ids": torch.cat(ids)[None],
            "position_ids": torch.cat([torch.arange(len(x)) for x in ids])[None],
        }
        labels = torch.cat(labels)[None]
    else:
        longest = max(map(len, ids))

        def padded(rows, value):
            return torch.stack([torch.nn.functional.pad(x, (longest - len(x), 0), value=value) for x in rows])

        given = {"input_ids": padded(ids, 0), "attention_mask": padded([torch.ones_like(x) for x in ids], 0)}
        labels = padded(labels, -100)
    keep = int((labels.shape[-1] - (labels != -100).int().argmax(-1)).max())
    mask, lengths, _ = build_completion_mask_and_seq_lengths(
        labels, rows, padding_free=padding_free, encoded_batch=given, device=torch.device("cpu"), logits_to_keep=keep
    )
    u = torch.randn(rows, 1, generator=g, dtype=torch.float64).expand(mask.shape)
    truncated = torch.zeros(rows, dtype=torch.bool)
    found = GRPOBatch(completion_mask=mask, truncated_mask=truncated, seq_lengths=lengths, logits_to_keep=keep)
    found.advantages, found.num_items_in_batch = u, mask.sum()
    return {"model_inputs": given, "grpo_batch": found}
