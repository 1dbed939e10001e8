"""The front end for torch.optim inside other people's training loops: each trains as a loop written by hand does."""

import math
import os
from collections.abc import Callable, Iterable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import accelerate
import lightning
import pytest
import torch
import torch.nn.functional as F
import transformers
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from funcsam.torch_optim import SAM
from tests.asserts import close, equal
from tests.torch_optim.lightning_run import fit

RHO = 0.1
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
EPOCHS = 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)).double()


def loader():
    images, labels = load_digits(return_X_y=True)
    return DataLoader(TensorDataset(torch.as_tensor(images[:256] / 16), torch.as_tensor(labels[:256])), batch_size=32)


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


def decay(step):
    return 0.7**step


def tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def by_hand(
    model: nn.Module,
    batches: Iterable[Any],
    base: torch.optim.Optimizer,
    clip_each: float = torch.inf,
    clip: float = torch.inf,
    after_step: Callable[[], Any] = lambda: None,
    loss: Callable[..., Any] = loss,
) -> list[float]:
    """SAM in full: two passes per batch, both clipped or only the second, then a step of the base optimizer."""
    params, losses = list(model.parameters()), []

    def backward(batch):
        base.zero_grad()
        value = loss(model, *batch)
        value.backward()
        nn.utils.clip_grad_norm_(params, clip_each)
        return value.item()

    for batch in batches:
        losses.append(backward(batch))
        kept = tensors(model)
        with torch.no_grad():
            norm = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).norm()
            for p in params:
                if p.grad is not None:
                    p += RHO * p.grad / norm
        backward(batch)
        model.load_state_dict(kept)
        nn.utils.clip_grad_norm_(params, clip)
        base.step()
        after_step()
    return losses


def epochs_by_hand(**clips):
    """Four epochs, with a schedule over epochs."""
    model, losses = network(), []
    base = torch.optim.SGD(model.parameters(), **SGD)
    scheduler = LambdaLR(base, decay)
    for _ in range(EPOCHS):
        losses += by_hand(model, loader(), base, **clips)
        scheduler.step()
    return model, losses


# PyTorch Lightning


class Classifier(lightning.LightningModule):
    """What a user writes. SAM is one line, and `optimizer_step` is there to log the loss at the params."""

    def __init__(self, **sam):
        super().__init__()
        self.net, self.sam, self.losses = network(), sam, []

    def training_step(self, batch, batch_idx):
        return loss(self.net, *batch)

    def configure_optimizers(self):
        optimizer = SAM(self.parameters(), torch.optim.SGD, rho=RHO, model=self, **self.sam, **SGD)
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, decay)}

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        value = optimizer.step(closure=optimizer_closure)
        self.log("loss", value, on_step=False, on_epoch=True)
        self.losses.append(value.item())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # the data are in memory
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's use of torch's pytree
class TestLightning:
    def test_trains_as_by_hand(self, tmp_path):
        """Weights, buffers, schedule and losses; the trainer counts one step; the logged loss is that of the params."""
        module = Classifier()
        trainer = fit(module, loader(), tmp_path, EPOCHS)
        plain, losses = epochs_by_hand()
        close(tensors(module.net), tensors(plain))
        close(torch.tensor(module.losses), torch.tensor(losses))
        last = losses[-len(losses) // EPOCHS :]
        assert trainer.callback_metrics["loss"].item() == pytest.approx(sum(last) / len(last))
        assert trainer.global_step == len(losses)
        assert losses[-1] < losses[0] / 2

    def test_resumes_bit_for_bit(self, tmp_path):
        """A checkpoint in the middle goes on as if nothing had happened."""
        whole, first, second = Classifier(), Classifier(), Classifier()
        fit(whole, loader(), tmp_path, EPOCHS)
        fit(first, loader(), tmp_path, 2).save_checkpoint(tmp_path / "middle.ckpt")
        fit(second, loader(), tmp_path, EPOCHS, ckpt_path=tmp_path / "middle.ckpt")
        equal(tensors(second.net), tensors(whole.net))
        assert first.losses + second.losses == whole.losses

    def test_clips_every_evaluation(self, tmp_path):
        """The trainer clips inside the closure: both passes, as `chain(clip_by_global_norm(c), sam(rho), sgd(lr))`."""
        module = Classifier()
        fit(module, loader(), tmp_path, EPOCHS, gradient_clip_val=0.3)
        close(tensors(module.net), tensors(epochs_by_hand(clip_each=0.3)[0]))
        assert not torch.allclose(module.net[0].weight, epochs_by_hand()[0][0].weight)

    def test_refuses_to_accumulate(self, tmp_path):
        """The trainer would accumulate the first pass only."""
        with pytest.raises(RuntimeError, match="gradients must be clear"):
            fit(Classifier(first_pass="closure"), loader(), tmp_path, EPOCHS, accumulate_grad_batches=2)

    def test_fabric_trains_as_by_hand(self):
        """Fabric passes the closure on."""
        fabric, model = lightning.Fabric(accelerator="cpu", devices=1), network()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, model=model, **SGD)
        scheduler, losses = LambdaLR(optimizer, decay), []
        model, optimizer = fabric.setup(model, optimizer)
        batches = fabric.setup_dataloaders(loader())
        for _ in range(EPOCHS):
            for x, y in batches:

                def closure(x=x, y=y):
                    value = loss(model, x, y)
                    fabric.backward(value)
                    return value

                losses.append(optimizer.step(closure).item())
            scheduler.step()
        plain, wanted = epochs_by_hand()
        close(tensors(model), tensors(plain))
        close(torch.tensor(losses), torch.tensor(wanted))


