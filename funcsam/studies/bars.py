"""The progress of a comparison."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from funcsam.studies.training import Run


class Bars:
    """One progress bar per optimizer: epoch, loss, test accuracy, time left."""

    def __init__(self, epochs: int, runs: dict[str, Run], console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("epoch {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console)
        self.tasks: dict[str, TaskID] = {
            spec: self.progress.add_task(spec, total=epochs, completed=run.epoch, note="waiting")
            for spec, run in runs.items()
        }

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, spec: str, note: str) -> None:
        """Shows a word beside a bar."""
        self.progress.update(self.tasks[spec], note=note)

    def show(self, spec: str, run: Run) -> None:
        """Shows where an optimizer is: means over the seeds."""
        accuracy = 100 * (1 - run.test_error[-1].mean().item())
        note = f"loss {run.loss[-1].mean().item():.3f}  test {accuracy:.1f} %"
        self.progress.update(self.tasks[spec], completed=run.epoch, note=note)
