"""verl's actor update, gated, equals the same update in which the dropped samples' gradients are masked."""

import copy
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("verl", reason="make frameworks ONLY=verl")

from transformers import LlamaForCausalLM
from verl.utils import tensordict_utils as tu
from verl.workers.config import PolicyLossConfig
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from tests.frameworks.verl.actor import V, add_log_probs, allow_float64, batch, saved_model, worker
from tests.reference import Runs

PAGE = (Path(__file__).parents[3] / "docs" / "frameworks" / "verl.md").read_text()
GATED, SCREEN_FIRST = re.findall(r"```python\n(.*?)```", PAGE, re.S)
ROWS = 16


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


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


def recipe(text, options='rate=0.25, window="step"'):
    """The engine of a snippet of the page, and what verl makes of its registration."""
    told = 'rate=0.1, window="step"'
    assert told in text
    with mock.patch.object(EngineRegistry, "_engines", copy.deepcopy(EngineRegistry._engines)):
        made = {}
        exec(text.replace(told, options), made)
        return EngineRegistry.get_engine_cls("language_model", "fsdp2")


def recorded(kind):
    """The same engine, that notes each step's factors by the samples' numbers in the batch."""

    class Recorded(kind):
        def train_batch(self, data, loss_function):
            self.order = []
            output = super().train_batch(data, loss_function)
            order = data["index"] if "kept" in data.keys() else torch.cat(self.order)
            self.factors = [*getattr(self, "factors", []), torch.zeros(ROWS, dtype=torch.float64)]
            self.factors[-1][order] = self.gate.last.factors().double()
            return output

        def forward_step(self, micro_batch, loss_function, forward_only):
            if not forward_only:
                self.order.append(micro_batch["index"])
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
            factors = self.mask[index].repeat_interleave(offsets.diff()).to(values.dtype)
            values.register_hook(lambda grad: grad * factors)
        return torch.nested.nested_tensor_from_jagged(values, offsets)


def made(path, kind, **options):
    with mock.patch.object(EngineRegistry, "get_engine_cls", lambda *_: kind):
        return worker(path, **options)


def parameters(trained):
    return {name: p.detach().full_tensor().clone() for name, p in trained.engine.module.named_parameters()}


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
    metrics = tu.get(trained.train_mini_batch(copy.deepcopy(data)), "metrics")
    return trained, metrics, parameters(trained), runs.tokens


def rollouts(path, **said):
    plain = made(path, FSDPEngineWithLMHead)
    return add_log_probs(batch(ROWS, **said), plain), parameters(plain)


LOSSES = {"entropy_coeff": 0.01, "use_kl_loss": True, "kl_loss_coef": 0.1}
DYNAMIC = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 30}
# What is a mean or a sum over samples, and what is of the gradient.
LOGGED = ("loss", "actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy_loss", "kl_loss")


def same(a, b, names):
    return all(a[name] == pytest.approx(b[name], rel=1e-9) for name in names if name in a or name in b)