# Hugging Face Trainer


class SAMTrainer(transformers.Trainer):
    """Takes both passes in `training_step`, over all slices of a batch; the trainer clips the gradient and steps."""

    slices = ()

    def training_step(self, model, inputs, num_items_in_batch=None):
        value = super().training_step(model, inputs, num_items_in_batch)
        self.slices = (*self.slices, inputs)
        if self.accelerator.sync_gradients:
            self.optimizer.optimizer.first_step(zero_grad=True)
            for again in self.slices:
                super().training_step(model, again, num_items_in_batch)
            self.slices = ()
        return value


ADAMW = {"lr": 0.01, "betas": (0.9, 0.99)}
CLIP, DECAY, STEPS, BATCH = 0.5, 0.1, 24, 16


def bert():
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).double()


def sentences():
    """Words from either half of the vocabulary; the label tells which."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (STEPS * BATCH // 2,), generator=generator)
    words = torch.randint(8, (len(labels), 8), generator=generator) + 8 * labels[:, None]
    return [{"input_ids": row, "labels": label} for row, label in zip(words, labels.tolist(), strict=True)]


def mean_over_items(outputs, labels, num_items_in_batch):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def train(path, resume=None, accumulate=1, **kwargs):
    model = bert()
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // accumulate,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **kwargs,
    )
    trainer = SAMTrainer(
        model=model,
        args=arguments,
        train_dataset=sentences(),
        compute_loss_func=mean_over_items,
        optimizer_cls_and_kwargs=(SAM, {"base_optimizer": torch.optim.AdamW, "rho": RHO, **ADAMW}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class TestTransformers:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_trains_as_by_hand(self, accumulate, tmp_path):
        """With the trainer's groups, clipping, linear schedule and log, also where it accumulates gradients."""
        model, logged = train(tmp_path, accumulate=accumulate, save_strategy="no")
        plain = bert()
        named = list(plain.named_parameters())
        exempt = [p for name, p in named if "bias" in name or "LayerNorm" in name]
        decayed = [p for name, p in named if not ("bias" in name or "LayerNorm" in name)]
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": exempt, "weight_decay": 0.0}]
        base = torch.optim.AdamW(groups, **ADAMW)
        scheduler = LambdaLR(base, lambda step: 1 - step / STEPS)
        batches = [batch for _ in range(2) for batch in DataLoader(sentences(), batch_size=BATCH)]
        losses = by_hand(
            plain,
            [(batch,) for batch in batches],
            base,
            clip=CLIP,
            after_step=scheduler.step,
            loss=lambda model, batch: model(**batch).loss,
        )
        close(tensors(model), tensors(plain))
        assert logged == pytest.approx(losses, abs=1e-4)
        assert losses[-1] < losses[0] / 2

    def test_resumes_bit_for_bit(self, tmp_path):
        """From the checkpoint that the trainer wrote in the middle."""
        whole, _ = train(tmp_path)
        resumed, _ = train(tmp_path / "again", resume=str(tmp_path / f"checkpoint-{STEPS // 2}"), save_strategy="no")
        equal(tensors(resumed), tensors(whole))


