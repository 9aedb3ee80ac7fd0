"""Lightning: the callback's steps are exact against masked losses, its hooks keep their word; Fabric needs nothing."""

import contextlib
import csv
import logging
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pl = pytest.importorskip("lightning.pytorch")
from lightning.fabric import Fabric  # noqa: E402
from lightning.pytorch.callbacks import GradientAccumulationScheduler  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

import kondo_hooks as kondo  # noqa: E402
from kondo_hooks.integrations.lightning import KondoCallback  # noqa: E402
from tests.ranks.launch import launch  # noqa: E402

B, ACTIONS = 8, 4
METRICS = {f"kondo/{name}" for name in "rate kept skipped delight_kept delight_dropped price".split()}

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


def batches(count=3, dtype=torch.float64):
    """The first ``count`` of always the same batches."""
    g, rows = torch.Generator().manual_seed(1), []
    for _ in range(count):
        x, advantages = torch.randn(B, 5, generator=g).to(dtype), torch.randn(B, generator=g).to(dtype)
        rows.append((x, torch.randint(ACTIONS, (B,), generator=g), advantages))
    return DataLoader(TensorDataset(*(torch.cat(column) for column in zip(*rows, strict=True))), batch_size=B)


def delight_of(log_probs, advantages):
    return -log_probs.detach() * advantages


def mask_of(delight, rate):
    """One for the rows of most delight, zero for the others: what the gate keeps, by definition."""
    mask = torch.zeros_like(delight)
    mask[delight.topk(max(1, round(rate * len(delight)))).indices] = 1
    return mask


class Policy(pl.LightningModule):
    """A policy gradient; ``masks`` holds what the terms of each coming batch are multiplied by."""

    def __init__(self, call="self", manual=0, masks=None, schedule=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, ACTIONS)).double()
        self.call, self.manual, self.masks = call, manual, masks
        self.automatic_optimization = not manual
        self.gated_in_validation = []

    def forward(self, x):
        return self.net(x)

    def log_probs(self, batch):
        x, actions, _ = batch
        logits = self(x) if self.call == "self" else self.net(x)
        return torch.log_softmax(logits, -1).gather(1, actions.unsqueeze(1)).squeeze(1)

    def loss(self, batch):
        terms = -batch[2] * self.log_probs(batch)
        if self.masks is not None:
            terms = terms * self.masks.pop(0).to(terms)
        return terms.mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        if self.manual:
            self.manual_backward(loss / self.manual)
            if (batch_idx + 1) % self.manual == 0:
                optimizer = self.optimizers()
                optimizer.step()
                optimizer.zero_grad()
            return None
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def trainer_of(*callbacks, **options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **options})


def reference(rate, population=1, clip=None, count=3, data=None):
    """Parameters after the steps of plain PyTorch, with the dropped rows' terms multiplied by zero."""
    model = Policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = data or (list(batches(count)) if count else [])
    for i in range(0, len(data), population):
        group = data[i : i + population]
        mask = mask_of(torch.cat([delight_of(model.log_probs(b), b[2]) for b in group]), rate).split(B)
        for batch, kept in zip(group, mask, strict=True):
            ((-batch[2] * model.log_probs(batch) * kept).mean() / population).backward()
        if clip:
            assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(model, wanted, bar=1e-12):
    start = Policy().state_dict()
    for name, value in wanted.state_dict().items():
        assert (value - start[name]).abs().max() > 1e-3
        assert (model.state_dict()[name] - value).abs().max() < bar, name


def assert_ungated(model):
    for module in model.modules():
        assert "_compiled_call_impl" not in module.__dict__
        assert not module._forward_hooks_with_kwargs


# Exactness.


@pytest.mark.parametrize("call, module", [("self", None), ("net", "net")])
def test_automatic_optimization_is_exact(call, module):
    model, callback = Policy(call), KondoCallback(module, rate=0.25)
    trainer_of(callback).fit(model, batches())
    assert_same(model, reference(0.25))
    stats = callback.state_dict()["stats"]
    assert (stats["rows"], stats["kept"], stats["forwarded"]) == (3 * B, 6, 6)
    assert_ungated(model)


