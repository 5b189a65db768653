"""The trainers people use, with their real packages: the same losses with and without fastclip.patch()."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import fastclip
from fastclip import gradients
from fastclip.monitor import watched_process
from fastclip.patch import overlay

# Of other packages, about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4
MAX_NORM = 0.05


@pytest.fixture
def calls(monkeypatch):
    """What fastclip's functions were called on: the number of parameters of each call."""
    seen = []
    original = gradients.of

    def counting(parameters, *args, **kwargs):
        seen.append(len(parameters))
        return original(parameters, *args, **kwargs)

    monkeypatch.setattr(gradients, "of", counting)
    return seen


def same_losses(train, calls) -> None:
    """Every step's loss is equal to rounding, and it was fastclip that clipped, once a step."""
    expected = train()
    assert calls == []
    with fastclip.patch():
        got = train()
    assert calls == [len(list(model().parameters()))] * STEPS
    assert len(got) == len(expected) == STEPS
    assert len(set(got)) == STEPS
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-6, atol=0)
    # The same bits while a monitor watches, which finds the model by itself.
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        with overlay(watched_process(str(log))):
            assert train() == got
        _, *records = (json.loads(line) for line in log.read_text().splitlines())
    assert [record["step"] for record in records] == list(range(STEPS))
    names = {tag.rpartition("/")[2] for tag in records[0] if "/grad_norm/" in tag}
    assert {name.split(".", name.count(".") - 1)[-1] for name in names} == {
        name for name, _ in model().named_parameters()
    }


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS * 4, 8, generator=generator)
    return [{"inputs": x, "labels": x.sum().reshape(1)} for x in inputs]


def batches():
    examples = data()
    for i in range(STEPS):
        batch = examples[4 * i : 4 * i + 4]
        yield torch.stack([e["inputs"] for e in batch]), torch.stack([e["labels"] for e in batch])


def loop(net, optimizer, backward, clip) -> list[float]:
    losses = []
    for inputs, labels in batches():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(inputs), labels)
        backward(loss)
        clip()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_transformers_trainer(calls, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra [trainers]")

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model()

        def forward(self, inputs, labels):
            outputs = self.net(inputs)
            return {"loss": nn.functional.mse_loss(outputs, labels), "logits": outputs}

    def train():
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            max_grad_norm=MAX_NORM,
            learning_rate=0.1,
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(WithLoss(), arguments, train_dataset=data())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    same_losses(train, calls)


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_accelerate(calls, kind):
    accelerate = pytest.importorskip("accelerate", reason="needs the extra [trainers]")

    def train():
        accelerator = accelerate.Accelerator(cpu=True)
        net = model()
        net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        clip = accelerator.clip_grad_norm_ if kind == "norm" else accelerator.clip_grad_value_
        return loop(net, optimizer, accelerator.backward, lambda: clip(net.parameters(), MAX_NORM))

    same_losses(train, calls)


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_lightning_trainer(calls, kind, tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs the extra [trainers]")
    losses = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model()

        def training_step(self, batch, _):
            loss = nn.functional.mse_loss(self.net(batch["inputs"]), batch["labels"])
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train():
        losses.clear()
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=STEPS,
            gradient_clip_val=MAX_NORM,
            gradient_clip_algorithm=kind,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(data(), batch_size=4))
        return list(losses)

    same_losses(train, calls)


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_lightning_fabric(calls, kind):
    fabrics = pytest.importorskip("lightning.fabric", reason="needs the extra [trainers]")

    def train():
        fabric = fabrics.Fabric(accelerator="cpu", devices=1)
        net = model()
        net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        bound = {"max_norm": MAX_NORM} if kind == "norm" else {"clip_val": MAX_NORM}
        return loop(net, optimizer, fabric.backward, lambda: fabric.clip_gradients(net, optimizer, **bound))

    same_losses(train, calls)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("kind", ["norm", "value"])
@pytest.mark.parametrize("fused", [False, True])
def test_lightning_mixed_precision(fused, kind, manual, tmp_path):
    """Clipping by our plugin, where Lightning's own refuses fused optimizers, against an optimizer that it takes."""
    lightning = pytest.importorskip("lightning", reason="needs the extra [trainers]")
    from lightning.pytorch.plugins.precision import MixedPrecision

    from fastclip.integrations.lightning import ClippedMixedPrecision

    class Module(lightning.LightningModule):
        def __init__(self, fused):
            super().__init__()
            self.net, self.fused, self.automatic_optimization = model(), fused, not manual
            self.losses = []

        def training_step(self, batch, _):
            loss = nn.functional.mse_loss(self.net(batch["inputs"]), batch["labels"])
            self.losses.append(loss.item())
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=MAX_NORM, gradient_clip_algorithm=kind)
                optimizer.step()
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1, fused=self.fused)

    def train(plugin, fused):
        module = Module(fused)
        clip = {} if manual else {"gradient_clip_val": MAX_NORM, "gradient_clip_algorithm": kind}
        lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=STEPS,
            **clip,
            plugins=[plugin("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
        ).fit(module, torch.utils.data.DataLoader(data(), batch_size=4))
        return torch.tensor(module.losses)

    if fused:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            train(MixedPrecision, True)
    if manual and not fused:
        return  # Lightning then clips before it unscales, as its documentation says
    got = train(ClippedMixedPrecision, fused)
    assert len(got) == STEPS
    if manual:
        torch.testing.assert_close(got, train(ClippedMixedPrecision, True), rtol=0, atol=0)
        return
    torch.testing.assert_close(got, train(MixedPrecision, False), rtol=1e-3, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_accelerates_optimizer_is_clipped_on_step(fused):
    accelerate = pytest.importorskip("accelerate", reason="needs the extra [trainers]")

    def train(hook):
        net, losses = model(), []
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
        accelerator = accelerate.Accelerator(cpu=True)
        net, optimizer = accelerator.prepare(net, optimizer)
        if hook:
            fastclip.clip_on_step(optimizer, MAX_NORM)
        for inputs, labels in batches():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(inputs), labels)
            accelerator.backward(loss)
            if not hook:
                accelerator.clip_grad_norm_(net.parameters(), MAX_NORM)
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    torch.testing.assert_close(train(True), train(False), rtol=1e-5, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_accelerates_optimizer_with_a_scaler(fused):
    """What Accelerate's optimizer steps by its scaler may have been unscaled and clipped by us."""
    accelerate = pytest.importorskip("accelerate", reason="needs the extra [trainers]")
    accelerate.Accelerator(cpu=True)

    def train(ours):
        net, losses = model(), []
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        inner = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
        optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
        for inputs, labels in batches():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(inputs), labels)
            scaler.scale(loss).backward()
            if ours:
                fastclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer.optimizer, net.parameters(), MAX_NORM)
            else:
                scaler.unscale_(optimizer.optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    torch.testing.assert_close(train(True), train(False), rtol=1e-5, atol=0)