# accelerate


def prepared():
    accelerator, model = accelerate.Accelerator(cpu=True), network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, model=model, **SGD)
    return accelerator, *accelerator.prepare(model, optimizer, loader(), LambdaLR(optimizer, decay))


def one_closure(accelerator, model, optimizer, x, y):
    values = []

    def closure():
        values.append(loss(model, x, y))
        accelerator.backward(values[-1])
        return values[-1]

    optimizer.step(closure)
    return values[0].item()


def two_steps(accelerator, model, optimizer, x, y):
    value = loss(model, x, y)
    accelerator.backward(value)
    optimizer.optimizer.first_step(zero_grad=True)
    accelerator.backward(loss(model, x, y))
    optimizer.optimizer.second_step(zero_grad=True)
    return value.item()


class TestAccelerate:
    @pytest.mark.parametrize("step", [one_closure, two_steps])
    def test_trains_as_by_hand(self, step):
        """With a closure, which the wrapped optimizer passes on, and with two steps of what it wraps."""
        accelerator, model, optimizer, batches, scheduler = prepared()
        losses = []
        for _ in range(EPOCHS):
            losses += [step(accelerator, model, optimizer, *batch) for batch in batches]
            scheduler.step()
        plain, wanted = epochs_by_hand()
        close(tensors(model), tensors(plain))
        close(torch.tensor(losses), torch.tensor(wanted))

    def test_resumes_bit_for_bit(self, tmp_path):
        """From `save_state` in the middle."""

        def epoch(accelerator, model, optimizer, batches, scheduler):
            for batch in batches:
                one_closure(accelerator, model, optimizer, *batch)
            scheduler.step()

        run = prepared()
        epoch(*run)
        run[0].save_state(tmp_path)
        epoch(*run)
        again = prepared()
        again[0].load_state(tmp_path)
        epoch(*again)
        equal(tensors(again[1]), tensors(run[1]))


# Loops in the style of timm


class Cosine:
    """Writes the learning rate into the groups, after every update."""

    def __init__(self, optimizer, total):
        self.optimizer, self.total = optimizer, total
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def step_update(self, num_updates):
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (0.5 + 0.5 * math.cos(math.pi * num_updates / self.total))


def groups(model, weight_decay):
    """No decay for vectors."""
    return [
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
    ]


def closure_epoch(model, optimizer, scheduler, clip_grad):
    losses = []
    for num_updates, (x, y) in enumerate(loader(), start=1):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            value = loss(model, x, y)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
            return value

        losses.append(optimizer.step(closure).item())
        scheduler.step_update(num_updates=num_updates)
    return losses


def two_step_epoch(model, optimizer, scheduler, clip_grad):
    losses = []
    for num_updates, (x, y) in enumerate(loader(), start=1):
        value = loss(model, x, y)
        value.backward()
        optimizer.first_step(zero_grad=True)
        loss(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        optimizer.second_step(zero_grad=True)
        scheduler.step_update(num_updates=num_updates)
        losses.append(value.item())
    return losses


@pytest.mark.parametrize(("epoch", "clip"), [(closure_epoch, "clip_each"), (two_step_epoch, "clip")])
def test_a_loop_with_groups_and_a_schedule_over_updates(epoch, clip):
    """Groups share one norm; a scheduler that writes into `param_groups` reaches the base optimizer."""
    model, plain = network(), network()
    optimizer = SAM(groups(model, 0.05), torch.optim.SGD, rho=RHO, model=model, lr=0.1, momentum=0.9, nesterov=True)
    losses = epoch(model, optimizer, Cosine(optimizer, len(loader())), 0.3)
    base = torch.optim.SGD(groups(plain, 0.05), lr=0.1, momentum=0.9, nesterov=True)
    cosine, updates = Cosine(base, len(loader())), iter(range(1, 99))
    wanted = by_hand(plain, loader(), base, after_step=lambda: cosine.step_update(next(updates)), **{clip: 0.3})
    close(tensors(model), tensors(plain))
    close(torch.tensor(losses), torch.tensor(wanted))
