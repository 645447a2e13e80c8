"""Where a run's curves go besides its own event log: TensorBoard files in logs/, and one service where that is asked for.

What a service cannot take is said once and never stops training.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tunesmith.data.write import write_bytes
from tunesmith.recipe import Recipe
from tunesmith.runs import Run


class Writer(Protocol):
    """Takes scalars by step."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def close(self, succeeded: bool) -> None: ...


class TensorBoard:
    """TensorBoard's own writer (no TensorFlow, no torch.utils). A resumed run opens a further file that drops what the first
    had past its step."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = EventFileWriter(str(folder), flush_secs=5)
        if step:
            restart = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=step + 1, wall_time=time.time(), session_log=restart))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))

    def close(self, succeeded: bool) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases: project "tunesmith", or $WANDB_PROJECT; $WANDB_MODE=offline keeps all in logs/wandb."""

    def __init__(self, run: Run, recipe: Recipe, step: int) -> None:
        import wandb

        known = run / "logs" / "wandb.id"
        identity = known.read_text() if known.exists() else secrets.token_hex(4)
        write_bytes(known, identity.encode())
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tunesmith"),
            name=run.path.name,
            id=identity,
            resume="allow",
            dir=str(run / "logs"),
            config=_settings(recipe),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class MLflow:
    """MLflow, at $MLFLOW_TRACKING_URI (a server, or a folder; without it the run's logs/mlruns);
    experiment "tunesmith", or $MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, run: Run, recipe: Recipe, step: int) -> None:
        from mlflow import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place:  # mlflow's own default, a database, needs its server's package
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            place = (run / "logs" / "mlruns").resolve().as_uri()
        self._client = MlflowClient(place)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tunesmith")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        known = run / "logs" / "mlflow.id"
        if known.exists():
            self._id = known.read_text()
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment, run_name=run.path.name).info.run_id
        write_bytes(known, self._id.encode())
        for key, value in _settings(recipe).items():
            self._client.log_param(self._id, key, value)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(key, value, now, step) for key, value in values.items()])

    def close(self, succeeded: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if succeeded else "KILLED")


SERVICES: dict[str, Callable[[Run, Recipe, int], Writer]] = {"wandb": Wandb, "mlflow": MLflow}


class Tracker:
    """All writers of a run. `silent`: none, for those of several processes whose curves are the first one's too."""

    def __init__(self, run: Run, recipe: Recipe, step: int) -> None:
        self._run = run
        self._writers: list[Writer] = [] if run.silent else [TensorBoard(run / "logs", step)]
        if recipe.track != "none" and not run.silent:
            with self._excused(recipe.track):
                self._writers.append(SERVICES[recipe.track](run, recipe, step))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for writer in list(self._writers):
            with self._excused(writer):
                writer.scalars(step, values)

    def close(self, succeeded: bool) -> None:
        for writer in list(self._writers):
            with self._excused(writer):
                writer.close(succeeded)

    @contextlib.contextmanager
    def _excused(self, writer: Writer | str):  # type: ignore[no-untyped-def]
        try:
            yield
        except Exception as error:  # a service's own, whatever it is
            name = writer if isinstance(writer, str) else type(writer).__name__
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._run.append("warning", message=f"{name} takes no more curves: {reason}")
            self._writers = [w for w in self._writers if w is not writer]


def _settings(recipe: Recipe) -> dict[str, str | int | float]:
    return {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in ((name, getattr(recipe, name)) for name in recipe.__struct_fields__)
    }
