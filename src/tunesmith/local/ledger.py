"""The loss of each training row in each epoch, written down while it is trained: what the row report is made from.

    row_losses.npy   float32 [epochs, rows]: mean nats a learnt token, before that step's update; 0 where not (yet) seen

The file is as large from the start as it will be. A killed run that is gone on with writes the same numbers once more.
"""

from __future__ import annotations

import os
from contextlib import suppress

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from tunesmith.runs import ROW_LOSSES, Run

LEAST = 1e-9  # nats: of a row that is known by heart, whose loss is 0 in fp32; 0 is a row that was not seen
Seen = list[tuple[list[int], torch.Tensor]]  # rows, and their losses


def lay_out(run: Run, rows: int, epochs: int) -> None:
    """Make the file, where it is not there yet. Without room for it on the disk there is none, and the log says so."""
    path = run / ROW_LOSSES
    try:
        if path.exists() and np.load(path, mmap_mode="r").shape == (epochs, rows):
            return
        open_memmap(path, "w+", np.float32, (epochs, rows)).flush()
        with path.open("rb+") as stream:
            if hasattr(os, "posix_fallocate"):  # not on macOS; a full disk would end the process at a later write
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    except (OSError, ValueError) as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        run.append("warning", message=f"the rows' losses are not written down: {error}")


class Ledger:
    """Writes into the file that `lay_out` has made; into none where there is none (on another machine than the first)."""

    def __init__(self, run: Run, per_epoch: int) -> None:
        self._per_epoch = per_epoch
        path = run / ROW_LOSSES
        self._file: NDArray[np.float32] | None = None
        try:
            self._file = open_memmap(path, "r+") if path.is_file() else None
        except (OSError, ValueError) as error:
            run.append("warning", message=f"the rows' losses are not written down: {error}")

    def write(self, step: int, seen: Seen) -> None:
        """Of the step, counted from 0."""
        if self._file is not None:
            for rows, losses in seen:
                self._file[step // self._per_epoch, rows] = losses.float().clamp_min(LEAST).cpu().numpy()
