"""Serving: one process, structured logs on stderr, an end that loses nothing."""

from __future__ import annotations

import errno
import json
import logging
import signal
import socket
import sys
import time

import uvicorn

from tunesmith.errors import UsageError
from tunesmith.server import completions, files, health, jobs
from tunesmith.server.app import build
from tunesmith.server.service import Service

ROUTES = [*files.ROUTES, *jobs.ROUTES, *completions.ROUTES, *health.ROUTES]
DRAIN = 30  # seconds that requests in hand have when the server is told to end


class _Line(logging.Formatter):
    """A log record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        said = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        said |= getattr(record, "about", {})
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


def run(service: Service, host: str, port: int) -> int:
    """Serve until SIGTERM or SIGINT: then no new connections, requests in hand are finished, jobs make a checkpoint.

    Raises UsageError where somebody has the port.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    log = logging.getLogger("tunesmith.server")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    service.host = host
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            fix = "choose another --port" if error.errno == errno.EADDRINUSE else "check --host and --port"
            raise UsageError(str(error.strerror), where=f"{host}:{port}", fix=fix) from None
        config = uvicorn.Config(
            build(service, ROUTES),
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=DRAIN,
            h11_max_incomplete_event_size=64 << 10,
            server_header=False,
        )
        server = uvicorn.Server(config)

        def stop(*_: object) -> None:  # until uvicorn's own stand; it sends on what it got at its end
            server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        listening.listen()  # who reads the address may ask at once
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{listening.getsockname()[1]}/v1", flush=True)
        server.run(sockets=[listening])
    return 0