@pytest.mark.parametrize("text", [GATED, SCREEN_FIRST], ids=["gated", "screen-first"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("engine", [{}, DYNAMIC], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("actor", [{}, LOSSES], ids=["clip", "clip, entropy, KL"])
def test_the_update_is_that_of_the_masked_one(path, text, packed, engine, actor):
    options = {"model": {"use_remove_padding": packed}, "engine": engine, "actor": actor}
    data, start = rollouts(path, calculate_entropy=bool(actor))
    ours, logged, found, tokens = updated(path, recorded(recipe(text)), data, **options)
    (factors,) = ours.engine.factors
    _, masked_logs, wanted, _ = updated(path, Masked, data, [factors], **options)
    _, full_logs, full, all_tokens = updated(path, FSDPEngineWithLMHead, data, **options)
    assert int((factors != 0).sum()) == ROWS // 4
    assert difference(found, wanted, start) < 1e-10 < 1e-2 < difference(found, full, start)
    assert same(logged, masked_logs, ["grad_norm"]) and not same(logged, full_logs, ["grad_norm"])
    lengths = data["input_ids"].offsets().diff()
    kept = int(lengths[factors != 0].sum())
    if text is GATED:
        assert same(logged, full_logs, LOGGED)
        assert len(tokens) < len(all_tokens)  # the kept rows of all micro-batches run together
    if packed:
        assert sum(all_tokens) == int(lengths.sum())
        assert sum(tokens) == kept if text is GATED else sum(tokens) < kept + lengths.amax() * len(all_tokens)
    else:
        assert sum(tokens) < sum(all_tokens) / 2


def check(path, text=GATED, options='rate=0.25, window="step"', said=None, bar=1e-10, steps=1, **configuration):
    """One update by a recipe, against the masked one with its factors; the recipe's worker, the factors."""
    data, _ = rollouts(path, **(said or {}))
    start = parameters(made(path, FSDPEngineWithLMHead, **configuration))
    ours, logged, found, tokens = updated(path, recorded(recipe(text, options)), data, **configuration)
    factors = ours.engine.factors
    _, masked_logs, wanted, _ = updated(path, Masked, data, factors, **configuration)
    _, _, full, all_tokens = updated(path, FSDPEngineWithLMHead, data, **configuration)
    assert len(factors) == steps and all((each == 0).any() and (each != 0).any() for each in factors)
    assert difference(found, wanted, start) < bar < 1e-3 < difference(found, full, start)
    assert sum(tokens) < sum(all_tokens)
    return ours, factors


MODES = ["gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "cispo", "dppo_tv", "dppo_kl"]


@pytest.mark.parametrize("mode", MODES)
def test_every_loss_of_verl(path, mode):
    actor = {"policy_loss": PolicyLossConfig(loss_mode=mode, clip_cov_ratio=0.2, kl_cov_ratio=0.2)}
    check(path, actor=actor)


@pytest.mark.parametrize("mode", ["token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("text", [GATED, SCREEN_FIRST], ids=["gated", "screen-first"])
def test_every_denominator_of_verl(path, text, mode):
    check(path, text, actor={"loss_agg_mode": mode})


@pytest.mark.parametrize("text", [GATED, SCREEN_FIRST], ids=["gated", "screen-first"])
@pytest.mark.parametrize("engine", [{}, DYNAMIC], ids=["fixed", "dynamic"])
def test_epochs_and_mini_batches(path, text, engine):
    said = {"mini_batch_size": 8, "epochs": 2, "dataloader_kwargs": {"shuffle": True}}
    check(path, text, said=said, steps=4, lr=0.1, engine=engine)


CONFIGURATIONS = {
    "fsdp": {"strategy": "fsdp"},
    "no checkpoints": {"model": {"enable_gradient_checkpointing": False}},
    "fused head": {"model": {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}}},
    "LoRA": {"model": {"lora_rank": 4, "lora_alpha": 8}},
    "entropy in chunks": {"engine": {"entropy_from_logits_with_chunking": True}},
    "entropy checkpointed": {"engine": {"entropy_checkpointing": True}},
    "compiled entropy": {"engine": {"use_torch_compile": True}},
    "padded to a length": {"engine": {"pad_to_length": True, "pad_to_length_bucket": 16}},
    "a reduction a micro-batch": {"engine": {"use_no_sync_for_gradient_accumulation": False}},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(path, name):
    check(path, said={"calculate_entropy": True}, actor=LOSSES, **CONFIGURATIONS[name])


RULES = ["noise=0.5", "price=0.0", 'rate="lossless"', "rate=0.25, unit='token'", "rate=0.25, history=32"]


@pytest.mark.parametrize("rule", RULES)
def test_rules(path, rule):
    check(path, options=f'{rule}, window="step"')


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
    for packed in (False, True):
        options = {"actor": LOSSES, "model": {"use_remove_padding": packed}}
        plain, *_ = updated(path, Noted, data, **options)
        ours, *_ = updated(path, recorded(recipe(GATED)), data, **options)
        tokens = float(data["response_mask"].sum())
        texts = [
            text for each in plain.engine.noted for text in (each[0].grad * each[0]).split(each[1].diff().tolist())
        ]
        wanted = torch.stack([text.detach().sum() for text in texts]) * tokens
        assert torch.allclose(ours.engine.gate.last.delight, wanted, rtol=1e-6)
