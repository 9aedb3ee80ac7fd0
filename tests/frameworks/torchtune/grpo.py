"""The GRPO recipe on as many ranks as there are: gated, or masked by what a gate decided, or as it is."""

import os
import re
import tempfile
import warnings
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torchtune import config

import kondo_hooks as kondo
from tests.frameworks.torchtune.parts import VOCABULARY, load_recipe, masked
from tests.reference import Runs

HERE = "tests.frameworks.torchtune.parts"
PAGE = Path(__file__).parents[3] / "docs" / "frameworks" / "torchtune.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
RECIPE = "dev/grpo_full_finetune_distributed.py"
SIZES = {
    "vocab_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "embed_dim": 16,
    "max_seq_len": 32,
}
MODELS = {
    "qwen2": {"_component_": "torchtune.models.qwen2.qwen2", **SIZES, "intermediate_dim": 24},
    "llama3": {"_component_": "torchtune.models.llama3.llama3", **SIZES, "intermediate_dim": 24},
}


def configured(folder, **options):
    """The recipe's configuration: 4 prompts of 4 answers a step, two passes over each batch of answers."""
    model = MODELS[options.pop("model", "qwen2")]
    torch.manual_seed(0)
    Path(folder, "model").mkdir()
    torch.save(config.instantiate(OmegaConf.create(model)).double().state_dict(), Path(folder, "model", "model.pt"))
    checkpointer = {
        "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
        "checkpoint_dir": str(Path(folder, "model")),
        "checkpoint_files": ["model.pt"],
        "output_dir": str(Path(folder, "out")),
        "model_type": "QWEN2",
    }
    values = {
        "device": "cpu",
        "dtype": "fp64",
        "output_dir": str(folder),
        "seed": 3,
        "epochs": 1,
        "resume_from_checkpoint": False,
        "checkpointer": checkpointer,
        "ref_checkpointer": checkpointer,
        "metric_logger": {"_component_": f"{HERE}.Logger"},
        "tokenizer": {"_component_": f"{HERE}.Tokenizer"},
        "model": model,
        "optimizer": {"_component_": f"{HERE}.optimizer", "lr": 0.3},
        "loss": {"_component_": f"{HERE}.Loss", "simple": options.pop("simple", False)},
        "dataset": {"_component_": f"{HERE}.prompts"},
        "collate_fn": f"{HERE}.collate",
        "shuffle": False,
        "batch_size": 4,
        "forward_batch_size": 2,
        "grpo_samples": 4,
        "temperature": 1.0,
        "top_k": None,
        "max_generated_tokens": 6,
        "ppo_epochs": 2,
        "num_steps": 2,
        "save_every_n_epochs": 100,
        "clip_grad_norm": 100.0,
        "compile": False,
    }
    return OmegaConf.create({**values, **options})


def made(cfg):
    """The recipe, set up."""
    found = load_recipe(RECIPE).FullGRPOFinetuneRecipeDistributed(cfg=cfg)
    found.setup(cfg=cfg)
    return found


def parameters(recipe):
    return [p.detach().full_tensor().clone() for p in recipe._model.parameters()]


def screened_first(recipe, gate):
    """Decide by the log-probs of the generation, as the page has it: the learner runs the kept answers alone."""
    exec(BLOCKS[1], {"recipe": recipe, "gate": gate})


def mask_loss(recipe, masks):
    """Multiply the gradients of the log-probs by a decision's factors, step by step."""
    loss, left = recipe._loss_fn, iter(masks)

    def masked_loss(old, new, *rest, **named):
        factors = torch.tensor(next(left), dtype=torch.float64).view(len(new), -1)
        if factors.shape[1] > 1:  # of the positions that predict the answer's tokens
            factors = factors[:, -new.shape[1] - 1 : -1]
        return loss(old, masked(new, factors), *rest, **named)

    recipe._loss_fn = masked_loss


def main(argument):
    """Train gated by a rule, or masked, or as the recipe is; returns what is to be compared."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    rule = dict(argument.get("rule", {}))
    first = rule.pop("screen_first", False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recipe = made(configured(folder, **argument["options"]))
        start, runs, decided, asked = parameters(recipe), Runs(recipe._model, VOCABULARY), [], 0
        if "masks" in argument:
            mask_loss(recipe, argument["masks"][recipe.rank])
        step = recipe.grpo_step
        with kondo.gated(recipe._model, enabled="rule" in argument, **rule) as gate:

            def noted(trajectory, context_length):
                nonlocal asked
                asked += trajectory.query_responses.numel()
                found = step(trajectory, context_length)
                if gate.last is not None:
                    decided.append(gate.last.factors().tolist())
                return found

            recipe.grpo_step = noted
            if first:
                screened_first(recipe, gate)
            recipe.train()
        found = {
            "start": [p.tolist() for p in start],
            "end": [p.tolist() for p in parameters(recipe)],
            "logged": recipe._metric_logger.logged if recipe._is_rank_zero else [],
            "decided": decided,
            "rows": gate.stats.rows,
            "forwarded": gate.stats.forwarded,
            "tokens": sum(runs.tokens),
            "asked": asked,
            "told": [str(each.message) for each in told if issubclass(each.category, kondo.KondoWarning)],
        }
        recipe.cleanup()
    return found
