"""The LoRA kernels of axolotl in a model of ``peft``, trained by the Trainer of transformers."""

from __future__ import annotations

from benchmarks.peers.watch import Watch
from benchmarks.peers.work import PLAIN, RECOMPUTED, Setting, Work, missing

TITLE = "axolotl's LoRA kernels"
PACKAGES = ("axolotl", "bitsandbytes", "accelerate")
FIRST: tuple[str, ...] = ()


def settings(work: Work) -> tuple[Setting, ...]:
    """All three of its kernels, which is what it advises, in every setting."""
    return (PLAIN, RECOMPUTED)


def problem(work: Work) -> str:
    """Why it cannot run here."""
    if absent := missing("axolotl", "peft", "accelerate"):
        return absent
    return "" if work.device == "cuda" else "its kernels are Triton's, which run on a GPU only"


def run(work: Work, setting: Setting, watch: Watch) -> None:
    """Train."""
    from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches, patch_self_attn_lora
    from axolotl.utils.dict import DictDefault

    from benchmarks.peers.contestants.hf_trainer import load_adapted, train_with_trainer

    config = DictDefault(
        base_model=work.checkpoint,
        lora_mlp_kernel=True,
        lora_qkv_kernel=True,
        lora_o_kernel=True,
    )
    watch.start_building()
    # The class of the attention first, then the modules of the model.
    patch_self_attn_lora(config)
    model = apply_lora_kernel_patches(load_adapted(work), config)
    train_with_trainer(model, work, setting, watch)
