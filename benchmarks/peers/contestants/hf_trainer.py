"""What contestants share that train with the Trainer of transformers, or with one made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.inputs import read_documents
from benchmarks.peers.watch import Watch
from benchmarks.peers.work import Setting, Work

IGNORE = -100


class PackedRows(Dataset[Mapping[str, torch.Tensor]]):
    """The fixed batch, as often as the run takes it: tensors [length]."""

    def __init__(self, work: Work) -> None:
        documents = read_documents(work)
        shape = (work.rows, work.length)
        labels = documents.copy()
        # Nothing comes before the first token of a document, from which it could be predicted.
        labels[:, :, 0] = IGNORE
        positions = np.broadcast_to(np.arange(documents.shape[-1]), documents.shape)
        self._tensors = {
            "input_ids": torch.from_numpy(documents.reshape(shape)),
            "labels": torch.from_numpy(labels.reshape(shape)),
        }
        if work.documents > 1:
            # Positions that restart are how transformers is told of documents.
            self._tensors["position_ids"] = torch.from_numpy(positions.reshape(shape).copy())
        self._work = work

    def __len__(self) -> int:
        return self._work.rows * self._work.total_steps

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:
        return {name: rows[index % self._work.rows] for name, rows in self._tensors.items()}


class Onlooker(TrainerCallback):
    """Tells the watch of what the Trainer does."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """All is built."""
        self._watch.start_training()

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        """Gradients are whole, and clipped."""
        if self._watch.wants_gradients:
            self._watch.see_gradients(model.named_parameters())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One optimizer step is over."""
        self._watch.end_step()


def watched(trainer: type[Any], watch: Watch) -> type[Any]:
    """The same Trainer, that shows its losses."""

    class Watched(trainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            watch.add_loss(loss)
            return loss

    return Watched


def dtype_of(work: Work) -> torch.dtype:
    """What frozen weights are stored in."""
    return torch.float32 if work.precision == "fp32" else torch.bfloat16


def load_adapted(work: Work, *, attention: str = "sdpa") -> Any:
    """The base in its dtype, with the adapter in fp32."""
    base = AutoModelForCausalLM.from_pretrained(
        work.checkpoint, dtype=dtype_of(work), attn_implementation=attention
    ).to(work.device)
    base.config.use_cache = False
    return PeftModel.from_pretrained(base, work.adapter, is_trainable=True)


def arguments(work: Work, setting: Setting) -> dict[str, Any]:
    """Training arguments that make the Trainer do the work, and nothing beside it."""
    return {
        "output_dir": str(Path(work.folder) / "trainer"),
        "max_steps": work.total_steps,
        "per_device_train_batch_size": work.micro_batch,
        "gradient_accumulation_steps": work.accumulation,
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": work.max_norm,
        "optim": "adamw_torch_fused",
        "bf16": work.precision == "bf16",
        "use_cpu": work.device == "cpu",
        "gradient_checkpointing": setting.recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
    }


def train_with_trainer(
    model: Any, work: Work, setting: Setting, watch: Watch, **options: Any
) -> None:
    """Train an adapted model with the Trainer itself, with further arguments of its own."""
    trainer = watched(Trainer, watch)(
        model=model,
        args=TrainingArguments(**arguments(work, setting), **options),
        train_dataset=PackedRows(work),
        callbacks=[Onlooker(watch)],
    )
    trainer.train()
