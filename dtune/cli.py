"""The command line: ``dtune COMMAND [settings]``, one module of ``dtune.commands`` each.

Exit codes: 0 done, 1 a failure, 2 the config, the data or the disk is wrong (trying again does
not help), 75 stopped by a signal with everything saved. Nothing here imports torch before the
config has been composed and checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from dtune import __version__
from dtune.config.secret import check_arguments
from dtune.errors import ConfigError

USAGE = """dtune fine-tunes Hugging Face language models. Settings are group=option and key=value.

  dtune train [settings]             fine-tune; -m sweeps over settings given as a,b,c
  dtune eval run_dir=RUN [settings]  loss and exact match of what a run has trained
  dtune chat run_dir=RUN             talk to what a run has trained, or to any model
  dtune generate run_dir=RUN prompts=FILE   answers to a file of prompts
  dtune merge run_dir=RUN out=FOLDER        the adapter merged into its base, and verified
  dtune convert from=PATH to=PATH           checkpoints to and from Hugging Face, from DeepSpeed
  dtune export gguf                  how a merged model becomes a GGUF file
  dtune plan [settings]              what a run would do, without loading weights
  dtune bench [settings]             tokens/s and memory of methods, measured; -m compares them
  dtune config [settings]            the composed config of a run
  dtune status RUN ...               how runs stand: step, job, last numbers, checkpoints
  dtune logs RUN [-f] [--rank N]     what a rank says
  dtune cancel RUN [--now]           save and stop, a job on the cluster as well
  dtune verify RUN [--resume-proof]  whether what it has saved is whole, and resumes exactly
  dtune sweep status DIR             how the trials of a sweep stand; resume, best, plot
  dtune doctor [--cluster]           what this machine has; how the nodes of a job work together
  dtune kernels check                every kernel on this GPU, compared and timed

Start here:  dtune train experiment=quickstart
Help:        dtune train --help    all groups and options
             docs/config.md        every key with its meaning
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    if argv[0] == "--version":
        sys.stdout.write(f"dtune {__version__}\n")
        return 0
    try:
        command = _find(argv[0])
        check_arguments(argv[1:])
        return command(argv[1:])
    except ConfigError as error:
        sys.stderr.write(f"dtune: {error}\n")
        return 2


def _find(name: str) -> Callable[[list[str]], int]:
    """The command of a name, imported; ConfigError with the nearest names if there is none."""
    from dtune.commands import COMMANDS, load_command

    if name not in COMMANDS:
        from dtune.config.suggest import did_you_mean, near_options

        near = did_you_mean([f"dtune {command}" for command in near_options(name, COMMANDS)])
        raise ConfigError(f"unknown command {name}{near}; one of {', '.join(COMMANDS)}")
    return load_command(name)
