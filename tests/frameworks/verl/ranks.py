"""A rank of verl's workers: the same update gated and masked."""

import torch
import torch.distributed as dist
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from verl.models.transformers import monkey_patch

from tests.frameworks.verl import engines
from tests.frameworks.verl.actor import allow_float64
from tests.ranks.launch import at


def _attend(query, key, value, attention_mask, query_length, position_ids, **_):
    """What flash-attention does with positions that start again, (B, T, heads, features)."""
    text = (position_ids[0] == 0).cumsum(0)
    mask = (text[:, None] == text).tril()
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _ulysses(module, query, key, value, attention_mask, position_ids=None, **_):
    """verl's exchange of heads for tokens around it, which it puts around flash-attention alone."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = monkey_patch._ulysses_flash_attention_forward(q, k, v, None, q.shape[1], position_ids=position_ids)
    return out, None


def main(argument):
    """Of each case: how far this rank's gated parameters are from the masked, and from the full ones; what was kept."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    allow_float64()
    monkey_patch._flash_attention_forward = _attend
    AttentionInterface.register("ulysses", _ulysses)
    AttentionMaskInterface.register("ulysses", lambda *_, **__: None)
    return [_case(argument["path"], argument["route"], **case) for case in argument["cases"]]


def _case(path, route, rule="rate=0.25", same_rows=False, **options):
    at(f"{route}, {rule}, {options}")
    data, start = engines.rollouts(path, seed=1 if same_rows else 1 + dist.get_rank())
    kind = engines.recorded(engines.recipe(engines.TEXTS[route], rule))
    try:
        ours, _, found, tokens = engines.updated(path, kind, data, **options)
    except RuntimeError as error:
        return {"refused": str(error)}
    factors = ours.engine.factors
    _, _, wanted, _ = engines.updated(path, engines.Masked, data, factors, **options)
    _, _, full, every = engines.updated(path, engines.FSDPEngineWithLMHead, data, **options)
    return {
        "exact": float(engines.difference(found, wanted, start)),
        "full": float(engines.difference(full, wanted, start)),
        "kept": factors[0].tolist(),
        "tokens": [sum(tokens), sum(every)],
    }
