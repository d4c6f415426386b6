"""llama.cpp's server on a GGUF file, as a separate program: it answers as an exported model, for use and comparison."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "xllamacpp"  # on PyPI
PATIENCE = 600.0  # seconds for one answer


class LlamaServer:
    """A server that stops at the end of its `with` block. `slots` answers grow in parallel, of at most `window` tokens each.

    Raises RuntimeError, with the end of what llama.cpp printed, if it cannot load the file.
    """

    def __init__(self, file: Path, threads: int, slots: int = 1, window: int = 2048):
        line = [sys.executable, "-m", "utils.inference.llama_server", *map(str, (file.resolve(), threads, slots, window))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(line, cwd=ROOT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            _, printed = self.process.communicate()
            raise RuntimeError(f"llama.cpp cannot load {file}: {printed.strip()[-400:]}")

    def __enter__(self) -> "LlamaServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # its standard input ends, and with it the server

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's response to a request."""
        with self._open(path, body) as response:
            return json.load(response)

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The parts of a completion, as they arrive."""
        with self._open("/completion", body | {"stream": True}) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))

    def _open(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=PATIENCE)


def serve(file: str, threads: str, slots: str, window: str) -> None:
    """Print the address, and serve until the standard input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port = file, 0
    params.n_parallel, params.n_ctx = int(slots), int(slots) * int(window)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)  # its threads may be computing an answer that nobody waits for


if __name__ == "__main__":
    serve(*sys.argv[1:])
