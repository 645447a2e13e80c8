"""TensorBoard event files in logs/, written with TensorBoard's own writer (no TensorFlow, no torch.utils)."""

from __future__ import annotations

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class Tracker:
    """Scalars by step. A resumed run opens a further file that drops what the first had past its step."""

    def __init__(self, folder: Path, step: int, silent: bool = False) -> None:
        self._writer = None if silent else EventFileWriter(str(folder))
        if step and self._writer:
            self._writer.add_event(
                Event(step=step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
            )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if not self._writer:
            return
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))

    def close(self) -> None:
        if self._writer:
            self._writer.close()