@pytest.mark.parametrize("window, count", [(None, 6), ("auto", 6), (8, 6)])
def test_an_accumulation_is_one_population(window, count):
    options = {} if window is None else {"window": window}
    model, callback = Policy(), KondoCallback(rate=0.125, **options)
    trainer_of(callback, accumulate_grad_batches=2).fit(model, batches(count))
    assert_same(model, reference(0.125, 2, count=count))
    assert callback.state_dict()["stats"]["steps"] == count / 2


def test_the_same_module_with_masks_in_its_loss_ends_the_same():
    """In the same trainer, where ``reference`` is a loop of its own."""
    model, masks, data = Policy(), [], list(batches(6))
    trainer_of(KondoCallback(rate=0.125), accumulate_grad_batches=2).fit(model, batches(6))
    for i in (0, 2, 4):
        before = reference(0.125, 2, count=i)
        masks += mask_of(torch.cat([delight_of(before.log_probs(b), b[2]) for b in data[i : i + 2]]), 0.125).split(B)
    masked = Policy(masks=masks)
    trainer_of(accumulate_grad_batches=2).fit(masked, batches(6))
    assert_same(model, masked)


def test_an_accumulation_that_the_epoch_ends_is_decided_before_the_step():
    model, callback = Policy(), KondoCallback(rate=0.25)
    trainer_of(callback, accumulate_grad_batches=4).fit(model, batches(3))
    wanted, data = Policy(), list(batches(3))
    mask = mask_of(torch.cat([delight_of(wanted.log_probs(b), b[2]) for b in data]), 0.25).split(B)
    for batch, kept in zip(data, mask, strict=True):
        ((-batch[2] * wanted.log_probs(batch) * kept).mean() / 4).backward()
    torch.optim.SGD(wanted.parameters(), lr=0.5).step()
    assert_same(model, wanted)
    assert callback.state_dict()["stats"]["kept"] == 6


def test_an_accumulation_that_is_cut_short_leaves_nothing_to_the_next_epoch():
    class Short(Policy):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None  # one batch of the second accumulation is left without a step

    model, callback = Short(), KondoCallback(rate=0.25)
    trainer_of(callback, accumulate_grad_batches=2, max_epochs=2).fit(model, batches(4))
    stats = callback.state_dict()["stats"]
    assert (stats["steps"], stats["rows"], stats["kept"]) == (4, 6 * B, 2 * (4 + 2))
    assert_same(model, reference(0.25, 2, data=2 * list(batches(2))))


def test_a_scheduled_accumulation_is_followed():
    callback = KondoCallback(rate=0.125)
    scheduler = GradientAccumulationScheduler(scheduling={0: 1, 1: 3})
    trainer_of(callback, scheduler, max_epochs=2).fit(Policy(), batches(3))
    assert callback.state_dict()["stats"]["steps"] == 3 + 1


@pytest.mark.parametrize("manual", [1, 2])
def test_manual_optimization_is_exact(manual):
    options = {} if manual == 1 else {"window": manual}
    model, callback = Policy(manual=manual), KondoCallback(rate=0.125, **options)
    trainer_of(callback).fit(model, batches(3 * manual))
    assert_same(model, reference(0.125, manual, count=3 * manual))


def test_manual_optimization_that_steps_within_a_window_is_told():
    with pytest.raises(RuntimeError, match=r"step\(\) while 1 calls of window=2.*gate.flush"):
        trainer_of(KondoCallback(rate=0.25, window=2)).fit(Policy(manual=1), batches())


