"""Whole runs with a wandb server that takes nothing, at once or late: they end as without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dtune.runtime.status import State, read_status
from dtune.train.sinks.jsonl import read_metrics
from tests.integration.train_runs import settings

REFUSAL = b'{"errors": [{"message": "user is not logged in"}]}'


@contextmanager
def refusing_server(answers_after: float) -> Iterator[tuple[str, list[str]]]:
    """The address of a server that knows no key, and the paths that it is asked for."""
    asked: list[str] = []

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            time.sleep(answers_after)
            # Who asked may have gone.
            with suppress(ConnectionError):
                self.send_response(401)
                self.send_header("Content-Length", str(len(REFUSAL)))
                self.end_headers()
                self.wfile.write(REFUSAL)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is said."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("answers_after", [0.0, 5.0])
def test_a_run_whose_wandb_server_refuses_it_ends_as_without_it_and_says_so_once(
    tmp_path: Path, answers_after: float
) -> None:
    pytest.importorskip("wandb")
    tracked = ("log=wandb", "log.wandb_mode=online", "log.wandb_project=test")
    with refusing_server(answers_after) as (address, asked):
        done = subprocess.run(
            [sys.executable, "-m", "dtune", "train", *settings(tmp_path / "run", *tracked)],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
            env={
                **os.environ,
                "WANDB_BASE_URL": address,
                "WANDB_API_KEY": "0123456789" * 4,
                "WANDB_SILENT": "true",
            },
        )
    assert done.returncode == 0, done.stderr
    assert asked
    assert read_status(tmp_path / "run").state is State.done
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    assert done.stderr.count("the run goes on without it") == 1
    (told,) = json.loads((tmp_path / "run" / "result.json").read_text())["trackers"]
    assert told["dropped"] == len(rows)
    assert "401" in told["error"] or "did not end" in told["error"]
