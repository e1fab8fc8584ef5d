"""``dtune kernels check``: every kernel on this machine's GPU, compared and timed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dtune.commands.running import Parser
from dtune.errors import ConfigError

DTYPES = ("bf16", "fp16", "fp32")
SHAPES = ("small", "1b", "8b", "70b")
EPILOG = """The error of each op is measured against fp64, and may be twice that of plain PyTorch in
the same dtype. Times are medians; the share is that of the copy bandwidth or the GEMM rate measured
on this device, whichever bounds the op. Exit code: 0 every op is right, 1 one is not, 2 there is no
GPU that runs Triton."""


def run(argv: list[str]) -> int:
    """Check as the arguments say; 1 if an op is wrong."""
    options = _parser().parse_args(argv)
    if options.action is None:
        raise ConfigError("dtune kernels: what? One of check; see dtune kernels --help")
    return _check(options.op, options.dtype or DTYPES, options.shape)


def _parser() -> Parser:
    parser = Parser(prog="dtune kernels", description=__doc__, epilog=EPILOG)
    actions = parser.add_subparsers(dest="action", metavar="check")
    check = actions.add_parser(
        "check", description="Compare and time every op on this machine's GPU.", epilog=EPILOG
    )
    check.add_argument("--op", action="append", help="only this op; may be given again")
    check.add_argument(
        "--dtype", action="append", choices=DTYPES, help="may be given again; all unless given"
    )
    check.add_argument(
        "--shape", choices=SHAPES, default="8b", help="layer of a Llama of that size; 8b"
    )
    return parser


def _check(names: Sequence[str] | None, dtypes: Sequence[str], shape: str) -> int:
    # Only now, because wrong arguments are answered before torch is imported.
    import torch
    from dtune_kernels.catalog import CATALOG, SHAPES
    from dtune_kernels.check import check_ops
    from dtune_kernels.errors import KernelUnavailable
    from dtune_kernels.launch import require_triton

    ops = [CATALOG[name] for name in _chosen(names, list(CATALOG))]
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        require_triton(device, key="kernels")
    except KernelUnavailable as error:
        raise ConfigError(str(error)) from error
    _say(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    rows = check_ops(ops, SHAPES[shape], dtypes, device, say=_say)
    return int(not all(row.passed for row in rows))


def _chosen(names: Sequence[str] | None, known: list[str]) -> list[str]:
    """The ops that are asked for; ConfigError with the nearest names where there is none."""
    from dtune.config.suggest import did_you_mean, near_options

    for name in names or ():
        if name not in known:
            near = did_you_mean(near_options(name, known))
            raise ConfigError(f"--op {name}: no such op{near}; one of {', '.join(known)}")
    return list(names or known)


def _say(text: str) -> None:
    """One line at once: compiling the next op may take seconds."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
