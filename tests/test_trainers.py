"""Converted models in the real trainers that people use: the same losses, and checkpoints that the unconverted model loads.

Where a trainer is not installed, its tests are skipped. `make models` installs all and runs them. Pictures and labels are made here.
Training is in float64 where the trainer allows it, because a difference of rounding grows from step to step.
"""

import copy
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradkernels as gk
from models.resnet import BasicBlock, ResNet

pytestmark = pytest.mark.slow

try:
    import lightning.pytorch as lightning
except ImportError:
    lightning = None
needs_lightning = pytest.mark.skipif(lightning is None, reason="the trainer lightning is not installed")

BATCHES, BATCH, CLASSES = 4, 8, 3
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def trainer_package(name):
    return pytest.importorskip(name, reason=f"the trainer {name} is not installed")


def data(dtype=torch.float64):
    """Pictures whose label is the brightest of their channels."""
    x = torch.randn(BATCHES * BATCH, 3, 64, 64, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.mean((2, 3)).argmax(1))


def make_model(converted, dtype=torch.float64):
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 1, 1), classes=CLASSES, width=8).to(dtype)
    if converted:
        assert sum(row.is_fused for row in gk.convert(model).rows) == 9
    return model


def replaced_in(model):
    return sum(isinstance(module, gk.BatchNormAct2d) for module in model.modules())


def assert_same_weights(actual, expected):
    torch.testing.assert_close(actual.state_dict(), expected.state_dict(), **EXACT)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


# Lightning. At the top, because ddp_spawn pickles the class.


class Classifier(lightning.LightningModule if lightning else nn.Module):
    def __init__(self, converted=False, dtype=torch.float64):
        super().__init__()
        self.model, self.losses = make_model(converted, dtype), []

    def training_step(self, batch, batch_idx):
        # Every process gets the whole batch, and takes its part.
        x, target = (each[self.global_rank :: self.trainer.world_size] for each in batch)
        loss = F.cross_entropy(self.model(x), target)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return sgd(self)


def fit(module, checkpoint=None, **options):
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    trainer = lightning.Trainer(accelerator="cpu", **{"max_epochs": 1, **quiet, **options})
    trainer.fit(module, DataLoader(data(next(module.parameters()).dtype), batch_size=BATCH), ckpt_path=checkpoint)
    return module


@needs_lightning
def test_lightning():
    converted, plain = fit(Classifier(True)), fit(Classifier())
    assert len(converted.losses) == BATCHES and converted.losses == pytest.approx(plain.losses, rel=1e-9)
    assert_same_weights(converted, plain)


@needs_lightning
def test_lightning_in_mixed_precision():
    """In bfloat16 torch rounds the output of batch norm, and the sum with the residual. The kernel rounds once."""
    converted, plain = (fit(Classifier(each, torch.float32), precision="bf16-mixed") for each in (True, False))
    assert converted.losses == pytest.approx(plain.losses, rel=0.05)


@needs_lightning
def test_lightning_in_two_processes_with_synchronised_statistics():
    """The unconverted model trains in one process: on the CPU torch's SyncBatchNorm raises an error."""
    module = Classifier(True)
    gk.convert_sync_batch_norm(module.model)
    assert sum(isinstance(each, gk.SyncBatchNormAct) for each in module.modules()) == 12
    fit(module, strategy="ddp_spawn", devices=2, use_distributed_sampler=False)
    assert_same_weights(module, fit(Classifier()))


