"""torchtune: its Llama 3 with LoRA, in the loop of its recipe for one device."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.inputs import SHAPES, read_documents
from benchmarks.peers.watch import Watch
from benchmarks.peers.work import BEST, PLAIN, RECOMPUTED, Setting, Work, missing

TITLE = "torchtune"
PACKAGES = ("torchtune", "torchao")
FIRST: tuple[str, ...] = ()

_IGNORE = -100
_ROPE_BASE = 10_000
"""That of the checkpoint."""
_NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
"""Its names of the linears of a block, by Hugging Face's."""


def settings(work: Work) -> tuple[Setting, ...]:
    """Best: a compiled model, as its recipes advise."""
    return (PLAIN, RECOMPUTED, BEST)


def problem(work: Work) -> str:
    """Why it cannot run here."""
    return missing("torchtune", "torchao")


def run(work: Work, setting: Setting, watch: Watch) -> None:
    """Train. Its recipe keeps adapters in the dtype of the base, without fp32 masters."""
    from torchtune import training

    watch.start_building()
    model = _build(work)
    if setting.recompute:
        from torchtune.modules import TransformerSelfAttentionLayer

        training.set_activation_checkpointing(
            model, auto_wrap_policy={TransformerSelfAttentionLayer}
        )
    if setting.best:
        training.compile_model(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work.lr, weight_decay=0.0, fused=True)
    batches = list(_batches(work))
    watch.start_training()
    for _ in range(work.total_steps):
        for tokens, labels, mask in batches:
            logits = model(tokens, mask=mask)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORE
            )
            share = loss / work.accumulation
            share.backward()
            watch.add_loss(share)
        torch.nn.utils.clip_grad_norm_(trained, work.max_norm)
        if watch.wants_gradients:
            watch.see_gradients(model.named_parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.end_step()


def _build(work: Work) -> Any:
    """The model with the weights of the checkpoint and the adapter."""
    from safetensors.torch import load_file
    from torchtune import training
    from torchtune.models.llama3 import lora_llama3
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    shape = SHAPES[work.model]
    dtype = torch.float32 if work.precision == "fp32" else torch.bfloat16
    with training.set_default_dtype(dtype), torch.device(work.device):
        model = lora_llama3(
            lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            vocab_size=shape["vocab_size"],
            num_layers=shape["num_hidden_layers"],
            num_heads=shape["num_attention_heads"],
            num_kv_heads=shape["num_key_value_heads"],
            embed_dim=shape["hidden_size"],
            max_seq_len=max(2048, work.length),
            intermediate_dim=shape["intermediate_size"],
            norm_eps=1e-5,
            rope_base=_ROPE_BASE,
            lora_rank=work.rank,
            lora_alpha=work.alpha,
        )
    set_trainable_params(model, get_adapter_params(model))
    adapter = load_file(f"{work.adapter}/adapter_model.safetensors")
    state = {**_base_state(work), **adapter_state(adapter, shape)}
    missing_keys, unexpected = model.load_state_dict(state, strict=False)
    assert not missing_keys, missing_keys
    assert not unexpected, unexpected
    return model


def _base_state(work: Work) -> dict[str, torch.Tensor]:
    """Weights of the checkpoint by torchtune's names; a tied head is a second copy here."""
    from pathlib import Path

    from safetensors.torch import load_file
    from torchtune.models.convert_weights import hf_to_tune

    shape = SHAPES[work.model]
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(Path(work.checkpoint).glob("*.safetensors")):
        stored.update(load_file(file))
    stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
    converted: dict[str, torch.Tensor] = hf_to_tune(
        stored,
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        dim=shape["hidden_size"],
    )
    return converted


def adapter_state(adapter: dict[str, torch.Tensor], shape: Any) -> dict[str, torch.Tensor]:
    """The adapter of ``peft`` by torchtune's names, its B of q and k in torchtune's order.

    torchtune rotates neighbouring features where Hugging Face rotates those half a head apart.
    """
    heads = {
        "self_attn.q_proj": shape["num_attention_heads"],
        "self_attn.k_proj": shape["num_key_value_heads"],
    }
    state = {}
    for key, value in adapter.items():
        path, factor, _ = key.removeprefix("base_model.model.model.").rsplit(".", 2)
        _, layer, linear = path.split(".", 2)
        if factor == "lora_B" and linear in heads:
            rank = value.shape[1]
            halves = value.view(heads[linear], 2, -1, rank)
            value = halves.transpose(1, 2).reshape(-1, rank)
        state[f"layers.{layer}.{_NAMES[linear]}.{factor.lower()}.weight"] = value
    return state


def _batches(work: Work) -> Any:
    """Tokens, shifted labels and mask (None: causal) of every forward pass of a step."""
    from torchtune.modules.attention_utils import packed_block_causal_mask

    documents = torch.from_numpy(read_documents(work))
    labels = documents.clone()
    # Nothing is predicted across documents.
    labels[:, :, :-1] = documents[:, :, 1:]
    labels[:, :, -1] = _IGNORE
    shape = (work.rows, work.length)
    for start in range(0, work.rows, work.micro_batch):
        at = slice(start, start + work.micro_batch)
        mask = None
        if work.documents > 1:
            each = torch.full((work.documents,), documents.shape[-1], device=work.device)
            mask = packed_block_causal_mask([each] * work.micro_batch)
        yield (
            documents.view(shape)[at].to(work.device),
            labels.view(shape)[at].to(work.device),
            mask,
        )
