# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon of a test's own: a real process with its state in a directory of the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

#: nothing here takes longer than this, unless it is broken
SOON = 30.0


#: what the service manager does with a socket: descriptor 3, and LISTEN_PID is the daemon's own
_ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


class DaemonFailed(Exception):
    """The daemon ended instead of answering; the exit status and what it said."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"status {status}: {said}")
        self.status = status
        self.said = said


class PrivateDaemon:
    """A context manager: started at once, ended at the end."""

    def __init__(self, directory: Path, *, config: str = "", metrics: str = "127.0.0.1:0",
                 env: dict[str, str] | None = None, activate: int | None = None,
                 prefix: Sequence[str] = (), memory: str = "512M") -> None:
        """`config` is more text for the configuration file, `memory` its pool; `activate` is a listening
        socket to hand over; `prefix` is a command that executes the daemon's."""
        self.directory = directory
        self.socket = directory / "hostd.sock"
        self.config = directory / "hostd.toml"
        self.log = directory / "log"
        self.metrics = metrics
        self.memory = memory
        self.configure(config)
        command = [sys.executable, "-m", "hostd.daemon", "--config", str(self.config)]
        if activate is not None:
            command = [sys.executable, "-c", _ACTIVATE, str(activate), *command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **(env or {})}, pass_fds=() if activate is None else (activate,))
        self.client = httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)),
                                   base_url="http://hostd", timeout=SOON)
        try:
            self._await_answer()
        except BaseException:
            self.kill()
            raise

    def configure(self, extra: str) -> None:
        """Write the configuration file; `extra` follows the [host] section's directories."""
        self.config.write_text(
            f'[metrics]\naddress = "{self.metrics}"\n[api]\nsocket = "{self.socket}"\n[host]\n'
            f'state_dir = "{self.directory}/state"\nworkers = 2\nmemory = "{self.memory}"\n'
            f'shutdown_timeout = 0\n{extra}')

    def __enter__(self) -> PrivateDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(SOON)
            finally:
                self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its end; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(SOON)

    # --- the API --------------------------------------------------------------------------------------

    def get(self, path: str, **query: Any) -> Any:
        return self._answer(self.client.get(path, params=query))

    def post(self, path: str, **body: Any) -> Any:
        return self._answer(self.client.post(path, json=body))

    def do(self, name: str, action: str, **body: Any) -> Any:
        """An operation on a VM, from its start to its result."""
        operation = self.post(f"/vms/{name}/{action}", **body)
        operation = self.get(f"/operations/{operation['id']}", wait=SOON)
        assert operation["status"] == "done", operation
        return operation["result"]

    def upload(self, data: bytes) -> str:
        return self._answer(self.client.put("/blobs", content=data))["sha256"]

    def create(self, name: str, kernel: bytes, **fields: Any) -> Any:
        return self.post("/vms", name=name, kernel=self.upload(kernel), **{"memory": 16 << 20, **fields})

    def wait(self, name: str, **query: Any) -> Any:
        return self.get(f"/vms/{name}/wait", **{"timeout": SOON, **query})

    def console(self, name: str) -> str:
        response = self.client.get(f"/vms/{name}/log")
        assert response.status_code == 200, response.text
        return response.text

    def send(self, name: str, text: str) -> None:
        response = self.client.post(f"/vms/{name}/input", content=text.encode())
        assert response.is_success, response.text

    def clear(self) -> None:
        """Destroy all VMs.  All frames must be free then, or in the workers' stock."""
        for vm in self.get("/vms"):
            operation = self._answer(self.client.delete(f"/vms/{vm['name']}", params={"force": "true"}))
            ended = self.get(f"/operations/{operation['id']}", wait=SOON)
            assert ended["status"] == "done", ended
        frames = self.get("/host")["frames"]
        assert (frames["private"], frames["shared"], frames["overhead"]) == (0, 0, 1)
        assert frames["free"] + frames["granted"] + 1 == frames["total"]
        assert self.get("/memory", check=1)["wrong"] == []

    def worker_pids(self) -> list[int]:
        """The processes of the workers, once all are ready."""
        deadline = time.monotonic() + SOON
        while True:
            workers = self.get("/host")["workers"]
            if all(worker["ready"] for worker in workers):
                return [worker["pid"] for worker in workers]
            assert time.monotonic() < deadline, workers
            time.sleep(0.02)

    @staticmethod
    def _answer(response: httpx.Response) -> Any:
        assert response.is_success, f"{response.status_code}: {response.text}"
        return response.json()

    def _await_answer(self) -> None:
        deadline = time.monotonic() + SOON
        while True:
            if self.process.poll() is not None:
                raise DaemonFailed(self.process.returncode, self.said().strip())
            try:
                self.client.get("/version")
                return
            except httpx.TransportError:
                assert time.monotonic() < deadline, self.said()
                time.sleep(0.01)