def test_another_modules_optimizer_may_step_within_a_window():
    class ActorCritic(Policy):
        def __init__(self):
            super().__init__("net", manual=2)
            self.critic = nn.Linear(5, 1).double()

        def training_step(self, batch, batch_idx):
            actor, critic = self.optimizers()
            self.manual_backward(self.loss(batch) / 2)
            self.manual_backward((self.critic(batch[0]).squeeze(1) - batch[2]).square().mean())
            critic.step()
            critic.zero_grad()
            if batch_idx % 2:
                actor.step()
                actor.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(m.parameters(), lr=0.5) for m in (self.net, self.critic)]

    model = ActorCritic()
    trainer_of(KondoCallback("net", rate=0.125, window=2)).fit(model, batches(6))
    for name, value in reference(0.125, 2, count=6).state_dict().items():
        assert (model.state_dict()[name] - value).abs().max() < 1e-12


@pytest.mark.parametrize("population", [1, 2])
def test_gradient_clipping_sees_the_kept_rows(population):
    model = Policy()
    options = {"accumulate_grad_batches": population, "gradient_clip_val": 0.05}
    trainer_of(KondoCallback(rate=0.25), **options).fit(model, batches(3 * population))
    assert_same(model, reference(0.25, population, clip=0.05, count=3 * population))


def test_bf16_mixed_is_near_the_masked_loss():
    def train(model, *callbacks):
        model = model.float()
        trainer_of(*callbacks, precision="bf16-mixed").fit(model, batches(1, torch.float32))
        return model

    model = train(Policy(), KondoCallback(rate=0.25))
    batch = next(iter(batches(1, torch.float32)))
    with torch.autocast("cpu", torch.bfloat16):
        kept = mask_of(delight_of(Policy().float().log_probs(batch), batch[2]), 0.25)
    masked, start = train(Policy(masks=[kept])), Policy().float().state_dict()
    for name, value in masked.state_dict().items():
        moved = (value - start[name]).abs().max()
        assert moved > 1e-3 and (model.state_dict()[name] - value).abs().max() < 0.02 * moved


def test_a_gradient_scaler_sees_what_an_incomplete_accumulation_left():
    """It unscales before Lightning tells callbacks of the coming step."""

    class Scaled(MixedPrecision):
        def autocast_context_manager(self):
            return contextlib.nullcontext()

    model, unscaled, callback = Policy(), Policy(), KondoCallback(rate=0.25)
    precision = Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer_of(callback, accumulate_grad_batches=4, plugins=[precision]).fit(model, batches())
    trainer_of(KondoCallback(rate=0.25), accumulate_grad_batches=4).fit(unscaled, batches())
    assert_same(model, unscaled)
    assert callback.state_dict()["stats"]["steps"] == 1


def test_two_callbacks_gate_two_modules():
    class Two(Policy):
        def __init__(self):
            super().__init__("net")
            self.other = nn.Linear(5, ACTIONS).double()

        def training_step(self, batch, batch_idx):
            log_probs = torch.log_softmax(self.other(batch[0]), -1).gather(1, batch[1].unsqueeze(1)).squeeze(1)
            return self.loss(batch) - (batch[2] * log_probs).mean()

    model, trainer = Two(), trainer_of(KondoCallback("net", rate=0.25), KondoCallback("other", rate=0.5))
    trainer.fit(model, batches())
    for name, value in reference(0.25).state_dict().items():
        assert (model.state_dict()[name] - value).abs().max() < 1e-12
    assert trainer.callback_metrics["kondo/net/kept"] == 2 and trainer.callback_metrics["kondo/other/kept"] == 4
    assert_ungated(model)


# What it says, and what it saves.


