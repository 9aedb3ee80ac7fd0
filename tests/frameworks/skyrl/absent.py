"""What SkyRL imports and a CPU does not have, or this test does not need. Import this before SkyRL.

``flash_attn``'s (un)padding is written in PyTorch. Ray, the inference servers and the data loading are mocks that
nothing here calls. ``skyrl.backends`` is entered without its ``__init__``, which needs Python 3.12 (its types for the
Tinker API).
"""

import importlib.machinery
import importlib.util
import sys
import types
from unittest.mock import MagicMock

import torch
from torch.nn import functional as F

MOCKED = ("ray", "tensordict", "datasets", "polars", "hydra", "func_timeout", "torchdata", "skyrl_gym", "s3fs")
MOCKED += ("cloudpathlib", "aiohttp", "wandb", "vllm", "fastapi", "uvicorn", "tensorboard")


def unpad_input(x, attention_mask):
    index, lengths = attention_mask.flatten().nonzero().flatten(), attention_mask.sum(1)
    return x.flatten(0, 1)[index], index, F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()), lengths


def pad_input(x, indices, batch, seqlen):
    full = x.new_zeros(batch * seqlen, *x.shape[1:])
    return full.index_copy(0, indices, x).view(batch, seqlen, *x.shape[1:])


class Mocks:
    """Finds the modules that are not there."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MOCKED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        made = MagicMock(name=spec.name)
        made.__path__, made.__spec__, made.__name__, made.__file__ = [], spec, spec.name, spec.name
        return made

    def exec_module(self, module):
        if module.__name__ == "ray":
            module.is_initialized.return_value = False
            module.remote = lambda *given, **_: given[0] if given else lambda found: found


def _module(name, **contents):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(contents)
    sys.modules[name] = made


_folder = importlib.util.find_spec("skyrl").submodule_search_locations[0]
sys.meta_path.append(Mocks())
_module("flash_attn")
_module("flash_attn.bert_padding", unpad_input=unpad_input, pad_input=pad_input)
_module("skyrl.backends", __path__=[f"{_folder}/backends"])
torch.cuda.current_device = lambda: "cpu"
