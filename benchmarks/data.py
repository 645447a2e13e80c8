"""How fast a large data file is checked, beside a plain validator and `datasets`, in one run.

    python benchmarks/data.py [--rows 1000000] [--longer 1] [--repeat 3] [--folder DIR]

Writes a chat file of about 1.2 KB a row (kept in DIR for the next run) and prints rows a second and peak memory of each
contender, medians, each run in a process of its own. Needs 1.2 GB of disk, and as much again for what `datasets` makes of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTENDERS = ("plain validator", "datasets load + map", "structure only", "full, no near duplicates", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--longer", type=int, default=1, help="how many times as long the rows are: 10 is 12 KB [1]")
    parser.add_argument(
        "--repeat", type=int, default=3, help="rounds; each contender once in each, medians are printed"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tunesmith_bench")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = options.folder / f"chat_{options.rows}x{options.longer}.jsonl"
    if options.one:
        run_one(options.one, path)
        return
    if not path.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        generate(path, options.rows, options.longer)
    print(f"{path}: {options.rows:,} rows, {path.stat().st_size / 1e9:.2f} GB")
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    notes = dict.fromkeys(CONTENDERS, "")
    command = [sys.executable, __file__, *sys.argv[1:], "--one"]
    for _ in range(options.repeat):
        for name in CONTENDERS:
            done = subprocess.run([*command, name], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            speed, peak, notes[name] = json.loads(done.stdout)
            seen[name].append((speed, peak))
    plain = statistics.median(speed for speed, _ in seen[CONTENDERS[0]])
    for name, runs in seen.items():
        speed, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        low, high = min(runs)[0], max(runs)[0]
        print(
            f"{speed:10,.0f} rows/s ({low:,.0f} to {high:,.0f})  {speed / plain:5.2f}x  {peak:6.0f} MB  {name}{notes[name]}"
        )


def generate(path: Path, rows: int, longer: int) -> None:
    """Chats of random words: no two rows alike but for chance, one in a hundred repeated with two words swapped."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20_000)]

    def text(count: int) -> str:
        return " ".join(rng.choices(words, k=count)).capitalize() + "."

    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as out:
        answer = text(100)
        for i in range(rows):
            if i % 100 == 50:
                said = answer.split()
                a, b = rng.randrange(len(said)), rng.randrange(len(said))
                said[a], said[b] = said[b], said[a]
                answer = " ".join(said)
            else:
                answer = text(longer * rng.randint(60, 220)) + (" 🎯 done — naïvely" if i % 10 == 0 else "")
            messages = [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": text(longer * rng.randint(8, 50))},
                {"role": "assistant", "content": answer},
            ]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    temporary.rename(path)


def run_one(name: str, path: Path) -> None:
    note = ""
    begun = time.perf_counter()
    if name == "plain validator":
        rows = plain(path)
    elif name == "datasets load + map":
        rows = with_datasets(path)
    else:
        from tunesmith.data.check import examine

        found = examine([str(path)], structure_only=name == "structure only", near_duplicates=name == "full")
        rows = found.rows_in
        note = f": {found.counts}" if found.counts else ""
    speed = rows / (time.perf_counter() - begun)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    helpers = 0 if name in CONTENDERS[:2] else len(os.sched_getaffinity(0))  # each at most the largest child's peak
    print(json.dumps((speed, (peaks[0] + helpers * peaks[1]) / 2**10, note)))


def plain(path: Path) -> int:
    """What the format checks of OpenAI's cookbook look at, row by row."""
    errors, rows = 0, 0
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            rows += 1
            row = json.loads(line)
            messages = row.get("messages") if isinstance(row, dict) else None
            if not messages:
                errors += 1
                continue
            for message in messages:
                errors += "role" not in message or "content" not in message
                errors += any(k not in ("role", "content", "name", "function_call", "weight") for k in message)
                errors += message.get("role") not in ("system", "user", "assistant", "function")
                content = message.get("content")
                errors += not content or not isinstance(content, str)
            errors += not any(message.get("role") == "assistant" for message in messages)
    assert errors == 0
    return rows


def with_datasets(path: Path) -> int:
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        return len(loaded.map(lambda row: {"ok": bool(row["messages"])}))


if __name__ == "__main__":
    main()