def test_metrics_are_there_and_validation_is_not_gated():
    model, callback = Policy(), KondoCallback(rate=0.25)
    trainer = trainer_of(callback)
    trainer.fit(model, batches(), batches(1))
    assert set(trainer.logged_metrics) >= METRICS and set(trainer.callback_metrics) >= {*METRICS, "val_loss"}
    last = list(batches())[-1]
    delight = delight_of(reference(0.25, count=2).log_probs(last), last[2])
    kept = mask_of(delight, 0.25).bool()
    found = {name: trainer.callback_metrics[name].item() for name in METRICS}
    assert found["kondo/rate"] == 0.25 and found["kondo/kept"] == 2 and found["kondo/skipped"] == 0.75
    assert found["kondo/delight_kept"] == pytest.approx(delight[kept].mean().item(), rel=1e-5)
    assert found["kondo/delight_dropped"] == pytest.approx(delight[~kept].mean().item(), rel=1e-5)
    assert found["kondo/price"] <= delight[kept].min().item() + 1e-5
    assert callback.state_dict()["stats"]["rows"] == 3 * B


def test_every_decision_reaches_the_logger(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer_of(KondoCallback(rate=0.125), logger=logger, accumulate_grad_batches=2).fit(Policy(), batches(6))
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["kondo/kept"]]
    found = [(row["step"], float(row["kondo/kept"]), float(row["kondo/rate"])) for row in rows]
    assert set(found) == {(str(step), 2, 0.125) for step in range(3)}
    assert len({row["kondo/price"] for row in rows}) == 3


def test_a_schedule_is_asked_with_the_trainer():
    asked = []

    def schedule(trainer):
        asked.append((trainer.current_epoch, trainer.global_step))
        return 0.5 if trainer.current_epoch == 0 else 0.125

    kept = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept.append(trainer.callback_metrics["kondo/kept"].item())

    trainer_of(KondoCallback(rate=schedule), Look(), max_epochs=2).fit(Policy(), batches())
    assert kept == [4, 1]
    assert asked == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]


@pytest.mark.parametrize(
    "options", [{"rate": 0.25, "history": 5}, {"rate": 0.25, "priority": "uniform"}, {"noise": 0.5}]
)
def test_a_run_that_resumes_continues(tmp_path, options):
    whole, model, again = Policy(), Policy(), Policy()
    callbacks = [KondoCallback(**options) for _ in range(3)]
    trainer_of(callbacks[0], max_epochs=2).fit(whole, batches())

    trainer = trainer_of(callbacks[1], max_epochs=1)
    trainer.fit(model, batches())
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"][callbacks[1].state_key]
    assert saved["stats"]["steps"] == 3

    trainer_of(callbacks[2], max_epochs=2).fit(again, batches(), ckpt_path=path, weights_only=True)
    ends = [callback.state_dict() for callback in callbacks]
    assert ends[2]["stats"]["steps"] == ends[0]["stats"]["steps"] == 6
    assert torch.equal(ends[2]["selector"]["generator"], ends[0]["selector"]["generator"])
    histories = [end["selector"]["history"] for end in ends]
    assert all(torch.equal(a, b) for a, b in zip(histories[2], histories[0], strict=True))
    assert len(histories[0]) == min(6, options.get("history", 0))
    assert_same(again, whole)


# What goes wrong.


