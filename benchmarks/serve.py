"""Serving beside `transformers serve`: the same model, the same clients, one server after the other in one run.

    python benchmarks/serve.py [--clients 200] [--seconds 60] [--servers ours,transformers,transformers:cb] [--requests 0]

Each client asks one short question after the other of the starter, for 64 tokens at most, and waits for each answer.
Prints tokens and answers a second, the median and 99th percentile of their times, errors, and the server's peak memory;
`transformers:cb` is with continuous batching. `--requests 10000`: so many in all instead of a time, with the memory after
each tenth of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STARTER = str(ROOT / "src/tunesmith/assets/starter")
TOKENS = 64
ASKED = ("What is {}?", "Tell me about {}.", "Why do people like {}?", "How would you describe {} to a child?")
THINGS = (
    "rain",
    "bread",
    "the sea",
    "a cat",
    "a violin",
    "winter",
    "the moon",
    "a garden",
    "music",
    "a bridge",
    "tea",
    "a clock",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--servers", default="ours,transformers,transformers:cb")
    options = parser.parse_args()
    seen: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.repeat):
        for name in options.servers.split(","):
            seen.setdefault(name, []).append(measure(name, options))
    best = max((statistics.median(r["tokens_s"] for r in runs) for n, runs in seen.items() if n != "ours"), default=0.0)
    for name, runs in seen.items():
        m = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        ratio = f" {m['tokens_s'] / best:5.2f}x" if best else ""
        print(
            f"{name:16} {m['tokens_s']:6.0f} tokens/s{ratio} {m['answers_s']:6.1f} answers/s  p50 {m['p50']:.2f} s  "
            f"p99 {m['p99']:.2f} s "
            f"({m['p99'] / m['p50']:.1f}x)  errors {m['errors']:.0f}  peak {m['peak_mb']:.0f} MB"
        )


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        if name == "ours":
            model, command = (
                "starter",
                ["-m", "tunesmith", "serve", "--port", str(port), "--data-dir", folder + "/data"],
            )
        else:
            model = STARTER
            command = [
                "-m",
                "transformers.cli.transformers",
                "serve",
                STARTER,
                "--port",
                str(port),
                "--dtype",
                "float32",
                "--device",
                "cpu",
            ]
            command += ["--continuous-batching"] if name.endswith(":cb") else []
        with open(f"{folder}/log", "wb") as log:
            server = subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            )
        try:
            return asyncio.run(load(name, model, port, server.pid, options))
        except (TimeoutError, ConnectionError, AssertionError) as error:
            words = Path(folder, "log").read_text(errors="replace").splitlines()[-3:]
            print(f"{name}: {error}; its last words: {words}", file=sys.stderr)
            return dict.fromkeys(("tokens_s", "answers_s", "p50", "p99", "errors", "peak_mb"), float("nan"))
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


async def load(name: str, model: str, port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    deadline = time.monotonic() + 120
    while True:  # until it answers at all
        try:
            found = await asyncio.wait_for(ask(port, model, 0, *await asyncio.open_connection("127.0.0.1", port)), 60)
            assert found, "no answer"
            break
        except (OSError, AssertionError, asyncio.IncompleteReadError):
            if time.monotonic() > deadline:
                raise TimeoutError("does not answer") from None
            await asyncio.sleep(0.5)
    times: list[float] = []
    counts = {"tokens": 0, "errors": 0, "asked": 0}
    memory = [resident(pid)]
    began = time.monotonic()
    end = began + options.seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while counts["asked"] < options.requests if options.requests else time.monotonic() < end:
            counts["asked"] += 1
            asked = time.monotonic()
            try:
                found = await asyncio.wait_for(ask(port, model, counts["asked"] * 1000 + number, reader, writer), 300)
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                found = 0
            if not found:
                counts["errors"] += 1
                continue
            counts["tokens"] += found
            times.append(time.monotonic() - asked)
            if options.requests and len(times) % (options.requests // 10) == 0:
                memory.append(resident(pid))

    await asyncio.gather(*(client(i) for i in range(options.clients)))
    took = time.monotonic() - began
    if options.requests:
        print(f"{name}: resident MB after each tenth: {' '.join(f'{m:.0f}' for m in memory)}")
    times.sort()
    assert times, "no answer at all"
    return {
        "tokens_s": counts["tokens"] / took,
        "answers_s": len(times) / took,
        "p50": times[len(times) // 2],
        "p99": times[int(0.99 * (len(times) - 1))],
        "errors": counts["errors"],
        "peak_mb": resident(pid, "VmHWM"),
    }


async def ask(port: int, model: str, seed: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    """Tokens of one answer; 0 for an error."""
    rng = random.Random(seed)
    said = rng.choice(ASKED).format(rng.choice(THINGS))
    order: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": said}],
        "max_tokens": TOKENS,
        "seed": seed,
    }
    body = json.dumps(order).encode()
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length"))
    answer = json.loads(await reader.readexactly(length))
    return int(answer["usage"]["completion_tokens"]) if " 200 " in head.splitlines()[0] else 0


def resident(pid: int, what: str = "VmRSS") -> float:
    """MB that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


if __name__ == "__main__":
    main()
