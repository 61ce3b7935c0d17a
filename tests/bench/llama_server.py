"""Runs llama-server from the `xllamacpp` wheel: `llama_server.py model.gguf [port [slots]]`."""

from __future__ import annotations

import os
import sys
import time

import xllamacpp

CONTEXT = 2048


def main(path: str, port: str = "7802", slots: str = "8") -> None:
    """Serve a GGUF file until the process is ended."""
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.n_parallel = path, int(port), int(slots)
    params.n_ctx = CONTEXT * int(slots)
    params.use_jinja = True  # for tools
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(params)
    print(f"llama-server listens on port {port}", flush=True)
    while server:
        time.sleep(3600)


if __name__ == "__main__":
    main(*sys.argv[1:])
