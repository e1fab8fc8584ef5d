"""The SFT trainer of TRL with a model of ``peft``."""

from __future__ import annotations

from benchmarks.peers.watch import Watch
from benchmarks.peers.work import BEST, PLAIN, RECOMPUTED, Setting, Work, missing

TITLE = "TRL SFT"
PACKAGES = ("trl", "accelerate", "datasets")
FIRST: tuple[str, ...] = ()


def settings(work: Work) -> tuple[Setting, ...]:
    """Best: rows of a batch in one, without padding, by FlashAttention 2, as its guide advises.

    Recomputation, which it does by default, is the setting of that name.
    """
    if work.device == "cuda" and not missing("flash_attn"):
        return (PLAIN, RECOMPUTED, BEST)
    return (PLAIN, RECOMPUTED)


def problem(work: Work) -> str:
    """Why it cannot run here."""
    return missing("trl", "peft", "accelerate", "datasets")


def run(work: Work, setting: Setting, watch: Watch) -> None:
    """Train."""
    from transformers import AutoTokenizer

    from benchmarks.peers.contestants.hf_trainer import load_adapted

    watch.start_building()
    attention = "flash_attention_2" if setting.best else "sdpa"
    model = load_adapted(work, attention=attention)
    train_with_sft(model, AutoTokenizer.from_pretrained(work.checkpoint), work, setting, watch)


def train_with_sft(
    model: object, tokenizer: object, work: Work, setting: Setting, watch: Watch
) -> None:
    """Train an adapted model with TRL's trainer on tokens that are ready."""
    from trl import SFTConfig, SFTTrainer

    from benchmarks.peers.contestants.hf_trainer import Onlooker, arguments, watched

    trainer = watched(SFTTrainer, watch)(
        model=model,
        args=SFTConfig(
            **arguments(work, setting),
            # Rows have their length already.
            max_length=None,
            # Documents of a row are told apart by their lengths, which only this way reads.
            padding_free=setting.best or work.documents > 1,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=rows_of(work),
        processing_class=tokenizer,
        callbacks=[Onlooker(watch)],
    )
    trainer.train()


def rows_of(work: Work) -> object:
    """The fixed batch as TRL's own packing would have left it, as often as the run takes it."""
    from datasets import Dataset

    from benchmarks.peers.contestants.hf_trainer import PackedRows

    packed = PackedRows(work)
    each = work.length // work.documents
    rows = {
        "input_ids": [packed[row]["input_ids"].tolist() for row in range(work.rows)],
        "labels": [packed[row]["labels"].tolist() for row in range(work.rows)],
        "seq_lengths": [[each] * work.documents] * work.rows,
    }
    dataset = Dataset.from_dict(rows)
    return dataset.select([row % work.rows for row in range(len(packed))])
