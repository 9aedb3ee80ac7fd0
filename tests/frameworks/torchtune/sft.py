"""The single-device recipe of supervised fine-tuning: a head in chunks, packs, accumulated micro-batches."""

import tempfile
import warnings

import torch

import kondo_hooks as kondo
from tests.frameworks.torchtune.grpo import HERE, configured
from tests.frameworks.torchtune.parts import VOCABULARY, load_recipe, masked
from tests.reference import Runs

RECIPE = "full_finetune_single_device.py"
LOSSES = {
    "chunks": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss", "num_output_chunks": 3},
    "whole": {"_component_": "torch.nn.CrossEntropyLoss"},
}


def made(folder, loss="chunks", packed=False, **options):
    """The recipe, set up: micro-batches of 4 texts, or packs of several, two of them a step."""
    values = {
        "loss": LOSSES[loss],
        "dataset": {"_component_": f"{HERE}.texts", "packed": packed},
        "collate_fn": "torchtune.data.padded_collate_sft",
        "batch_size": 1 if packed else 4,
        "gradient_accumulation_steps": 2,
        "optimizer_in_bwd": False,
        "max_steps_per_epoch": 2,
    }
    cfg = configured(folder, **{**values, **options})
    found = load_recipe(RECIPE).FullFinetuneRecipeSingleDevice(cfg=cfg)
    found.setup(cfg=cfg)
    found.save_checkpoint = lambda epoch: None
    return found


def main(options, rule=None, masks=None):
    """Train gated by a rule, or with each sample's gradient at the logits masked, or as the recipe is."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recipe = made(folder, **options)
        model, asked, decided = recipe._model, [], []
        start = [p.detach().clone() for p in model.parameters()]
        runs = Runs(model, VOCABULARY)
        step = recipe._loss_step

        def note(*_):
            if gate.last is not None:
                decided.append(gate.last.factors())

        def noted(batch):
            if recipe._optimizer is None and asked:  # it steps in the backward
                note()
            asked.append({name: value.clone() for name, value in batch.items()})
            return step(batch)

        recipe._loss_step = noted
        if masks is not None:
            left = iter(masks)
            model.register_forward_hook(lambda model, given, output: masked_logits(output, next(left)))
        with kondo.gated(model, enabled=rule is not None, **(rule or {})) as gate:
            if recipe._optimizer is not None:
                recipe._optimizer.register_step_post_hook(note)
            recipe.train()
            if recipe._optimizer is None:
                note()
        return {
            "start": start,
            "end": [p.detach().clone() for p in model.parameters()],
            "logged": recipe._metric_logger.logged,
            "decided": decided,
            "stats": gate.stats,
            "tokens": sum(runs.tokens),
            "asked": asked,
            "told": [str(each.message) for each in told if issubclass(each.category, kondo.KondoWarning)],
        }


def masked_logits(output, weights):
    """Logits, or chunks of them, the gradients of whose tokens are multiplied by weights, (B, T)."""
    if isinstance(output, torch.Tensor):
        return masked(output, weights)
    sizes = [chunk.shape[1] for chunk in output]
    return [masked(chunk, part) for chunk, part in zip(output, weights.split(sizes, 1), strict=True)]
