"""The engines of a comparison: as the page writes them, and verl's own with the gradients of dropped samples masked."""

import copy
import re
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from tests.frameworks.verl.actor import V, add_log_probs, batch, worker
from tests.reference import Runs

PAGE = (Path(__file__).parents[3] / "docs" / "frameworks" / "verl.md").read_text()
GATED, SCREEN_FIRST = re.findall(r"```python\n(.*?)```", PAGE, re.S)
MODULE = """
import kondo_hooks as kondo
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

@EngineRegistry.register("language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia")
class ModuleEngine(FSDPEngineWithLMHead):
    def train_batch(self, data, loss_function):
        self.gate = vars(self).get("gate") or kondo.gated(self.module, rate=0.1, window="step")
        with self.gate:
            return super().train_batch(data, loss_function)
"""
TEXTS = {"log-probs": GATED, "module": MODULE, "screen-first": SCREEN_FIRST}
ROWS = 16


class Unsynced(FullyShardedDataParallel):
    """FSDP1 makes ranks alike at its start on an accelerator alone; one rank needs none of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "sync_module_states": False})


def recipe(text, rule="rate=0.25"):
    """The engine of a snippet, as verl finds it after its registration."""
    assert "rate=0.1" in text
    with mock.patch.object(EngineRegistry, "_engines", copy.deepcopy(EngineRegistry._engines)):
        exec(text.replace("rate=0.1", rule), {})
        return EngineRegistry.get_engine_cls("language_model", "fsdp2")


def recorded(kind):
    """The same engine, that notes each step's factors by the samples' numbers in the batch."""

    class Recorded(kind):
        def train_batch(self, data, loss_function):
            self.order = []
            output = super().train_batch(data, loss_function)
            order = data["index"] if self.chooses_first else torch.cat(self.order)
            found = self.gate.last.factors().double()
            found = found if len(found) == len(order) else found.view(len(order), -1)
            self.factors = [*getattr(self, "factors", []), torch.zeros(ROWS + 1, *found.shape[1:], dtype=found.dtype)]
            self.factors[-1][order] = found
            return output

        def forward_step(self, micro_batch, loss_function, forward_only):
            self.chooses_first = "kept" in micro_batch
            if not forward_only:
                padding = (
                    self._get_packed_pad_size(micro_batch["input_ids"].values().numel())
                    and kind.__name__ == "ModuleEngine"
                )
                self.order.append(F.pad(micro_batch["index"], (0, bool(padding)), value=ROWS))  # a text of its own
            return super().forward_step(micro_batch, loss_function, forward_only)

    return Recorded


class Masked(FSDPEngineWithLMHead):
    """verl's engine, in which the gradient at all that the loss is given is multiplied by each sample's factor."""

    def train_batch(self, data, loss_function):
        self.mask = next(self.masks)
        return super().train_batch(data, loss_function)

    def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
        found = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        return {name: self.masked(nested, micro_batch["index"]) for name, nested in found.items()}

    def masked(self, nested, index):
        values, offsets = nested.values(), nested.offsets()
        if values.requires_grad:
            factors = self.mask[index]
            if factors.dim() == 1:
                factors = factors[:, None].expand(-1, int(offsets.diff().max()))
            each = [mine[:n] for mine, n in zip(factors, offsets.diff().tolist(), strict=True)]
            values.register_hook(lambda grad: grad * torch.cat(each).to(grad))
        return torch.nested.nested_tensor_from_jagged(values, offsets)


def made(path, kind, **options):
    with mock.patch.object(EngineRegistry, "get_engine_cls", lambda *_: kind):
        return worker(path, **options)


def parameters(trained):
    whole = (
        (name, p.full_tensor() if isinstance(p, DTensor) else p) for name, p in trained.engine.module.named_parameters()
    )
    return {name: p.detach().clone() for name, p in whole}


def difference(ours, theirs, start):
    """The largest, of any parameter, relative to how far the parameters moved."""
    moved = max((theirs[name] - start[name]).abs().max() for name in theirs)
    assert moved > 1e-3
    return max((ours[name] - theirs[name]).abs().max() for name in theirs) / moved


def updated(path, kind, data, masks=(), **options):
    """An actor update; the worker, its metrics, its parameters, how many tokens each run with a graph had."""
    trained = made(path, kind, **options)
    trained.engine.masks = iter(masks)
    runs = Runs(trained.engine.module, V)
    output = trained.train_mini_batch(copy.deepcopy(data))
    metrics = None if output is None else tu.get(output, "metrics")  # one of the ranks that share texts tells them
    return trained, metrics, parameters(trained), runs.tokens


def rollouts(path, **said):
    plain = made(path, FSDPEngineWithLMHead)
    return add_log_probs(batch(ROWS, **said), plain), parameters(plain)
