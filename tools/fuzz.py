"""Coverage-guided fuzzing of everything that reads a data file: bytes in, findings or a DataError out, never a crash.

    pip install atheris && python tools/fuzz.py CORPUS_DIR -max_total_time=600

Arguments are libFuzzer's. The first byte chooses the container; what is read is also checked, repaired and written again.
Anything but the project's own errors ends the run and leaves the input in a file crash-….
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tunesmith"]):
    from tunesmith.data import check, convert, repair, text
    from tunesmith.errors import TunesmithError

CONTAINERS = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".jsonl.zst")
FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def one(data: bytes) -> None:
    """Check one made-up file, repair it, convert its rows; what is repaired must be read again without new faults."""
    if not data:
        return
    path = FOLDER / f"data{CONTAINERS[data[0] % len(CONTAINERS)]}"
    path.write_bytes(data[1:])
    out, log = FOLDER / "fixed.jsonl", FOLDER / "fixed.jsonl.changes.jsonl"
    try:
        found = check.load(str(path))
        assert found.rows_in == found.usable + len({i.where for i in found.errors() if i.code not in WHOLE}), (
            "rows lost"
        )
        for row in found.conversations:
            for name in convert.FORMATS:
                convert.to_row(row, name)
            for message in row.messages:
                text.unmangle(message.content)
        repair.repair([str(path)], out)
    except TunesmithError:
        pass
    finally:
        for made in (out, log):
            made.unlink(missing_ok=True)


WHOLE = ("too-few-rows", "few-rows", "unreadable-file")  # findings about a file, not about a row

if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
