"""Write the shipped files of the embedded default: `python -m dtune.assets.build WHAT --out DIR`.

`WHAT` is `corpus` (not shipped, what the tiny model is pre-trained on), `tokenizer`,
`instructions` or `model-init` (the architecture with random weights, where pre-training starts).
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from dtune.assets import ASSETS
from dtune.assets.corpus import CORPUS_DOCUMENTS, CORPUS_SEED, generate_corpus
from dtune.assets.instructions import generate_instructions

INIT_SEED = 0
_TOKENIZER_DOCUMENTS = 8_000


def write_jsonl(rows: Iterable[Mapping[str, str]], path: Path) -> None:
    """Write one JSON object a line, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def build_corpus(out: Path, *, seed: int, documents: int) -> None:
    """Write `corpus.jsonl`, one `{"text": ...}` a document."""
    texts = generate_corpus(seed=seed, documents=documents)
    write_jsonl(({"text": text} for text in texts), out / "corpus.jsonl")


def build_instructions(out: Path) -> None:
    """Write `train.jsonl` and `heldout.jsonl`."""
    split = generate_instructions()
    write_jsonl((row.as_dict() for row in split.train), out / "train.jsonl")
    write_jsonl((row.as_dict() for row in split.heldout), out / "heldout.jsonl")


def build_tokenizer(out: Path) -> None:
    """Train the tokenizer on the head of the corpus and write its files."""
    from dtune.assets.tokenizer import save_tokenizer, train_tokenizer

    texts = generate_corpus(documents=_TOKENIZER_DOCUMENTS)
    save_tokenizer(train_tokenizer(texts), out)


def build_model_init(out: Path, *, tokenizer_folder: Path) -> None:
    """Write the architecture with random fp32 weights and the tokenizer beside it."""
    from transformers import AutoTokenizer

    from dtune.assets.architecture import init_model

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    init_model(tokenizer, seed=INIT_SEED).save_pretrained(out)
    tokenizer.save_pretrained(out)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m dtune.assets.build", description=__doc__)
    parser.add_argument("what", choices=["corpus", "tokenizer", "instructions", "model-init"])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--documents", type=int, default=CORPUS_DOCUMENTS, help="of the corpus")
    parser.add_argument("--seed", type=int, default=CORPUS_SEED, help="of the corpus")
    parser.add_argument(
        "--tokenizer", type=Path, default=ASSETS / "tiny", help="folder, for model-init"
    )
    return parser.parse_args()


def main() -> None:
    """Run one command."""
    arguments = parse_arguments()
    match arguments.what:
        case "corpus":
            build_corpus(arguments.out, seed=arguments.seed, documents=arguments.documents)
        case "tokenizer":
            build_tokenizer(arguments.out)
        case "instructions":
            build_instructions(arguments.out)
        case _:
            build_model_init(arguments.out, tokenizer_folder=arguments.tokenizer)


if __name__ == "__main__":
    main()
