"""verl's actor update, gated, equals the same update in which the dropped samples' gradients are masked."""

import copy
import itertools
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("verl", reason="make frameworks ONLY=verl")

from transformers import LlamaForCausalLM
from verl.workers.config import PolicyLossConfig
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from tests.frameworks.verl.actor import allow_float64, saved_model, worker
from tests.frameworks.verl.engines import (
    ROWS,
    TEXTS,
    Masked,
    Unsynced,
    difference,
    made,
    parameters,
    recipe,
    recorded,
    rollouts,
    updated,
)
from tests.kernels import cross_entropy
from tests.ranks.launch import launch


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with mock.patch.dict("os.environ", environment):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        allow_float64()
        yield
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _forward_is_put_back(monkeypatch):
    """verl's fused head replaces the forward of the whole class."""
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)


@pytest.fixture(autouse=True)
def _fsdp1_on_a_cpu(monkeypatch):
    monkeypatch.setattr("verl.workers.engine.fsdp.transformer_impl.FSDP", Unsynced)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


LOSSES = {"entropy_coeff": 0.01, "use_kl_loss": True, "kl_loss_coef": 0.1}
DYNAMIC = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 30}
# What is a mean or a sum over samples, and what is of the gradient.
LOGGED = ("loss", "actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy_loss", "kl_loss")


def same(a, b, names):
    return all(a[name] == pytest.approx(b[name], rel=1e-9) for name in names if name in a or name in b)


