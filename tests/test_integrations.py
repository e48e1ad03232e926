"""The callbacks in gradkernels/integrations, with the real trainers and few steps.

The trainers are no requirement of the other tests: where one is not installed, its tests are skipped. To run
all, install lightning, pytorch_lightning, transformers, accelerate and ultralytics into an environment of their
own, and run there: pytest -m "" tests/test_integrations.py
"""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import optimizer as torch_optimizer
from torch.utils.data import DataLoader, TensorDataset

import gradkernels as gk

pytestmark = pytest.mark.slow

STEPS, SPIKE, MAX_NORM = 40, 35, 0.05


def trainer_package(name):
    return pytest.importorskip(name, reason=f"the trainer {name} is not installed")


def integration(name):
    trainer_package(name)
    return importlib.import_module(f"gradkernels.integrations.{name}")


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * 16, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def plant(layer, step):
    if step == SPIKE:
        for parameter in layer.parameters():
            parameter.grad.mul_(1e3)


def make_optimizer(model, fused):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)


def plain_loop(fused):
    """The weights and the norms before clipping, without a trainer."""
    model, norms = make_model(), []
    optimizer = make_optimizer(model, fused)
    handle = gk.attach_clipping(optimizer, MAX_NORM)
    for step, (x, target) in enumerate(DataLoader(TensorDataset(*batches()), batch_size=16)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        plant(model[2], step)
        optimizer.step()
        norms.append(handle.last_norm.item())
    return model, norms


def hooks():
    return [*torch_optimizer._global_optimizer_pre_hooks, *torch_optimizer._global_optimizer_post_hooks]


class Heard(list):
    def __call__(self, name, step, reason, value):
        self.append((name, step, reason))


# Lightning

LIGHTNINGS = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


def fit(name, callbacks, fused=True, fails_at=None, checkpoint=None, **options):
    """Train a LightningModule, from a checkpoint on if there is one. Returns it, its optimizer, and what was logged, by step."""
    trainer_package(name)
    package = importlib.import_module(LIGHTNINGS[name])
    loggers = importlib.import_module(f"{LIGHTNINGS[name]}.loggers.logger")
    rows = {}

    class Classifier(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def training_step(self, batch, batch_idx):
            if batch_idx == fails_at:
                raise ZeroDivisionError
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def test_step(self, batch, batch_idx):
            pass

        def on_after_backward(self):
            plant(self.model[2], self.global_step)

        def configure_optimizers(self):
            self.optimizer = make_optimizer(self.model, fused)
            return self.optimizer

    class Logger(loggers.Logger):
        name, version = "rows", 0

        def log_metrics(self, metrics, step=None):
            rows.setdefault(step, {}).update(metrics)

        def log_hyperparams(self, *arguments, **keywords):
            pass

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    module = Classifier()
    trainer = package.Trainer(
        accelerator="cpu", logger=Logger(), callbacks=callbacks, **{"max_epochs": 1, "log_every_n_steps": 1, **quiet, **options}
    )
    trainer.fit(module, DataLoader(TensorDataset(*batches()), batch_size=16), ckpt_path=checkpoint)
    return module, rows


def scaler_plugin(name):
    """For 16-mixed, with a GradScaler. Lightning itself replaces it by bf16-mixed on the CPU."""
    plugins = importlib.import_module(f"{LIGHTNINGS[name]}.plugins")
    return plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", LIGHTNINGS)
def test_lightning_clips_as_a_plain_loop_does(name, fused):
    callback = integration(name).ClipGradients(MAX_NORM)
    module, rows = fit(name, [callback], fused)
    model, norms = plain_loop(fused)
    assert all(map(torch.equal, module.model.state_dict().values(), model.state_dict().values()))
    assert [rows[step]["gradient_norm"] for step in range(STEPS)] == pytest.approx(norms)
    assert not callback.handles and "step" not in vars(module.optimizer)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", LIGHTNINGS)
def test_lightning_names_the_layer_that_explodes(name, fused, precision):
    heard, before = Heard(), hooks()
    module = integration(name)
    watch = module.WatchGradients(heard)
    options = {"precision": precision}
    if precision == "16-mixed":
        options = {"plugins": scaler_plugin(name)}
    _, rows = fit(name, [watch, module.ClipGradients(MAX_NORM)], fused, log_every_n_steps=10, **options)
    assert heard == [("model.2", SPIKE, "exploding")]
    assert watch.monitor.to_dict()["steps"] == [0, 10, 20, 30]
    logged = {step: metrics["gradient_norm/model.2"] for step, metrics in rows.items() if "gradient_norm/model.2" in metrics}
    assert [*logged] == [0, 10, 20, 30]
    assert all(0.01 < norm < 10 for norm in logged.values()), "unscaled, and before clipping"
    assert "activation_mean/model.0" in rows[10]
    assert hooks() == before


@pytest.mark.parametrize("name", LIGHTNINGS)
def test_lightning_logs_nothing_for_a_first_step_that_the_scaler_skips(name):
    class Overflow(trainer_package(LIGHTNINGS[name]).Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 0:
                pl_module.model[0].weight.grad.fill_(torch.inf)

    watch = integration(name).WatchGradients(None)
    _, rows = fit(name, [watch, Overflow()], fused=False, plugins=scaler_plugin(name))
    assert watch.monitor.to_dict()["steps"] == [*range(STEPS - 1)]
    assert "gradient_norm/model.0" in rows[1]


@pytest.mark.parametrize("name", LIGHTNINGS)
def test_lightnings_own_clipping(name):
    """The alarm hears of gradients before it, and ClipGradients refuses to clip as well."""
    heard = Heard()
    module = integration(name)
    fit(name, [module.WatchGradients(heard)], fused=False, gradient_clip_val=MAX_NORM)
    assert heard == [("model.2", SPIKE, "exploding")]
    with pytest.raises(ValueError, match=r"ClipGradients and gradient_clip_val=0.05 would both clip: remove one of them"):
        fit(name, [module.ClipGradients(1.0)], gradient_clip_val=MAX_NORM)


@pytest.mark.parametrize("name", LIGHTNINGS)
def test_lightning_keeps_no_hook_after_an_exception(name):
    before = hooks()
    module = integration(name)
    callbacks = [module.ClipGradients(MAX_NORM), module.WatchGradients()]
    with pytest.raises(ZeroDivisionError):
        fit(name, callbacks, fails_at=3)
    assert hooks() == before and not callbacks[0].handles
    assert callbacks[1].monitor.to_dict()["steps"] == [0, 1, 2]


@pytest.mark.parametrize("name", LIGHTNINGS)
def test_lightning_passes_arguments_on(name):
    with pytest.raises(TypeError, match="no_such_argument"):
        fit(name, [integration(name).ClipGradients(1.0, no_such_argument=1)])
    watch = integration(name).WatchGradients(None, every=7, activations_every=None)
    fit(name, [watch])
    assert watch.monitor.to_dict()["steps"] == [*range(0, STEPS, 7)]


POLICIES = [gk.clipping.Percentile(window=50), gk.clipping.ZScore()]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("name", LIGHTNINGS)
def test_lightning_goes_on_with_the_state_of_a_policy(name, policy, tmp_path):
    def clip():
        return integration(name).ClipGradients(policy, nonfinite="skip", skip_above=20.0)

    whole, _ = fit(name, [clip()], max_epochs=2)
    first, checkpoint = clip(), tmp_path / "checkpoint"
    fit(name, [first])[0].trainer.save_checkpoint(checkpoint)
    resumed, after = clip(), []

    class Remember(importlib.import_module(LIGHTNINGS[name]).Callback):
        def on_train_start(self, trainer, pl_module):
            after.append(copy.deepcopy(resumed.state_dict()))

    module, _ = fit(name, [resumed, Remember()], max_epochs=2, checkpoint=checkpoint)
    assert all(map(torch.equal, module.model.state_dict().values(), whole.model.state_dict().values()))
    (before,), (loaded,) = first.state_dict()["handles"], after[0]["handles"]
    torch.testing.assert_close(loaded["state"], before["state"], rtol=0, atol=0, equal_nan=True)
    assert loaded["skipped"] == 1, "the spike"


@pytest.mark.parametrize("name", LIGHTNINGS)
def test_lightning_begins_without_a_history_if_the_policy_is_another(name, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    fit(name, [integration(name).ClipGradients(gk.clipping.ZScore())])[0].trainer.save_checkpoint(checkpoint)
    match = "ClipGradients begins without a history: the state is that of ZScore, but this handle clips to a number"
    with pytest.warns(RuntimeWarning, match=match):
        fit(name, [integration(name).ClipGradients(1.0)], max_epochs=2, checkpoint=checkpoint)


@pytest.mark.parametrize("name", LIGHTNINGS)
def test_lightning_forgets_the_history_for_another_fit(name, tmp_path):
    """As another fold of a cross-validation."""
    callback = integration(name).ClipGradients(gk.clipping.Percentile(window=50))
    one, _ = fit(name, [callback])
    checkpoint = tmp_path / "checkpoint"
    one.trainer.save_checkpoint(checkpoint)
    one.trainer.test(one, DataLoader(TensorDataset(*batches()), batch_size=16), ckpt_path=checkpoint, verbose=False)
    two, _ = fit(name, [callback])
    assert all(map(torch.equal, one.model.state_dict().values(), two.model.state_dict().values()))


# transformers


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def forward(self, x, labels):
        logits = self.model(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def train(tmp_path, callbacks, fused=True, **options):
    transformers = trainer_package("transformers")
    trainer_package("accelerate")
    model = WithLoss()

    class Plant(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            plant(model.model[2], state.global_step)

    logged = {}

    class Logger(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            logged.setdefault(state.global_step, {}).update(logs)

    arguments = {"max_grad_norm": 0.0, "logging_steps": 1, "disable_tqdm": True, "report_to": [], "use_cpu": True, **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=16, save_strategy="no", **arguments
    )
    rows = [{"x": x, "labels": label} for x, label in zip(*batches(), strict=True)]
    optimizer = make_optimizer(model, fused)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[*callbacks, Plant(), Logger()]
    )
    trainer._get_train_sampler = lambda *dataset: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    return model, optimizer, logged, trainer.state.log_history


@pytest.mark.parametrize("fused", [False, True])
def test_transformers_clips_as_a_plain_loop_does(tmp_path, fused):
    callback = integration("transformers").ClipGradients(MAX_NORM)
    trained, optimizer, rows, history = train(tmp_path, [callback], fused, lr_scheduler_type="constant")
    model, norms = plain_loop(fused)
    assert all(map(torch.equal, trained.model.state_dict().values(), model.state_dict().values()))
    assert [rows[step + 1]["gradient_norm"] for step in range(STEPS)] == pytest.approx(norms)
    assert [row["gradient_norm"] for row in history if "loss" in row] == pytest.approx(norms)
    optimizer.step()
    assert callback.handle.last_norm.item() == pytest.approx(norms[-1]), "it has stopped"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_transformers_clips_to_a_policy(tmp_path, policy):
    callback = integration("transformers").ClipGradients(policy, nonfinite="skip", skip_above=20.0)
    train(tmp_path, [callback])
    saved = callback.handle.state_dict()
    assert saved["state"]["count"] == STEPS - 1 and saved["skipped"] == 1, "the spike"


def test_transformers_names_the_layer_that_explodes(tmp_path):
    heard, before = Heard(), hooks()
    module = integration("transformers")
    watch = module.WatchGradients(heard)
    _, _, rows, _ = train(tmp_path, [watch, module.ClipGradients(MAX_NORM)], logging_steps=10)
    assert heard == [("model.2", SPIKE, "exploding")]
    assert watch.monitor.to_dict()["steps"] == [0, 10, 20, 30]
    assert all(0.01 < rows[step]["gradient_norm/model.2"] < 10 for step in (10, 20, 30))
    assert hooks() == before


def test_transformers_trains_again_after_an_exception(tmp_path):
    """train() ends without a call of on_train_end then."""
    before, heard = hooks(), Heard()
    module = integration("transformers")
    callbacks = [module.WatchGradients(heard), module.ClipGradients(MAX_NORM)]

    class Fail(trainer_package("transformers").TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, [*callbacks, Fail()])
    assert len(hooks()) == len(before) + 2 and callbacks[1].handle is not None
    abandoned = callbacks[1].handle._optimizer
    train(tmp_path, callbacks)
    assert hooks() == before
    assert "step" not in vars(abandoned)


def test_transformers_own_clipping_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ClipGradients and max_grad_norm=1.0 would both clip: set max_grad_norm=0"):
        train(tmp_path, [integration("transformers").ClipGradients(1.0)], max_grad_norm=1.0)


# ultralytics


def test_ultralytics_trains_a_converted_model(tmp_path, monkeypatch):
    # The tests of torch, which conftest.py imports, freeze the flags of cuDNN; ultralytics sets them.
    monkeypatch.setitem(torch.backends.disable_global_flags.__globals__, "__allow_nonbracketed_mutation_flag", True)
    convert = integration("ultralytics").convert
    ultralytics = trainer_package("ultralytics")
    model, classes = ultralytics.YOLO("yolo11n-cls.yaml", task="classify"), {}
    image = trainer_package("PIL.Image")
    for split in ("train", "test"):
        for name in ("dark", "light"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                image.new("RGB", (32, 32), 40 * number + (100 if name == "light" else 0)).save(folder / f"{number}.png")

    def look(trainer):
        for module in trainer.model.modules():
            classes[type(module).__name__] = classes.get(type(module).__name__, 0) + 1

    model.add_callback("on_pretrain_routine_end", convert)
    model.add_callback("on_train_start", look)
    options = {"imgsz": 32, "batch": 4, "workers": 0, "device": "cpu", "amp": False, "plots": False, "deterministic": False}
    model.train(data=str(tmp_path / "data"), epochs=1, project=str(tmp_path), **options)
    assert classes.get("BatchNorm2d", 0) < classes["BatchNormAct2d"]
    assert not any(isinstance(module, gk.BatchNormAct2d) for module in model.model.modules()), "a checkpoint needs no gradkernels"