@needs_lightning
def test_lightning_goes_on_from_a_checkpoint_of_a_converted_model(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    fit(Classifier(True)).trainer.save_checkpoint(checkpoint)
    resumed = fit(Classifier(), max_epochs=2, checkpoint=checkpoint)
    assert len(resumed.losses) == BATCHES and not replaced_in(resumed)
    assert_same_weights(resumed, fit(Classifier(), max_epochs=2))


# transformers


@pytest.mark.parametrize("name", ["ResNet", "RegNet"])
def test_transformers(tmp_path, name):
    transformers = trainer_package("transformers")
    trainer_package("accelerate")
    rows = [{"pixel_values": x, "labels": label} for x, label in data()]
    losses, models = [], []
    for folder, converted in (("converted", True), ("plain", False)):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=8, num_labels=CLASSES
        )
        model = getattr(transformers, f"{name}ForImageClassification")(config).double()
        if converted:
            assert any(row.is_fused for row in gk.convert(model).rows)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=BATCH,
            max_steps=2 * BATCHES,
            save_steps=BATCHES,
            logging_steps=1,
            seed=0,
            learning_rate=1e-3,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            optim="adamw_torch",
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        models.append(model)
    assert len(losses[0]) == 2 * BATCHES and losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert_same_weights(*models)
    loaded = type(models[1]).from_pretrained(tmp_path / "converted" / f"checkpoint-{2 * BATCHES}")
    assert not replaced_in(loaded)
    assert_same_weights(loaded, models[1])


# accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(tmp_path, precision):
    accelerate = trainer_package("accelerate")
    dtype = torch.float64 if precision == "no" else torch.float32
    losses, models = [], []
    for converted in (True, False):
        # The state is one for the process.
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        model = make_model(converted, dtype)
        model, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(data(dtype), batch_size=BATCH))
        losses.append([])
        for x, target in [*loader, *loader]:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), target)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses[-1].append(loss.item())
        models.append(accelerator.unwrap_model(model))
        if converted:
            accelerator.save_state(tmp_path)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9 if precision == "no" else 0.05)
    trained = copy.deepcopy(models[1])
    accelerator.load_state(tmp_path)
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=0, atol=0)
    if precision == "no":
        assert_same_weights(models[1], trained)


# timm: its optimizer, schedule, loss, mixing of pictures, clipping, averaged model and checkpoints, in the order of its train.py.


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "test_efficientnet"])
def test_timm(tmp_path, name):
    timm = trainer_package("timm")
    from timm import data as timm_data
    from timm import loss as timm_loss
    from timm import optim, scheduler, utils

    losses, averages, adamw = [], [], {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    for folder, converted in (("converted", True), ("plain", False)):
        torch.manual_seed(0)
        (tmp_path / folder).mkdir()
        model = timm.create_model(name, num_classes=CLASSES).double()
        if converted:
            assert any(row.is_fused for row in gk.convert(model).rows)
        optimizer = optim.create_optimizer_v2(model, **adamw)
        schedule, _ = scheduler.create_scheduler_v2(
            optimizer, sched="cosine", num_epochs=2, updates_per_epoch=BATCHES, step_on_epochs=False
        )
        average = utils.ModelEmaV3(model, decay=0.9)
        saver = utils.CheckpointSaver(
            model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path / folder), recovery_dir=str(tmp_path)
        )
        mix, criterion = timm_data.Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=CLASSES), timm_loss.SoftTargetCrossEntropy()
        torch.manual_seed(0)
        utils.random_seed(0)
        losses.append([])
        for epoch in range(2):
            meter = utils.AverageMeter()
            for step, (x, target) in enumerate(DataLoader(data(), batch_size=BATCH), epoch * BATCHES + 1):
                x, target = mix(x, target)
                loss = criterion(model(x), target)
                optimizer.zero_grad()
                loss.backward()
                utils.dispatch_clip_grad(model.parameters(), 1.0)
                optimizer.step()
                average.update(model, step=step)
                schedule.step_update(step)
                meter.update(loss.item(), len(x))
                losses[-1].append(loss.item())
            saver.save_checkpoint(epoch, meter.avg)
        averages.append(average.module)
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    loaded = timm.create_model(name, num_classes=CLASSES).double()
    timm.models.load_checkpoint(loaded, str(tmp_path / "converted" / "last.pth.tar"), use_ema=True)
    torch.testing.assert_close(loaded.state_dict(), averages[1].state_dict(), rtol=1e-7, atol=1e-9)
    # Training goes on with an unconverted model.
    resumed = timm.create_model(name, num_classes=CLASSES).double()
    optimizer = optim.create_optimizer_v2(resumed, **adamw)
    assert timm.models.resume_checkpoint(resumed, str(tmp_path / "converted" / "last.pth.tar"), optimizer) == 2


# ultralytics


