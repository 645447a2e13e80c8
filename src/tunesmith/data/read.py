"""Files to raw rows: JSONL, JSON, CSV and Parquet, each also .gz or .zst; folders; Hub data sets.

Nothing is dropped: what cannot be read comes out as an Issue that names file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import msgspec

from tunesmith.conversation import Issue
from tunesmith.data.findings import finding
from tunesmith.errors import DataError, UsageError, did_you_mean

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".zst")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


SAMPLES = Path(__file__).parent.parent / "assets" / "data"


def samples() -> list[str]:
    """Names of the sample data sets that come with the package."""
    return sorted(p.stem for p in SAMPLES.glob("*.jsonl"))


class Row(msgspec.Struct, frozen=True):
    """One raw record and where it stood ("file:line"; for JSON arrays and Parquet the row's number)."""

    where: str
    value: dict[str, Any]


def read(dataset: str) -> Iterator[Row | Issue]:
    """Rows of a file, of every data file in a folder, or of a Hub data set, in order.

    Raises DataError when there is nothing of that name, or nothing in it.
    """
    found = files(dataset)
    if found is None:
        yield from hub(dataset)
        return
    for file in found:
        try:
            yield from rows(file)
        except DataError as error:
            if len(found) == 1:
                raise
            yield unreadable(error)  # one bad file must not hide what is wrong with the others


def files(dataset: str) -> list[Path] | None:
    """The files of a data set: itself, or those of a folder or a sample's name. None for a name that may be the Hub's."""
    if not dataset.strip():
        raise UsageError("no data set: the name is empty", fix="is a variable of your shell unset?")
    path = Path(dataset).expanduser()
    if dataset in samples() and not path.exists():
        path = SAMPLES / f"{dataset}.jsonl"
    if path.is_dir():
        found = sorted(
            p
            for p in path.rglob("*")
            if p.is_file()
            and container(p) in SUFFIXES
            and not any(x.startswith(".") for x in p.relative_to(path).parts)
        )
        if not found:
            raise DataError("no data file in this folder", where=dataset, fix=f"expected {', '.join(SUFFIXES)}")
        return found
    if path.exists():
        return [path]
    if _looks_like_path(dataset):
        raise DataError("no such file", where=dataset, fix="check the path; it is taken from the current folder")
    return None


def unreadable(error: DataError) -> Issue:
    return finding("unreadable-file", error.where, error.message, error.fix)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or container(Path(name)) in SUFFIXES


def container(path: Path) -> str:
    """The suffix that says what a file is, without that of its packing: ".jsonl" of "a.jsonl.gz"."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UsageError("reading .zst needs zstandard", where=str(path), fix="pip install zstandard") from None
        return io.BufferedReader(zstandard.open(path, "rb"))  # buffered: the reader itself has no lines
    return path.open("rb")


def rows(path: Path) -> Iterator[Row | Issue]:
    """The rows of one file. Raises DataError when it is empty or cannot be read."""
    with opened(path) as stream:
        yield from parsed(path, stream)


def parsed(path: Path, stream: IO[bytes] | None) -> Iterator[Row | Issue]:
    """The rows of a file that has been `opened`."""
    if stream is None:
        fix = f"iconv -f utf-16 -t utf-8 {path.name} > utf8{container(path)}"
        yield finding("not-utf8", f"{path}:1", "the file is UTF-16, not UTF-8", fix)
        return
    kind = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".json": _json}.get(container(path), _jsonl)
    try:
        yield from kind(path, stream)
    except NotLines as whole:
        yield from _json(path, stream, whole.head)


def position(stream: IO[bytes]) -> int:
    """How many bytes of its file a stream has read (of .gz: packed ones; of .zst, which does not say: unpacked ones)."""
    packed = getattr(stream, "fileobj", None)
    try:
        return int(packed.tell() if packed else stream.tell())
    except OSError:  # a pipe
        return 0


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes] | None]:
    """A file unpacked, at its beginning; None for UTF-16. What goes wrong with the file, also later, is a DataError.

    It is opened once, so that a pipe (`<(…)`, /dev/stdin) is read whole.
    """
    try:
        with _open(path) as stream:
            head = stream.peek(4)[:4]  # type: ignore[attr-defined]
            if not head:
                raise DataError("the file is empty", where=str(path), fix="it needs at least one row")
            if head[:2] == b"\x1f\x8b" and path.suffix.lower() != ".gz":
                raise DataError("a gzip file", where=str(path), fix=f"name it {path.name}.gz")
            yield None if head[:2] in _UTF16 else stream
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"cannot be read: {why}", where=str(path), fix="is the file whole and readable?") from None
    except Exception as error:
        if type(error).__module__.startswith(("zstandard", "zlib", "pyarrow")):
            raise DataError(f"cannot be unpacked: {error}", where=str(path), fix="is the file whole?") from None
        raise


_UTF8_FIX = "save it as UTF-8, e.g. iconv -f latin1 -t utf-8"


def record(line: bytes, where: str) -> Row | Issue:
    """One line or item as a raw row, or what is wrong with it."""
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _bad_json(line, where, str(error))
    except RecursionError:
        return finding("not-json", where, "nested too deeply", "flatten this row")
    if not isinstance(value, dict):
        return finding(
            "not-an-object",
            where,
            f"the row is a {type(value).__name__}, not an object",
            'write {"prompt": …, "completion": …}',
        )
    return Row(where, value)


def _bad_json(line: bytes, where: str, reason: str) -> Issue:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return finding("not-utf8", where, f"byte {error.start + 1} is not UTF-8", _UTF8_FIX)
    if "surrogate" in reason.lower():
        return finding(
            "lone-surrogate",
            where,
            "half of a character (a lone surrogate escape)",
            "write the whole character",
        )
    reason = reason.removeprefix("JSON is malformed: ")
    return finding("not-json", where, f"not JSON: {reason}", "one complete JSON object per line")


def _jsonl(path: Path, stream: IO[bytes]) -> Iterator[Row | Issue]:
    for first, block in blocks(path, stream):
        for number, line in enumerate(block.split(b"\n"), first):
            if line.strip():
                yield record(line, f"{path}:{number}")


BLOCK = 1 << 20  # bytes read at a time, and then on to the end of the line


def blocks(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, whole lines) of a JSONL stream. Lines end with \\n only: U+2028 inside a string is text.

    Raises DataError when there is nothing but blank lines; NotLines when the stream is one JSON array.
    """
    number, empty = 1, True
    while block := stream.read(BLOCK):
        block += stream.readline()
        if number == 1:
            block = block.removeprefix(b"\xef\xbb\xbf")
            head = block.partition(b"\n")[0].strip()
            if head[:1] == b"[" and (not head.endswith(b"]") or not block.partition(b"\n")[2].strip()):
                raise NotLines(block)  # one array, over several lines or on one
        empty = empty and not block.strip()
        yield number, block
        number += block.count(b"\n")
    if empty:
        raise DataError("the file holds only blank lines", where=str(path), fix="it needs at least one row")


class NotLines(Exception):
    """A .jsonl file that is one JSON array; `head`: what was read of it."""

    def __init__(self, head: bytes) -> None:
        self.head = head


def array(path: Path, stream: IO[bytes], found: NotLines) -> Iterator[Row | Issue]:
    """The rows of a .jsonl file that turned out to be one JSON array."""
    return _json(path, stream, found.head)


def _json(path: Path, stream: IO[bytes], head: bytes = b"") -> Iterator[Row | Issue]:
    data = (head + stream.read()).removeprefix(b"\xef\xbb\xbf")
    try:
        items = msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        place = re.search(r"\(byte (\d+)\)", str(error))
        line = 1 + data[: int(place[1]) if place else 0].count(b"\n")
        if data.lstrip()[:1] != b"{":
            found = _bad_json(data, f"{path}:{line}", str(error))
            yield msgspec.structs.replace(found, fix="one JSON array of objects, or one complete JSON object per line")
        elif _is_object(data):  # one row, over several lines
            yield record(data, f"{path}:1")
        else:  # JSON Lines under a .json name
            yield from _jsonl(path, io.BytesIO(data))
        return
    if not items:
        raise DataError("the array is empty", where=str(path), fix="it needs at least one row")
    for number, item in enumerate(items, 1):
        yield record(bytes(item), f"{path}:{number}")


_OBJECTS = ("messages", "conversations", "metadata", "tools")  # stand in a cell as JSON


def _cell(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(data), dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _csv(path: Path, stream: IO[bytes]) -> Iterator[Row | Issue]:
    """Fields are parted by what the header has most of: commas, semicolons or tabs. A row's place is its first line."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(2**31 - 1)  # the module's own 131,072 characters are fewer than an article
    header = text.readline()
    reader = csv.DictReader(chain([header], text), delimiter=max(",;\t", key=header.count))
    names = list(reader.fieldnames or ())
    if not _is_utf8(names):
        yield finding("not-utf8", f"{path}:1", "the header is not UTF-8", _UTF8_FIX)
    elif len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        yield finding("csv-columns", f"{path}:1", f'two columns are named "{twice}"', "rename one of them")
    else:
        yield from _records(path, reader)
    text.detach()  # the stream is closed by who opened it


def _records(path: Path, reader: csv.DictReader[str]) -> Iterator[Row | Issue]:
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield finding("not-csv", where, f"not CSV: {error}", "quote fields that hold quotes or newlines")
            continue
        if row is None:
            return
        if None in row or None in row.values():
            fix = "quote fields that hold commas or newlines"
            yield finding("csv-columns", where, "not as many fields as the header", fix)
        elif not _is_utf8(row.values()):
            yield finding("not-utf8", where, "not UTF-8", _UTF8_FIX)
        else:
            yield Row(where, {k: _cell(v) if k in _OBJECTS else v for k, v in row.items()})


def _is_utf8(texts: Iterable[str]) -> bool:
    """Whether no byte of them stands as half a character, as undecodable ones do."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: Path, stream: IO[bytes]) -> Iterator[Row | Issue]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError(
            "reading Parquet needs pyarrow", where=str(path), fix="pip install 'tunesmith[local]'"
        ) from None
    number = 0
    whole = stream if path.suffix.lower() == ".parquet" else io.BytesIO(stream.read())
    for batch in pq.ParquetFile(whole).iter_batches(4096):
        for value in batch.to_pylist():
            number += 1
            yield Row(
                f"{path}:{number}",
                {k: _cell(v) if k in _OBJECTS and isinstance(v, str) else v for k, v in value.items()},
            )


def hub(name: str) -> Iterator[Row | Issue]:
    """A Hub data set, its `train` split: from the local cache, else, for a name like owner/name, from the network."""
    missing = DataError(
        f"neither a file here nor a data set that can be had{did_you_mean(name, samples())}",
        where=name,
        fix=f"check the path, or fetch it where there is a network and name the folder: "
        f"hf download --repo-type dataset {name} --local-dir {name.rpartition('/')[2]}",
    )
    try:
        import datasets
        import huggingface_hub
        from datasets import config
    except ImportError:
        raise missing from None
    datasets.disable_progress_bars()
    for library in ("huggingface_hub", "datasets"):  # each retry, and each use of the cache, would be a line of its own
        logging.getLogger(library).setLevel(logging.CRITICAL)
    before = config.HF_HUB_OFFLINE
    for offline in (True, before):
        config.HF_HUB_OFFLINE = offline
        try:
            if not offline:
                huggingface_hub.HfApi().dataset_info(name, timeout=5)  # loading would try for 25 s without a network
            loaded = datasets.load_dataset(name, split="train")
            break
        except Exception:  # whatever the hub client raises, the user's next step is the same
            if offline == before or "/" not in name:
                raise missing from None
        finally:
            config.HF_HUB_OFFLINE = before
    for number, value in enumerate(loaded, 1):
        yield Row(f"{name}:{number}", dict(value))
