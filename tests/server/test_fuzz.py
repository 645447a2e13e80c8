"""Requests made from the server's own description of itself, good and bad ones: no failure, and every answer is as described."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from serving import Server

EXAMPLES = os.environ.get("TUNESMITH_EXAMPLES", "1")  # of each endpoint and way; 400 make some 10,000 calls


def test_no_request_makes_it_fail(server: Server, tmp_path: Path) -> None:
    checks = "not_a_server_error,response_schema_conformance,content_type_conformance,status_code_conformance"
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        "run",
        f"{server.url}/openapi.json",
        "--checks",
        checks,
    ]
    command += ["--max-examples", EXAMPLES, "--phases", "coverage,fuzzing", "--seed", "1", "--continue-on-failure"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-4000:]
    made = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert made and made[1] == made[2] and int(made[1]) > 300, done.stdout[-2000:]
    assert '"status": 5' not in server.log.read_text() and "traceback" not in server.log.read_text()
