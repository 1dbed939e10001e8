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

from funcsam.studies.comparison import Comparison, Settings

INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def funcsam() -> None:
    """Sharpness-aware training as pure functions."""


def _option(*names: str, text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, help=text, show_default=True)
    return option


@app.command()
def compare(
    data: Annotated[
        str, _option("--data", text="digits, breast-cancer or wine; shipped with scikit-learn.")
    ] = "digits",
    noise: Annotated[
        float,
        _option(
            "--noise",
            text="Fraction of the training labels replaced at random, by a class drawn uniformly from all classes "
            "(the right one among them). Test labels stay clean.",
        ),
    ] = 0.4,
    network: Annotated[
        str,
        _option(
            "--network",
            text="mlp (which is mlp-128-128), cnn (which is cnn-16-32: convolutions with BatchNorm, for images), or "
            "widths of your own as in mlp-64-64.",
        ),
    ] = "mlp",
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            "--optimizer",
            "-o",
            help="May be repeated. NAME or NAME:OPTION=VALUE,..., with NAME one of sgd, adam, adamw, sam, asam: "
            "sgd:momentum=0.9,weight_decay=5e-4, adamw:lr=1e-3, asam:rho=2,eta=0.01, sam:rho=0.05,base=adamw. "
            "Momentum is 0.9 where it is not given.",
            show_default="sgd, sam:rho=0.5 (the largest radius of the SAM paper's grid), asam:rho=2.0 (the ASAM "
            "authors' value for eta=0); fixed beforehand, not chosen by test error. With --hyper-sweep: sgd, sam, asam",
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
        int,
        _option(
            "--seeds", text="Networks per optimizer, trained at once; seed k has its own start, noise and batches."
        ),
    ] = 8,
    epochs: Annotated[int, _option("--epochs", text="Passes over the training set.")] = 100,
    batch_size: Annotated[int, _option("--batch-size", text="Examples per step.")] = 64,
    lr: Annotated[
        float,
        _option("--lr", text="Learning rate on sgd; adam and adamw take their own, 1e-3 unless lr=... says otherwise."),
    ] = 0.1,
    schedule: Annotated[
        str, _option("--schedule", text="What every learning rate follows: constant, step_decay or cosine.")
    ] = "cosine",
    device: Annotated[
        str,
        _option("--device", text="Where to train, e.g. cpu or cuda. One CPU thread, unless OMP_NUM_THREADS is set."),
    ] = "cpu",
    compile: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Compile every optimizer's step as one graph.", show_default=True),
    ] = True,
    out: Annotated[
        Path,
        _option(
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
    """Trains the same networks with several optimizers on real data with noisy labels, and shows the difference.

    The same seed has the same start, the same noise and the same batches under every optimizer.
    """
    console = Console(stderr=True, highlight=False)
    usual = ("sgd", "sam", "asam") if hyper_sweep else ("sgd", "sam:rho=0.5", "asam:rho=2.0")
    chosen = tuple(optimizer or usual)
    settings = Settings(
        data, noise, network, chosen, seeds, epochs, batch_size, lr, schedule, device, compile, hyper_sweep
    )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the networks are small: more threads would mostly wait for each other
    comparison = Comparison(settings, out, resume, console)
    restore = _stop_on_signals()
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


def _stop_on_signals() -> Callable[[], None]:
    """Lets SIGTERM stop a run as Ctrl-C does, until the returned function is called."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore
