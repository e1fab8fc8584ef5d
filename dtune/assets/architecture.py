"""The Llama architecture of the tiny model."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from dtune.assets.tokenizer import MAX_POSITIONS


def tiny_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Return the architecture: about 1 M parameters, grouped-query attention, tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def init_model(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> LlamaForCausalLM:
    """Build the model with random fp32 weights drawn from `seed`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(tokenizer))