def test_an_exception_takes_the_gate_off():
    class Fails(Policy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                assert "_compiled_call_impl" in self.__dict__
                raise KeyError("mine")
            return loss

    model, callback = Fails(), KondoCallback(rate=0.25)
    with pytest.raises(KeyError, match="mine"):
        trainer_of(callback, accumulate_grad_batches=3).fit(model, batches())
    assert callback.gate is None
    assert_ungated(model)
    model = Policy()
    trainer_of(callback).fit(model, batches())  # it can be used again
    assert_same(model, reference(0.25))


def test_bad_arguments_fail_early():
    with pytest.raises(ValueError, match="rate must be in"):
        KondoCallback(rate=2.0)
    with pytest.raises(TypeError, match="no_such"):
        KondoCallback(no_such=1)
    with pytest.raises(TypeError, match="module is the name of a submodule"):
        KondoCallback(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"module='network' names no submodule of Policy .*; it has net"):
        trainer_of(KondoCallback("network")).fit(Policy(), batches())
    with pytest.raises(ValueError, match="method='policy' is no method of Sequential"):
        trainer_of(KondoCallback("net", method="policy")).fit(Policy(), batches())


def test_a_module_that_is_not_called_is_told_at_the_first_step():
    with pytest.warns(kondo.KondoWarning) as given:
        trainer_of(KondoCallback(rate=0.25)).fit(Policy("net"), batches())
    said = [str(warning.message) for warning in given if warning.category is kondo.KondoWarning]
    assert re.search(r"self\(\.\.\.\) was not called.*module=\.\.\., one of 'net'", said[0])
    assert len(said) == 2  # the gate's own comes at the end
    with warnings.catch_warnings():
        warnings.simplefilter("error", kondo.KondoWarning)
        trainer_of(KondoCallback("net", rate=0.25, warmup_steps=2)).fit(Policy("net"), batches())


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_several_ranks_give_the_masked_gradient(accumulation):
    for found in launch("tests.ranks.behaviours", 2, ["lightning_ddp", accumulation], 200):
        for case, difference in found["differences"]:
            assert difference < 1e-5, case
        assert 0 < found["kept"][0] < found["kept"][3]


def test_wrappers_that_gather_parameters_are_refused_by_name():
    model = Policy()
    with pytest.raises(ValueError, match=r"a Sequential around the LightningModule.*strategy='ddp'.*fabric\.setup"):
        KondoCallback(rate=0.25).on_fit_start(SimpleNamespace(model=nn.Sequential(model)), model)
    KondoCallback(rate=0.25, enabled=False).on_fit_start(SimpleNamespace(model=nn.Sequential(model)), model)


def test_a_gate_that_is_off_changes_nothing(monkeypatch):
    monkeypatch.setenv("KONDO_DISABLE", "1")
    model, plain = Policy(), Policy()
    trainer_of(KondoCallback(rate=0.25), accumulate_grad_batches=2).fit(model, batches(6))
    trainer_of(accumulate_grad_batches=2).fit(plain, batches(6))
    assert_same(model, plain, bar=1e-15)


# Fabric.


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("kind", [1, 2, "step"])
def test_fabric_needs_no_callback(kind, function):
    window = 2 if kind == "step" else kind
    fabric = Fabric(accelerator="cpu", devices=1)
    policy = Policy("net")
    model, optimizer = fabric.setup(policy.net, torch.optim.SGD(policy.net.parameters(), lr=0.5))
    loader = fabric.setup_dataloaders(batches(3 * window))

    class Learner:
        def log_probs(self, x, actions):
            return torch.log_softmax(model(x), -1).gather(1, actions.unsqueeze(1)).squeeze(1)

    learner = Learner()
    options = {"method": (learner, "log_probs"), "logp": lambda out: out} if function else {}
    with kondo.gated(model, rate=0.125, window=kind, **options) as gate:
        for i, (x, actions, advantages) in enumerate(loader):
            log_probs = learner.log_probs(x, actions)
            fabric.backward(-(advantages * log_probs).mean() / window)
            if (i + 1) % window == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert_same(policy, reference(0.125, window, count=3 * window))
    assert gate.stats.kept == gate.stats.forwarded == 3 * window


def test_fabrics_own_error_for_a_backward_around_it_stays():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    net = nn.Linear(5, ACTIONS)
    model = fabric.setup(net)
    x, actions, advantages = next(iter(batches(1, torch.float32)))

    def loss():
        log_probs = torch.log_softmax(model(x), -1).gather(1, actions.unsqueeze(1)).squeeze(1)
        return -(advantages * log_probs).mean()

    with kondo.gated(model, rate=0.25) as gate:
        with pytest.raises(RuntimeError, match=r"requires you to call `fabric.backward\(loss\)`"):
            loss().backward()
        assert net.weight.grad is None
        fabric.backward(loss())
    assert net.weight.grad is not None and gate.stats.kept == 2
