"""``dtune export gguf``: how a merged model becomes a GGUF file."""

from __future__ import annotations

import sys

from dtune.config.suggest import did_you_mean, near_options
from dtune.errors import ConfigError

FORMATS = ("gguf",)
HELP = """dtune export gguf: how a merged model becomes a GGUF file, as llama.cpp reads it.

dtune has no converter of its own, and llama.cpp does not publish its own on PyPI. The commands:

  dtune merge run_dir=RUN out=MERGED
  git clone --depth 1 https://github.com/ggml-org/llama.cpp
  pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt
  python llama.cpp/convert_hf_to_gguf.py MERGED --outfile MERGED.gguf --outtype bf16

The requirements pin versions of torch and transformers: install them into an environment of their
own. The converter knows the architectures and tokenizers that llama.cpp runs, and refuses others.
"""


def run(argv: list[str]) -> int:
    """Say how; exit code 2, because nothing was written."""
    if not argv or "--help" in argv or "-h" in argv:
        sys.stdout.write(HELP)
        return 0 if argv else 2
    if argv[0] not in FORMATS:
        near = did_you_mean([f"dtune export {name}" for name in near_options(argv[0], FORMATS)])
        raise ConfigError(f"dtune export {argv[0]}: no such format{near}; there is gguf")
    sys.stderr.write(HELP)
    return 2
