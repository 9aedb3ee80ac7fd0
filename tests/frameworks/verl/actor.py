"""An actor's worker as verl makes it, a small model, a batch of rollouts."""

import copy
import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from verl import DataProto
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

V, PROMPT, ANSWER = 29, 5, 6


def allow_float64():
    """verl names three types; ``fp64`` is one more, so that a difference can be told from rounding."""
    known = PrecisionType.to_dtype
    PrecisionType.to_dtype = staticmethod(lambda name: torch.float64 if name == "fp64" else known(name))


def saved_model(folder, **sizes):
    """The folder of a random Llama."""
    torch.manual_seed(0)
    small = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 24, "max_position_embeddings": 64, "num_key_value_heads": 2, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**small, initializer_range=0.3, **sizes)).save_pretrained(folder)
    return str(folder)


def worker(path, *, model=None, engine=None, actor=None, dtype="fp64", strategy="fsdp2", lr=1.0, attention="sdpa"):
    """A TrainingWorker as verl's ActorRolloutRefWorker makes it for the actor, with plain SGD."""
    actor = FSDPActorConfig(
        strategy=strategy, rollout_n=1, ppo_micro_batch_size_per_gpu=4, use_torch_compile=False, **(actor or {})
    )
    made = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=path, load_tokenizer=False, override_config={"attn_implementation": attention}, **(model or {})
            ),
            engine_config=FSDPEngineConfig(
                **{
                    "strategy": strategy,
                    "model_dtype": dtype,
                    "mixed_precision": dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), dtype),
                    "use_torch_compile": False,
                    "use_dynamic_bsz": False,
                    "micro_batch_size_per_gpu": 4,
                    "infer_micro_batch_size_per_gpu": 4,
                    **(engine or {}),
                }
            ),
            optimizer_config=FSDPOptimizerConfig(
                optimizer="SGD", lr=lr, weight_decay=0.0, clip_grad=1e9, total_training_steps=8
            ),
            checkpoint_config=CheckpointConfig(),
        )
    )
    torch.manual_seed(0)  # adapters are random
    made.reset()
    made.set_loss_fn(functools.partial(ppo_loss, config=actor))
    return made


def batch(rows=16, seed=1, dtype=torch.float64, **said):
    """Prompts padded to the left and answers to the right, as a rollout leaves them, in verl's training format."""
    g = torch.Generator().manual_seed(seed)
    prompts, answers = (torch.randint(2, n + 1, (rows, 1), generator=g) for n in (PROMPT, ANSWER))
    mask = torch.cat([torch.arange(PROMPT) >= PROMPT - prompts, torch.arange(ANSWER) < answers], 1)
    ids = torch.randint(1, V, (rows, PROMPT + ANSWER), generator=g) * mask
    answer = mask[:, PROMPT:]
    tensors = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0),
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "response_mask": answer.long(),
        "advantages": torch.randn(rows, 1, generator=g, dtype=dtype) * answer,
        "index": torch.arange(rows),
    }
    data = left_right_2_no_padding(DataProto.from_single_dict(tensors).to_tensordict())
    usual = {
        "temperature": 0.9,
        "global_batch_size": rows,
        "mini_batch_size": rows,
        "epochs": 1,
        "seed": 1,
        "compute_loss": False,
    }
    tu.assign_non_tensor(data, **{**usual, "dataloader_kwargs": {"shuffle": False}, **said})
    return data


def add_log_probs(data, trained, seed=2):
    """Those of the policy, by verl's own pass, and some noise, so that ratios differ and some are clipped."""
    found = no_padding_2_padding(trained.infer_batch(copy.deepcopy(data))["log_probs"], data)
    g, dtype = torch.Generator().manual_seed(seed), data["advantages"].dtype
    for name in ("old_log_probs", "ref_log_prob"):
        noise = 0.2 * torch.randn(found.shape, generator=g, dtype=dtype)
        data[name] = (found.to(dtype) + noise) * data["response_mask"]
    return data