@pytest.fixture
def boxes(tmp_path, monkeypatch):
    """A data set for YOLO: dark pictures, each with a bright box of one of two sizes."""
    # The tests of torch, which conftest.py imports, freeze the flags of cuDNN; ultralytics sets them.
    monkeypatch.setitem(torch.backends.disable_global_flags.__globals__, "__allow_nonbracketed_mutation_flag", True)
    trainer_package("ultralytics")
    from matplotlib import get_data_path
    from PIL import Image
    from ultralytics.utils import checks

    # It would download a font.
    monkeypatch.setattr(checks, "USER_CONFIG_DIR", tmp_path)
    shutil.copy(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", tmp_path / "Arial.ttf")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(8):
        size, (left, top) = (16, 32)[number % 2], (4 * number, 30 - 3 * number)
        picture = Image.new("RGB", (64, 64), (20, 20, 20))
        picture.paste((200, 25 * number, 90), (left, top, left + size, top + size))
        picture.save(tmp_path / "images" / f"{number}.png")
        box = ((left + size / 2) / 64, (top + size / 2) / 64, size / 64, size / 64)
        (tmp_path / "labels" / f"{number}.txt").write_text(" ".join(map(str, (number % 2, *box))))
    (tmp_path / "boxes.yaml").write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: [small, large]\n")
    return tmp_path / "boxes.yaml"


def test_ultralytics(boxes, tmp_path):
    from ultralytics import YOLO

    from gradkernels.integrations.ultralytics import convert

    options = {"data": str(boxes), "imgsz": 64, "batch": 4, "workers": 0, "device": "cpu", "plots": False, "project": str(tmp_path)}
    losses, weights = [], []
    for name in ("converted", "plain"):
        torch.manual_seed(0)
        model = YOLO("yolov8n.yaml")
        seen, fused = [], []
        if name == "converted":
            model.add_callback("on_pretrain_routine_end", convert)
        model.add_callback("on_train_start", lambda trainer, fused=fused: fused.append(replaced_in(trainer.model)))
        model.add_callback("on_train_batch_end", lambda trainer, seen=seen: seen.append(trainer.loss.item()))
        model.train(**options, epochs=2, amp=False, seed=0, optimizer="SGD", lr0=1e-3, name=name)
        assert fused == [57 if name == "converted" else 0]
        losses.append(seen)
        weights.append(tmp_path / name / "weights" / "last.pt")
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    # The unconverted model loads the checkpoint, and validates as one that is converted.
    converted, plain = YOLO(weights[0]), YOLO(weights[0])
    assert not replaced_in(converted.model)
    gk.convert(converted.model)
    assert replaced_in(converted.model) == 57
    results = [model.val(**options, name="validated").results_dict for model in (converted, plain)]
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    pictures = torch.rand(2, 3, 64, 64)
    outputs = [YOLO(path).model.float().eval()(pictures)[0] for path in weights]
    torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-2)


# diffusers


def test_a_unet_of_diffusers(capsys):
    """Steps of a denoising diffusion model. The norms of its attention have no activation, and stay torch's."""
    diffusers = trainer_package("diffusers")

    def train(converted):
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(32, 64),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).double()
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm) and "attentions" not in name]
        if converted:
            assert {row.name for row in gk.convert(model).rows if row.is_fused} == set(norms) - {"conv_norm_out"}
        scheduler, optimizer, losses, seconds = diffusers.DDPMScheduler(100), torch.optim.AdamW(model.parameters(), lr=1e-3), [], []
        for _ in range(4):
            images, noise = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)
            steps = torch.randint(100, (4,))
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = F.mse_loss(model(scheduler.add_noise(images, noise, steps), steps).sample, noise)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
        return model, losses, min(seconds)

    (theirs, plain, plain_seconds), (ours, fused, fused_seconds) = train(False), train(True)
    assert fused == pytest.approx(plain, rel=1e-9)
    assert_same_weights(ours, theirs)
    with capsys.disabled():
        print(f"\na step of a U-Net of diffusers: {plain_seconds * 1e3:.1f} ms, converted {fused_seconds * 1e3:.1f} ms")
