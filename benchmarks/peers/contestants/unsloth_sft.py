"""Unsloth: its patched model, trained by TRL's trainer as its guide has it."""

from __future__ import annotations

from benchmarks.peers.watch import Watch
from benchmarks.peers.work import PLAIN, RECOMPUTED, TARGETS, Setting, Work, missing

TITLE = "Unsloth"
PACKAGES = ("unsloth", "unsloth-zoo", "trl", "accelerate", "datasets", "xformers")
FIRST: tuple[str, ...] = ("unsloth",)


def settings(work: Work) -> tuple[Setting, ...]:
    """Recomputed: its own, which moves activations to the host, and which it advises."""
    return (PLAIN, RECOMPUTED)


def problem(work: Work) -> str:
    """Why it cannot run here."""
    if absent := missing("unsloth", "trl", "peft"):
        return absent
    return "" if work.device == "cuda" else "it needs a GPU"


def run(work: Work, setting: Setting, watch: Watch) -> None:
    """Train."""
    from peft import load_peft_weights, set_peft_model_state_dict
    from unsloth import FastLanguageModel

    from benchmarks.peers.contestants.hf_trainer import dtype_of
    from benchmarks.peers.contestants.trl_sft import train_with_sft

    watch.start_building()
    base, tokenizer = FastLanguageModel.from_pretrained(
        model_name=work.checkpoint,
        max_seq_length=work.length,
        dtype=dtype_of(work),
        load_in_4bit=False,
    )
    model = FastLanguageModel.get_peft_model(
        base,
        r=work.rank,
        lora_alpha=work.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(TARGETS),
        use_gradient_checkpointing="unsloth" if setting.recompute else False,
        max_seq_length=work.length,
    )
    set_peft_model_state_dict(model, load_peft_weights(work.adapter, device=work.device))
    train_with_sft(model, tokenizer, work, setting, watch)
