"""What the page of trainers says beyond `test_clients`: each trains as a plain loop with closures does."""

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import accelerate
import lightning
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from funcsam.torch_optim import SAM
from tests.asserts import close
from tests.torch_optim.lightning_run import fit

NUMBERS = {"rho": 0.1, "lr": 0.05, "momentum": 0.9}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def loader(batch_size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 8, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.arange(32) % 4), batch_size=batch_size)


def plain_loop(model, optimizer, batches, loss):
    """Steps with closures, without a trainer."""
    for batch in batches:

        def closure(batch=batch):
            value = loss(model, batch)
            value.backward()
            return value

        optimizer.step(closure)
    return model


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Manual(lightning.LightningModule):
    """Manual optimisation; every batch comes in parts."""

    def __init__(self, halves=False):
        super().__init__()
        self.net, self.halves, self.automatic_optimization = network(), halves, False

    def configure_optimizers(self):
        return SAM(self.parameters(), torch.optim.SGD, **NUMBERS)

    def training_step(self, batch, batch_idx):
        optimizer, parts = self.optimizers(), list(zip(*(each.split(4) for each in batch), strict=True))

        def closure():
            for part in parts:
                self.manual_backward(cross_entropy(self.net, part) / len(parts))

        if not self.halves:
            return optimizer.step(closure=closure)
        for half in (optimizer.first_step, optimizer.second_step):
            closure()
            half(zero_grad=True)
        return None


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # the data are in memory
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's use of torch's pytree
@pytest.mark.parametrize("halves", [False, True])
def test_manual_optimisation_of_lightning(halves, tmp_path):
    """Both forms accumulate and train; only steps with a closure are counted."""
    module = Manual(halves)
    trainer = fit(module, loader(), tmp_path, 2)
    plain = network()
    optimizer = SAM(plain.parameters(), torch.optim.SGD, **NUMBERS)
    plain_loop(plain, optimizer, [*loader(), *loader()], cross_entropy)
    close(dict(module.net.named_parameters()), dict(plain.named_parameters()))
    assert trainer.global_step == (0 if halves else 8)


def test_accumulate_of_accelerate_loses_batches():
    """Where accelerate skips a step it does not call the closure: the page says to accumulate inside of it."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    model, optimizer, batches = accelerator.prepare(
        model, SAM(model.parameters(), torch.optim.SGD, **NUMBERS), loader()
    )
    seen = []
    for k, batch in enumerate(batches):

        def closure(k=k, batch=batch):
            seen.append(k)
            value = cross_entropy(model, batch)
            accelerator.backward(value)
            return value

        with accelerator.accumulate(model):
            optimizer.step(closure)
    assert seen == [1, 1, 3, 3]


class Normalised(nn.Module):
    """A network with running statistics, in the form that the trainer of Hugging Face expects."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).double()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class TwoPasses(transformers.Trainer):
    """The recipe without accumulation."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        value = super().training_step(model, inputs, num_items_in_batch)
        self.optimizer.optimizer.first_step(zero_grad=True)
        super().training_step(model, inputs, num_items_in_batch)
        return value


def test_an_optimizer_that_is_handed_to_the_trainer_of_hugging_face(tmp_path):
    """With `model=`, which the trainer cannot give, running statistics are those of the first pass."""
    torch.manual_seed(0)
    model = Normalised()
    start = copy.deepcopy(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    examples = [{"x": x, "labels": int(y)} for x, y in loader().dataset]
    optimizer = SAM(model.parameters(), torch.optim.SGD, model=model, **NUMBERS)
    TwoPasses(model=model, args=arguments, train_dataset=examples, optimizers=(optimizer, None)).train()
    again = SAM(start.parameters(), torch.optim.SGD, model=start, **NUMBERS)
    plain_loop(start, again, loader(), lambda model, batch: model(*batch)["loss"])
    close(model.state_dict(), start.state_dict())
    assert model.net[1].num_batches_tracked == 4
