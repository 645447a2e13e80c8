"""A process that serves one GGUF file by llama.cpp on loopback until its input is closed.

python -m tunesmith.exporting.llamacpp FILE CONTEXT    the first line of its input is the key that it asks for
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Print the address, then wait for the end of the input: whoever started this has gone, or wants it to."""
    import xllamacpp

    said = xllamacpp.CommonParams()
    said.model.path = sys.argv[1]
    said.n_ctx = int(sys.argv[2])
    said.n_parallel = 1
    said.port = 0
    said.ui = False
    said.warmup = False
    said.fit_params = False  # it is small, or it is refused
    said.verbosity = 1  # errors alone
    said.api_keys = [sys.stdin.readline().strip()]
    said.cpuparams.n_threads = said.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(said)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # its threads have nothing to say any more


if __name__ == "__main__":
    main()
