"""torchrun's agent without its page-long traceback; takes torchrun's own arguments.

The only module here that imports torch: it runs in a process of its own, beside the ranks. It
must be started with SIGUSR1 ignored, which kills it otherwise; ranks install their own handler.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun; the exit code of the rank that failed first, or 0."""
    # What it says of a failed or stopped rank is said below, in one line.
    logging.disable(logging.ERROR)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            how, code = f"exited with {failure.exitcode}", failure.exitcode
        else:
            how, code = f"was killed by {failure.signal_name()}", 128 - failure.exitcode
        sys.stderr.write(f"rank {rank} {how}\n")
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
