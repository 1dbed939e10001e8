"""The options of the `funcsam` command."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

import torch
import typer
from rich.console import Console

from funcsam.studies import ranks
from funcsam.studies.comparison import Comparison
from funcsam.studies.ranks import Ranks
from funcsam.studies.settings import Settings, resolve

INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def funcsam() -> None:
    """Sharpness-aware training as pure functions."""


def option(*names: str, text: str) -> typer.models.OptionInfo:
    """An option whose default is shown as it is."""
    made: typer.models.OptionInfo = typer.Option(*names, help=text, show_default=True)
    return made


def usual(*names: str, text: str, default: str) -> typer.models.OptionInfo:
    """An option whose default depends on the data."""
    made: typer.models.OptionInfo = typer.Option(*names, help=text, show_default=default)
    return made


@app.command()
def compare(
    data: Annotated[
        str,
        option(
            "--data",
            text="digits, breast-cancer or wine, shipped with scikit-learn; or cifar10, which is downloaded (170 MB). "
            "Where other options have two defaults, the second is that for cifar10.",
        ),
    ] = "digits",
    data_dir: Annotated[
        Path | None,
        usual(
            "--data-dir",
            text="Folder of cifar-10-batches-py or cifar-10-python.tar.gz; nothing is downloaded then.",
            default="a cache of this user",
        ),
    ] = None,
    subset: Annotated[
        int | None,
        usual(
            "--subset",
            text="Train on so many examples, as many of each class as can be; the same ones for every seed.",
            default="all",
        ),
    ] = None,
    test_subset: Annotated[
        int | None, usual("--test-subset", text="Test on so many examples, likewise.", default="all")
    ] = None,
    noise: Annotated[
        float | None,
        usual(
            "--noise",
            text="Fraction of the training labels replaced. Test labels stay clean.",
            default="0.4 | 0",
        ),
    ] = None,
    noise_kind: Annotated[
        str,
        option(
            "--noise-kind",
            text="symmetric: by a class drawn uniformly from all classes (the right one among them). asymmetric: by "
            "the class that looks like it (of cifar10 truck to automobile, bird to airplane, deer to horse, cat to dog "
            "and back, the others stay; elsewhere the next class).",
        ),
    ] = "symmetric",
    network: Annotated[
        str | None,
        usual(
            "--network",
            text="mlp (which is mlp-128-128), cnn (which is cnn-16-32: convolutions with BatchNorm, for images), or "
            "widths of your own as in mlp-64-64. For colour images wrn-DEPTH-WIDTH, a Wide ResNet of depth 10, 16, 22, "
            "28, ...",
            default="mlp | wrn-16-8",
        ),
    ] = None,
    augmentation: Annotated[
        str | None,
        usual(
            "--augment",
            text="What is done to training images: none, standard, or some of crop,flip,cutout.",
            default="none | standard",
        ),
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            "--optimizer",
            "-o",
            help="May be repeated. NAME or NAME:OPTION=VALUE,..., with NAME one of sgd, adam, adamw, sam, asam: "
            "sgd:momentum=0.9,weight_decay=5e-4, adamw:lr=1e-3, asam:rho=2,eta=0.01, sam:rho=0.05,base=adamw. "
            "Momentum is 0.9 where it is not given.",
            show_default="sgd, sam:rho=0.5 (the largest radius of the SAM paper's grid), asam:rho=2.0 (the ASAM "
            "authors' value for eta=0); fixed beforehand, not chosen by test error. | sgd, sam:rho=0.05, asam:rho=2.0. "
            "With --hyper-sweep: sgd, sam, asam",
        ),
    ] = None,
    hyper_sweep: Annotated[
        str | None,
        typer.Option(
            "--hyper-sweep",
            help="NAME=VALUE,VALUE,...: every optimizer that has this option, and does not give it itself, is trained "
            "with all values in one vectorised run, and the value with the smallest error on a held-out fifth of the "
            "noisy training data is reported (all optimizers then train on the other four fifths). The test set plays "
            "no part in the choice.",
            show_default="none",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        usual(
            "--seeds",
            text="Networks per optimizer; seed k has its own start, noise, batches and augmentation. Small networks "
            "are trained at once, Wide ResNets one after the other.",
            default="8 | 3",
        ),
    ] = None,
    epochs: Annotated[int | None, usual("--epochs", text="Passes over the training set.", default="100 | 200")] = None,
    batch_size: Annotated[
        int | None,
        usual(
            "--batch-size",
            text="Examples per step; what does not fill a batch at the end of an epoch is left out of it.",
            default="64 | 128",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        usual(
            "--lr",
            text="Learning rate on sgd; adam and adamw take their own, 1e-3 unless lr=... says otherwise.",
            default="0.1",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        usual(
            "--schedule",
            text="What every learning rate follows: constant, step_decay (times 0.2 after 30, 60 and 80 %) or cosine.",
            default="cosine | step_decay",
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        usual(
            "--weight-decay",
            text="Weight decay on sgd, outside the ascent; adam and adamw take their own.",
            default="0 | 5e-4",
        ),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        usual(
            "--label-smoothing",
            text="Share of the target that is spread evenly over all classes, in training.",
            default="0 | 0.1",
        ),
    ] = None,
    device: Annotated[
        str,
        option(
            "--device",
            text="Where to train, e.g. cpu or cuda. Small networks take one CPU thread and Wide ResNets all, unless "
            "OMP_NUM_THREADS is set. On a GPU Wide ResNets train under bfloat16 autocast.",
        ),
    ] = "cpu",
    compile: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Compile every optimizer's step as one graph.", show_default=True),
    ] = True,
    out: Annotated[
        Path,
        option(
            "--out",
            text="Folder for results.json, comparison.png and checkpoints. A finished run in it may be repeated with "
            "the same settings (the figures will be the same); an unfinished one, or one of other settings, is never "
            "replaced.",
        ),
    ] = Path("runs/compare"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out; give the same options again.")
    ] = False,
) -> None:
    """Trains the same networks with several optimizers on real data, often with noisy labels, and shows the difference.

    The same seed has the same start, noise, batches and augmentation under every optimizer. Processes that torchrun
    starts share the seeds.
    """
    settings = resolve(
        data,
        noise=noise,
        network=network,
        optimizers=tuple(optimizer or ()),
        seeds=seeds,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        schedule=schedule,
        device=device,
        compile=compile,
        hyper_sweep=hyper_sweep,
        noise_kind=noise_kind,
        augment=augmentation,
        label_smoothing=label_smoothing,
        weight_decay=weight_decay,
        subset=subset,
        test_subset=test_subset,
        data_dir=data_dir,
    )
    if "OMP_NUM_THREADS" not in os.environ and not settings.network.startswith("wrn"):
        torch.set_num_threads(1)  # the networks are small: more threads would mostly wait for each other
    with ranks.together(settings.device, settings.seeds) as team:
        _run(settings, out, resume, team)


def _run(settings: Settings, out: Path, resume: bool, team: Ranks) -> None:
    console = Console(stderr=True, highlight=False, quiet=not team.first)
    comparison = team.in_turn(lambda: Comparison(settings, out, resume, console, team))
    comparison.share_out()
    restore = _stop_on_signals(comparison)
    try:
        comparison.train()
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        comparison.save()
        console.print(
            f"compare: stopped after {comparison.epochs_done()} epochs; the same command with --resume goes on.",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    finally:
        restore()
    comparison.report()


def _stop_on_signals(comparison: Comparison) -> Callable[[], None]:
    """Lets SIGTERM stop a run as Ctrl-C does, until the returned function is called."""

    def stop(number: int, frame: FrameType | None) -> None:
        comparison.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore
