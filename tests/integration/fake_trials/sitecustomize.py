"""On PYTHONPATH: ``python -m dtune.worker RUN`` pretends to train, without importing torch.

For tests of what sweeps do with trials. It keeps the protocol of a run folder: metrics.jsonl,
status.json, a checkpoint to go on from, signals. The held-out loss falls with the steps to
``(log10(optim.lr) + 4)^2``. What goes wrong is chosen by the seed, and once only: a second attempt
at the same trial goes well.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

FAILS, DIES, STOPS, HANGS = 666, 667, 668, 669
STEPS = 4


def main(folder: Path) -> int:
    import math

    import yaml

    run = yaml.safe_load((folder / "config.yaml").read_text())
    seed, goal = int(run["seed"]), (math.log10(float(run["optim"]["lr"])) + 4) ** 2
    marker = folder / "checkpoints" / "step-00000001"
    first_attempt = not marker.is_dir()
    marker.mkdir(parents=True, exist_ok=True)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
    # Launchers block them until a rank has its handlers.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})

    def end(state: str, step: int, message: str = "") -> None:
        record = {"state": state, "step": step, "message": message, "time": time.time()}
        (folder / "status.json").write_text(json.dumps(record))

    with (folder / "metrics.jsonl").open("a") as metrics:

        def tell(**row) -> None:
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()

        if not first_attempt:
            tell(kind="resume", step=0)
        for step in range(1, STEPS + 1):
            loss = goal + 1 / step
            tell(kind="train", step=step, loss=loss, tokens_per_second=1000.0)
            tell(kind="eval", step=step, loss=loss)
            if first_attempt and seed == FAILS:
                end("failed", step, "a failure of the test")
                return 1
            if first_attempt and seed == DIES:
                os.kill(os.getpid(), signal.SIGKILL)
            if first_attempt and seed == HANGS:
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
                time.sleep(600)
            # Long enough for whoever judges by these rows to have looked.
            deadline = time.monotonic() + float(os.environ.get("DTUNE_TEST_STEP_SECONDS", "0"))
            # Or until a file is there.
            until = Path(os.environ.get("DTUNE_TEST_UNTIL", folder))
            while (time.monotonic() < deadline or not until.exists()) and not asked:
                time.sleep(0.02)
            if asked or (first_attempt and seed == STOPS):
                end("preempted", step)
                return 75
    end("done", STEPS)
    return 0


with contextlib.suppress(ValueError, IndexError):
    at = sys.orig_argv.index("dtune.worker")
    if sys.orig_argv[at - 1] in ("-m", "dtune_launch.srun"):
        from dtune.runtime.lock import holding

        folder = Path(sys.orig_argv[at + 1])
        with holding(folder):
            code = main(folder)
        os._exit(code)
