"""Boards that show a run's curves: TensorBoard, and Weights & Biases if the config asks for it.

Curves are named `train/loss`, `valid/accuracy`; final results `final/test/accuracy`.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ml_collections import ConfigDict
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import hparams, scalar

from experiments.records import workdir
from experiments.runtime import files
from experiments.runtime.errors import UserError

IDS_NAME = "wandb.json"  # the IDs of the run's pages, by project


class TensorBoard:
    """A file of TensorBoard events.

    It does not use tensorboardX's SummaryWriter, whose thread ends silently when the disk is full;
    later writes then hang. The file also has the config, for the tab HPARAMS.
    """

    def __init__(self, folder: Path, config: ConfigDict, start: int | None) -> None:
        """Opens a new file in `folder`, which hides points of earlier files past update `start`."""
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}.{start}")
        if start is not None:
            started = SessionLog(status=SessionLog.START)
            self._write(Event(step=start + 1, session_log=started))
        _, described, self._ended = hparams(hyperparameters(config), {})
        self._write(Event(summary=described))

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, scalars: dict[str, float], update: int) -> None:
        """Adds a point to each of the curves."""
        for name, value in scalars.items():
            self._write(Event(step=update, summary=scalar(name, value)))

    def write_results(self, scalars: dict[str, float], update: int) -> None:
        """Adds the final results as curves of one point, and marks the run as finished."""
        self.write(scalars, update)
        self._write(Event(summary=self._ended))
        self.flush()

    def flush(self) -> None:
        """Flushes to the disk."""
        self._file.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write_event(event)


class WeightsAndBiases:
    """A run's page at Weights & Biases, which all starts of the run share."""

    def __init__(self, folder: Path, config: ConfigDict) -> None:
        """Opens the page in the project `config.wandb`.

        Raises:
          UserError: Weights & Biases cannot open it.
        """
        import wandb

        path = folder / IDS_NAME
        ids = files.read_json(path) if path.exists() else {}
        own = ids.setdefault(config.wandb, secrets.token_hex(4))
        files.write_json(path, ids)
        try:
            self._run = wandb.init(
                project=config.wandb,
                id=own,
                resume="allow",
                name=str(folder),
                dir=str(folder),
                config=config.to_dict(),
                allow_val_change=True,  # such as num_updates
                settings=wandb.Settings(console="off"),  # a progress bar does not belong in a log
            )
        except wandb.Error as error:
            raise UserError(
                f"config.wandb is {config.wandb}: {error}; to run offline, set "
                "WANDB_MODE=offline, and upload the run later by `wandb sync`"
            ) from error

    def __enter__(self) -> "WeightsAndBiases":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)

    def write(self, scalars: dict[str, float], update: int) -> None:
        """Adds a point to each of the curves; the page drops points that it already has."""
        self._run.log(scalars, step=update)

    def write_results(self, scalars: dict[str, float], update: int) -> None:
        """Puts the final results into the summary."""
        self._run.summary.update({**scalars, "final/update": update})

    def flush(self) -> None:
        """Does nothing: the package writes in its own process."""


Board = TensorBoard | WeightsAndBiases


@contextlib.contextmanager
def opened(folder: Path, config: ConfigDict, start: int | None = None) -> Iterator[list[Board]]:
    """Opens the boards of the run in `folder`.

    If the run continues from update `start`, TensorBoard hides points of earlier starts past it.

    Raises:
      UserError: Weights & Biases cannot open its page.
    """
    with contextlib.ExitStack() as stack:
        boards: list[Board] = [
            stack.enter_context(TensorBoard(folder / "tensorboard", config, start))
        ]
        if config.wandb:
            boards.append(stack.enter_context(WeightsAndBiases(folder, config)))
        yield boards


def write_results(boards: Iterable[Board], results: dict[str, Any]) -> None:
    """Writes the content of `results.json` to the boards."""
    scalars = final_scalars(results["rows"])
    for board in boards:
        board.write_results(scalars, results["update"])


def hyperparameters(config: ConfigDict) -> dict[str, bool | float | str]:
    """The fields of a config by their full names; lists become text."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in workdir.flat(config).items()
    }


def final_scalars(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics of the rows of `results.json`, by the names of their curves.

    `final/test/accuracy` uses re-estimated population statistics, if the model has any;
    `final/test/accuracy_batch` uses batch statistics, `final/test/accuracy_running` running
    averages.
    """
    scalars = {}
    for row in rows:
        metrics = dict(row)
        split, statistics = metrics.pop("split"), metrics.pop("statistics")
        reading = metrics.pop("reading", "").replace(" ", "_")
        place = "/".join(filter(None, ("final", split, reading)))
        suffix = "" if statistics in ("population", "none") else f"_{statistics}"
        scalars |= {f"{place}/{name}{suffix}": value for name, value in metrics.items()}
    return scalars