@pytest.mark.parametrize("route", TEXTS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("engine", [{}, DYNAMIC], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("actor", [{}, LOSSES], ids=["clip", "clip, entropy, KL"])
def test_the_update_is_that_of_the_masked_one(path, route, packed, engine, actor):
    options = {"model": {"use_remove_padding": packed}, "engine": engine, "actor": actor}
    data, start = rollouts(path, calculate_entropy=bool(actor))
    ours, logged, found, tokens = updated(path, recorded(recipe(TEXTS[route])), data, **options)
    (factors,) = ours.engine.factors
    _, masked_logs, wanted, _ = updated(path, Masked, data, [factors], **options)
    _, full_logs, full, all_tokens = updated(path, FSDPEngineWithLMHead, data, **options)
    factors = factors[:ROWS]
    assert int((factors != 0).sum()) == ROWS // 4
    assert difference(found, wanted, start) < 1e-10 < 1e-2 < difference(found, full, start)
    assert same(logged, masked_logs, ["grad_norm"]) and not same(logged, full_logs, ["grad_norm"])
    lengths = data["input_ids"].offsets().diff()
    kept = int(lengths[factors != 0].sum())
    if route != "screen-first":
        assert same(logged, full_logs, LOGGED)
        assert len(tokens) < len(all_tokens)  # the kept rows of all micro-batches run together
    if packed:
        assert sum(all_tokens) == int(lengths.sum())
        assert sum(tokens) == kept if route != "screen-first" else sum(tokens) < kept + lengths.amax() * len(all_tokens)
    else:
        assert sum(tokens) < sum(all_tokens) / 2


def check(path, route="log-probs", rule="rate=0.25", said=None, bar=1e-10, steps=1, **configuration):
    """One update by a recipe, against the masked one with its factors; the recipe's worker, the factors."""
    data, _ = rollouts(path, **(said or {}))
    start = parameters(made(path, FSDPEngineWithLMHead, **configuration))
    ours, _, found, tokens = updated(path, recorded(recipe(TEXTS[route], rule)), data, **configuration)
    factors = ours.engine.factors
    _, _, wanted, _ = updated(path, Masked, data, factors, **configuration)
    _, _, full, all_tokens = updated(path, FSDPEngineWithLMHead, data, **configuration)
    assert len(factors) == steps and all((each[:ROWS] == 0).any() and (each != 0).any() for each in factors)
    assert difference(found, wanted, start) < bar
    assert difference(found, full, start) > 1e-3 or "lossless" in rule
    assert sum(tokens) < sum(all_tokens)
    return ours, factors


MODES = ["gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "cispo", "dppo_tv", "dppo_kl"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("route", ["log-probs", "module"])
def test_every_loss_of_verl(path, route, mode):
    actor = {"policy_loss": PolicyLossConfig(loss_mode=mode, clip_cov_ratio=0.2, kl_cov_ratio=0.2)}
    check(path, route, actor=actor)


@pytest.mark.parametrize("mode", ["token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("route", TEXTS)
def test_every_denominator_of_verl(path, route, mode):
    check(path, route, actor={"loss_agg_mode": mode})


@pytest.mark.parametrize("route", TEXTS)
@pytest.mark.parametrize("engine", [{}, DYNAMIC], ids=["fixed", "dynamic"])
def test_epochs_and_mini_batches(path, route, engine):
    said = {"mini_batch_size": 8, "epochs": 2, "dataloader_kwargs": {"shuffle": True}}
    check(path, route, said=said, steps=4, lr=0.1, engine=engine)


FUSED = {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}}
CONFIGURATIONS = {
    "fsdp": {"strategy": "fsdp"},
    "fsdp, padded": {"strategy": "fsdp", "model": {"use_remove_padding": False}},
    "no checkpoints": {"model": {"enable_gradient_checkpointing": False}},
    "fused head": {"strategy": "fsdp", "model": FUSED},
    "fused head, padded": {"strategy": "fsdp", "model": {**FUSED, "use_remove_padding": False}},
    "LoRA": {"model": {"lora_rank": 4, "lora_alpha": 8}},
    "entropy in chunks": {"engine": {"entropy_from_logits_with_chunking": True}},
    "entropy checkpointed": {"engine": {"entropy_checkpointing": True}},
    "compiled entropy": {"engine": {"use_torch_compile": True}},
    "padded to a length": {"engine": {"pad_to_length": True, "pad_to_length_bucket": 16}},
    "a reduction a micro-batch": {"engine": {"use_no_sync_for_gradient_accumulation": False}},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("route", ["log-probs", "module"])
def test_configurations(path, route, name):
    check(path, route, said={"calculate_entropy": True}, actor=LOSSES, **CONFIGURATIONS[name])


@pytest.mark.parametrize("types, bar", [("fp32", 1e-5), ("bf16", 5e-2)])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("route", TEXTS)
def test_types(path, route, packed, types, bar):
    """float32; and parameters in float32 that run in bfloat16, as verl does by default."""
    mixed = None if types == "bf16" else dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    options = {"dtype": "fp32", "engine": {"mixed_precision": mixed}, "model": {"use_remove_padding": packed}}
    check(path, route, bar=bar, said={"dtype": torch.float32}, **options)


RULES = ["noise=0.5", "price=0.0", 'rate="lossless"', "rate=0.25, history=32"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("route", ["log-probs", "module"])
def test_rules(path, route, rule):
    check(path, route, rule)


def test_tokens(path):
    """One micro-batch: then each text has as many factors as the longest of the batch has tokens."""
    check(path, rule="rate=0.25, unit='token'", engine={"micro_batch_size_per_gpu": ROWS})


def test_delight_is_the_weight_of_each_log_prob_times_its_surprisal(path):
    """By the definition, from the gradient at verl's own log-probs; an entropy bonus is no part of it."""

    class Noted(FSDPEngineWithLMHead):
        noted = ()

        def prepare_model_outputs(self, *args, **kwargs):
            found = super().prepare_model_outputs(*args, **kwargs)
            log_probs, offsets = found["log_probs"].values(), found["log_probs"].offsets()
            log_probs.retain_grad()
            self.noted = [*self.noted, (log_probs, offsets)]
            return {**found, "log_probs": torch.nested.nested_tensor_from_jagged(log_probs, offsets)}

    data, _ = rollouts(path, calculate_entropy=True)
    for packed, route in itertools.product((False, True), ("log-probs", "module")):
        options = {"actor": LOSSES, "model": {"use_remove_padding": packed}}
        plain, *_ = updated(path, Noted, data, **options)
        ours, *_ = updated(path, recorded(recipe(TEXTS[route])), data, **options)
        tokens = float(data["response_mask"].sum())
        texts = [
            text for each in plain.engine.noted for text in (each[0].grad * each[0]).split(each[1].diff().tolist())
        ]
        wanted = torch.stack([text.detach().sum() for text in texts]) * tokens
        found = ours.engine.gate.last.delight
        if packed or route == "log-probs":
            assert torch.allclose(found, wanted)
        else:  # verl picks the log-probs where nobody can follow, so delight is read at the model's logits
            assert 0.01 < (found - wanted).abs().max() / wanted.abs().max() < 0.1


@pytest.fixture
def _flash_attention(monkeypatch):
    """Its cross-entropy, which verl takes on a GPU: one operation, that writes its gradient over the logits."""
    library = "verl.utils.torch_functional"

    def loss(logits, labels, inplace_backward):
        return cross_entropy(logits, labels, "backward" if inplace_backward else None), None

    monkeypatch.setattr(f"{library}.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    monkeypatch.setattr(f"{library}.cross_entropy_loss", loss, raising=False)


@pytest.mark.usefixtures("_flash_attention")
@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("route", ["log-probs", "module"])
def test_flash_attentions_cross_entropy(path, route, packed, temperature):
    said = {"temperature": temperature, "mini_batch_size": 8}
    check(path, route, said=said, steps=2, lr=0.1, model={"use_remove_padding": packed})


RANKS = [
    {},
    {"engine": DYNAMIC},
    {"model": {"use_remove_padding": False}},
    {"rule": "scope='global', rate=0.25"},
]
ULYSSES = {"same_rows": True, "attention": "ulysses", "engine": {"ulysses_sequence_parallel_size": 2}}


@pytest.mark.parametrize("route", TEXTS)
def test_two_ranks(path, route):
    """Each with texts of its own, and at last with a part of the tokens and of the heads of each text (Ulysses)."""
    argument = {"path": path, "route": route, "cases": [*RANKS, ULYSSES]}
    *cases, parts = zip(*launch("tests.frameworks.verl.ranks", 2, argument, 200, fresh=True), strict=True)
    for told in cases:
        assert not [rank["refused"] for rank in told if "refused" in rank]
        assert all(rank["exact"] < 1e-10 and rank["full"] > 1e-2 for rank in told)
        assert all(rank["tokens"][0] < rank["tokens"][1] for rank in told)
        assert told[0]["kept"] != told[1]["kept"]
    if route == "log-probs":
        a, b = parts
        assert a["exact"] < 1e-10 and b["exact"] < 1e-10 and a["full"] > 1e-2
        assert a["kept"] == b["kept"] and a["tokens"][0] < a["tokens"][1]
    else:
        assert all("verl's ulysses_sequence_parallel_size" in rank["refused"] for rank in parts)


def test_screen_first_refuses_a_pack_that_verl_has_made_longer(path):
    with pytest.raises(ValueError, match="given 4 samples, and the rows of the call hold 5 texts"):
        check(path, "screen-first", engine={"pad_to_length": True, "pad_to_length_bucket": 64})


@pytest.mark.parametrize("route", ["log-probs", "screen-first"])
def test_the_page_as_it_stands(path, route, tmp_path, monkeypatch):
    """The module that verl is told to import in each worker."""
    (tmp_path / "kondo_actor.py").write_text(TEXTS[route])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kondo_actor", raising=False)
    monkeypatch.setattr(EngineRegistry, "_engines", copy.deepcopy(EngineRegistry._engines))
    data, start = rollouts(path)
    plain = worker(path, model={"external_lib": "kondo_actor"})
    assert type(plain.engine).__module__ == "kondo_actor"
    plain.train_mini_batch(copy.deepcopy(data))
    assert plain.engine.gate.stats.kept == 2 and parameters(plain).keys() == start.keys()
