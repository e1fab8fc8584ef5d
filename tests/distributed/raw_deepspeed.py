"""Training by DeepSpeed itself, with none of dtune's engines, on dtune's batches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dtune.build import build_data
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.models.load import load_tokenizer
from dtune.objectives.causal import causal_loss
from dtune.runtime.world import World


def deepspeed_config(stage: int, lr: float, micro_batch: int) -> dict[str, Any]:
    """DeepSpeed's own config: its AdamW, its clipping."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": lr, "weight_decay": 0.0, "torch_adam": True},
        },
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "communication_data_type": "fp32",
    }


def train(
    world: World,
    *,
    settings: list[str],
    stage: int,
    saved: int,
    folder: Path,
    lora: Mapping[str, Any] | None,
) -> list[float]:
    """Losses of all steps of the settings; saved by DeepSpeed after step ``saved``."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Nothing to compile: gloo reduces as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    run = load_frozen(compose_overrides("train", settings))
    data = build_data(run, load_tokenizer(run.model), world, world_size=world.size)
    model: Any = AutoModelForCausalLM.from_pretrained(run.model.path, dtype=torch.float32)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    config = deepspeed_config(stage, run.optim.lr, run.train.micro_batch_size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    engine.train()
    losses = []
    for step in range(data.total_steps):
        (batch,) = data.loader.batches(step)
        targets = world.sum(torch.tensor(float(batch.num_targets)))
        mean = causal_loss(engine, batch).total / targets
        engine.backward(mean * world.size)
        engine.step()
        losses.append(float(world.sum(mean.detach())))
        if step + 1 == saved:
            engine.save_checkpoint(str(folder), tag=f"global_step{saved}")
    return losses
