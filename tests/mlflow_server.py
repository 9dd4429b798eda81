"""A real MLflow server that can be killed, a proxy that spoils its answers, and what is read back of a run."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from megatron_ext.train.line_file import read_metrics

SECONDS_TO_START = 240.0


class MlflowServer:
    """`mlflow server` on a free port of localhost, over an SQLite file; it may be killed and started again."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def launch(self) -> None:
        """Start it if it is not there; it takes some seconds until it answers."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "a") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def running(self) -> "MlflowServer":
        """The same, answering."""
        self.launch()
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"the MLflow server did not start:\n{(self.folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL, to its workers too."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None


class SpoilingProxy:
    """Passes requests on to a server, late or with an error in place of the answer."""

    def __init__(self, port: int):
        self.delay = 0.0
        """Seconds that each request waits."""
        self.errors: list[tuple[int, bytes]] = []
        """Answers, status and body, that the next requests to log something get instead of the server's."""
        self.requests = 0
        self.authorizations: set[str | None] = set()
        """Authorization headers that came."""
        proxy, released = self, threading.Event()
        self._released = released

        class Handler(BaseHTTPRequestHandler):
            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.requests += 1
                proxy.authorizations.add(self.headers.get("Authorization"))
                released.wait(proxy.delay)
                try:
                    status, answer = self.answer(body)
                except OSError:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def answer(self, body: bytes) -> tuple[int, bytes]:
                if proxy.errors and self.path.endswith("log-batch"):
                    return proxy.errors.pop(0)
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                answer = response.read()
                connection.close()
                return response.status, answer

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

            def log_message(self, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._released.set()
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def spoiling_proxy(server: MlflowServer) -> Iterator[SpoilingProxy]:
    """A proxy before a server, for as long as the context lasts."""
    proxy = SpoilingProxy(server.port)
    try:
        yield proxy
    finally:
        proxy.close()


Points = dict[tuple[str, int], list[float]]
"""(metric, step) -> its values in MLflow's history, in the order of their times."""


def runs_named(client: MlflowClient, name: str, experiment: str = "megatron_ext") -> list[Any]:
    """The runs of a name in an experiment."""
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id], f"attributes.run_name = '{name}'") if found else []


def history(client: MlflowClient, run: Any) -> Points:
    """Everything that MLflow knows of a run's metrics."""
    points: Points = {}
    for name in run.data.metrics:
        for metric in sorted(client.get_metric_history(run.info.run_id, name), key=lambda metric: metric.timestamp):
            points.setdefault((name, metric.step), []).append(metric.value)
    return points


def logged(output_dir: Path) -> Points:
    """The same of `metrics.jsonl`."""
    return {
        (name, line["step"]): [value]
        for line in read_metrics(output_dir)
        for name, value in line.items()
        if name not in ("step", "phase", "time")
    }
