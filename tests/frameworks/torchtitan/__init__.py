"""torchtitan on a CPU: what its modules import and a CPU cannot have stands here, before any of them is imported.

- The kernels of one way to exchange experts need Triton: their names stand here, and nothing calls them.
- ``torchtitan.experiments.rl`` imports vLLM in its ``__init__``, which is passed by.
- Its trainer is an actor of monarch, and gives its weights away through torchstore: an actor is an object here.
- ``varlen_attn`` runs on GPUs alone: here it is written out, text by text.
"""

import importlib.util
import itertools
import sys
import types
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

FOUND = importlib.util.find_spec("torchtitan")


def varlen(q, k, v, bounds, _bounds_k, _longest, _longest_k, *, scale=None, window_size=(-1, 0), **_):
    """Attention of packed tokens (T, heads, size), causal inside each text."""
    assert tuple(window_size) == (-1, 0)
    ends = bounds.tolist()
    assert ends[-1] == len(q)
    parts = [x.split([b - a for a, b in itertools.pairwise(ends)]) for x in (q, k, v)]
    found = []
    for one in zip(*parts, strict=True):
        heads = (x.transpose(0, 1)[None].double() for x in one)
        found.append(
            scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)
        )
    return torch.cat(found).to(q.dtype)


def _stand_in(name, **members):
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(members)
    sys.modules[name] = module


if FOUND is not None:
    KERNELS = """copy_full_counts_to_peers copy_rows_to_peers expand_topk_grad fill_combine_metadata
    fill_dispatch_metadata invert_flat_indices reduce_topk_slots topk_scores_grad""".split()
    _stand_in("torchtitan.distributed.minimal_async_ep.kernels", **{f"{name}_kernel": None for name in KERNELS})
    _stand_in("monarch")
    _stand_in(
        "monarch.actor",
        Actor=type("Actor", (), {}),
        concurrent_endpoint=lambda method: method,
        current_rank=lambda: types.SimpleNamespace(rank=0),
    )
    _stand_in("torchstore")
    _stand_in("torchtitan.experiments.rl")
    sys.modules["torchtitan.experiments.rl"].__path__ = [
        str(Path(FOUND.submodule_search_locations[0], "experiments", "rl"))
    ]

    from torchtitan.tools import utils

    utils.device_type, utils.device_module = "cpu", torch.cpu
    utils.get_local_device = lambda: torch.device("cpu")

    from torchtitan.models.common import attention

    attention.varlen_attn = varlen
