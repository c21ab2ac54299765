"""The `offload` command in processes forked from one that has imported everything: a start in no time.

`python tests/warm.py SOCKET` serves until its standard input ends. Each connection is one process: a request
(arguments, environment, directory, log file) comes in as a line of JSON, its pid and at last its exit code go out. What
runs in the process is the command's own `main`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class WarmProcess:
    """What `subprocess.Popen` offers, of a process that the server started."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("r")
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self._wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._wait(timeout)
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("offload", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # ended just now
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> None:
        if self.returncode is not None:
            return
        if select.select([self._connection], [], [], timeout)[0]:
            self.returncode = int(self._lines.readline())
            self._lines.close()
            self._connection.close()


class Warm:
    """Starts the server; a context manager that ends it."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="offload-warm-")
        self._path = Path(self._directory) / "socket"
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(self._path)],
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        )
        self._ready = threading.Lock()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path) -> WarmProcess:
        """A process that runs `offload ARGUMENTS`, with these variables added to the environment."""
        connection = socket.socket(socket.AF_UNIX)
        with self._ready:  # the first to come waits for the imports
            while not self._path.exists():
                assert self._server.poll() is None, "the server of warm processes ended"
                time.sleep(0.05)
        connection.connect(str(self._path))
        log.write_bytes(b"")
        request = {
            "arguments": list(arguments), "environment": dict(environment), "cwd": str(cwd), "log": str(log),
        }  # fmt: skip
        connection.sendall(json.dumps(request).encode() + b"\n")
        return WarmProcess(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        self._path.unlink(missing_ok=True)
        os.rmdir(self._directory)


# ---- the server ----


def serve(path: str) -> None:
    """Answer connections until standard input ends. No thread is ever started in this process."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    from probing import measure_by_file_system

    import offload.train

    measure_by_file_system()
    with contextlib.suppress(ImportError):  # numba is optional
        import offload.adamw_kernels  # noqa: F401
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(16)
    os.rename(path + ".new", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers are not waited for
    while True:
        ready = select.select([listener, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            return
        connection = listener.accept()[0]
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            watch(connection)
        connection.close()


def watch(connection: socket.socket) -> None:
    """Start the process that is asked for, and report its pid and its end."""
    with connection.makefile("rw") as lines:
        request = json.loads(lines.readline())
        pid = os.fork()
        if pid == 0:
            become(request)
        lines.write(f"{pid}\n")
        lines.flush()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            lines.write(f"{code}\n")
            lines.flush()
    os._exit(0)


def become(request: dict[str, Any]) -> None:
    """Run the command in this process, and end it."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = ["offload", *request["arguments"]]
    code: Any = 1
    try:
        from offload.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve(sys.argv[1])
