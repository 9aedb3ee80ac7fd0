"""Imports what the programs and ranks of the tests import, once, in the process that they are forked from."""

import contextlib
import importlib

from tests.forks import compile_nothing

MODULES = """
    torch torch.distributed.fsdp torch.distributed.tensor.parallel torch.distributed.device_mesh
    pandas matplotlib.pyplot datasets tokenizers accelerate deepspeed lightning lightning.fabric
    transformers.trainer transformers.models.llama.modeling_llama
    trl.trainer.grpo_trainer trl.trainer.rloo_trainer trl.trainer.sft_trainer trl.trainer.dpo_trainer
    kondo_hooks
"""

for name in MODULES.split():
    with contextlib.suppress(Exception):  # whoever needs it will say so
        importlib.import_module(name)

with contextlib.suppress(ImportError):
    compile_nothing()
