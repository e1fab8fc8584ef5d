"""Prompt tuning, Lester et al. 2021, arXiv:2104.08691: trained embeddings before every row."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from dtune.errors import ConfigError
from dtune.peft.base import keyed_seed
from dtune.peft.schema.prompt import PromptConfig, PromptInit
from dtune.peft.virtual import (
    ENCODER,
    VirtualTokens,
    WithVirtualTokens,
    continues,
    extend_seen,
)
from dtune.peft.virtual_rows import Arrangement, arrange
from dtune.resources import resolve_path
from dtune.types import (
    IGNORE_INDEX,
    LOSS_LABELS,
    NUM_DOCUMENTS,
    InjectReport,
    ModelSpec,
    TensorSource,
)

_PEFT_INIT = {
    PromptInit.random: "RANDOM",
    PromptInit.vocab: "SAMPLE_VOCAB",
    PromptInit.text: "TEXT",
}


class PromptTokens(WithVirtualTokens):
    """Forward with the encoder's results as the embeddings of tokens before each document.

    Rows that are trained on are padded on the right. Other than in ``peft``, tokens keep the
    positions that they are given, after those of the virtual tokens, so that padding on the left
    moves nothing.
    """

    def forward_with_tokens(self, given: dict[str, Any]) -> Any:
        """As the model's own, with logits, and hidden states, of the given tokens."""
        num = self.num_virtual_tokens
        if continues(given):
            extend_seen(given, num)
            return self.call_own(given)
        own: Any = self
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = own.get_input_embeddings()(given["input_ids"])
        rows = arrange(given, tuple(embeds.shape[:2]), num)
        last = given.pop("logits_to_keep", 0) if rows.packed else given.get("logits_to_keep", 0)
        output = self.call_own(_with_tokens(given, rows, embeds, self.encoded(embeds.device)))
        if output.logits is not None:
            output.logits = _logits(output.logits, rows, last)
        if output.hidden_states is not None:
            output.hidden_states = tuple(rows.pick(states) for states in output.hidden_states)
        return output


def _with_tokens(
    given: Mapping[str, Any], rows: Arrangement, embeds: torch.Tensor, virtual: torch.Tensor
) -> dict[str, Any]:
    """Arguments of the model's own forward; ``embeds`` [B, S, H] and ``virtual`` [N, H]."""
    count, device = len(virtual), virtual.device
    changed = {**given, "input_ids": None, "inputs_embeds": rows.spread(embeds, virtual)}
    position_ids = given.get("position_ids")
    if position_ids is not None:
        places = torch.arange(count, device=device)
        changed["position_ids"] = rows.spread(position_ids.expand(rows.given) + count, places)
    mask = given.get("attention_mask")
    if mask is not None:
        assert mask.ndim == 2, "masks of scores are made after the virtual tokens are added"
        changed["attention_mask"] = rows.spread(mask, torch.ones(count, device=device))
    for key in ("labels", LOSS_LABELS):
        if given.get(key) is not None:
            none = torch.full((count,), IGNORE_INDEX, device=device)
            changed[key] = rows.spread(given[key], none, rest=IGNORE_INDEX)
    if rows.packed and rows.shape[0] > 1:
        # The ends of rows are documents too, which nobody has counted.
        changed.pop(NUM_DOCUMENTS, None)
    return changed


def _logits(logits: torch.Tensor, rows: Arrangement, last: int) -> torch.Tensor:
    """Logits of the given tokens, or of the ``last`` of them."""
    assert isinstance(last, int), "logits_to_keep is a number here"
    if last == 0:
        return rows.pick(logits)
    if rows.packed:
        logits = rows.pick(logits)
    return logits[:, -min(last, rows.given[1]) :]


class Prompt(VirtualTokens):
    """The embeddings of virtual tokens are the parameters."""

    name = "prompt"
    peft_type = "PROMPT_TUNING"
    trait = PromptTokens
    decisive = ()

    def __init__(self, config: PromptConfig) -> None:
        self.config = config
        self.num_virtual_tokens = config.num_virtual_tokens

    def make_encoder(self) -> nn.Module:
        """An embedding; ``peft`` is kept from filling it from a model that has no values yet."""
        from peft import PromptEmbedding

        config = self.peft_config()
        config.prompt_tuning_init = "RANDOM"
        encoder: nn.Module = PromptEmbedding(config, None)
        return encoder

    def fields(self, config: PretrainedConfig) -> dict[str, object]:
        """How the embeddings began."""
        fields: dict[str, object] = {"prompt_tuning_init": _PEFT_INIT[self.config.init]}
        if self.config.init is PromptInit.text:
            fields["prompt_tuning_init_text"] = self.config.init_text
            fields["tokenizer_name_or_path"] = self._tokenizer
        return fields

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """Add the encoder. ConfigError for a text that cannot be made tokens of the model."""
        assert isinstance(model, PreTrainedModel), type(model)
        words = model.get_input_embeddings()
        if not isinstance(words, nn.Embedding):
            raise ConfigError(
                f"peft=prompt: {spec.family} ({spec.path}) embeds tokens by a "
                f"{type(words).__name__}; use peft=prefix"
            )
        names = {id(parameter): name for name, parameter in reversed([*model.named_parameters()])}
        self._word_name = names[id(words.weight)]
        # A copy without values: families scale what they look up, each in its own way.
        self._words = copy.deepcopy(words)
        self._words.padding_idx = None
        self._tokenizer = resolve_path(spec.path)
        self._text: list[int] = []
        if self.config.init is PromptInit.text:
            self._text = self._read_text(words.num_embeddings)
        return super().inject(model, spec)

    def _read_text(self, num_embeddings: int) -> list[int]:
        """Ids of ``peft.init_text``, repeated or cut to the number of virtual tokens."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self._tokenizer)
        except (ValueError, OSError, KeyError) as error:
            raise ConfigError(
                f"peft.init=text needs a tokenizer in model.path={self._tokenizer}: {error}; set "
                "peft.init=vocab"
            ) from error
        ids: list[int] = tokenizer(self.config.init_text)["input_ids"]
        if not ids or max(ids) >= num_embeddings:
            raise ConfigError(
                f"peft.init_text={self.config.init_text!r} is {len(ids)} tokens, with ids up to "
                f"{max(ids, default=0)}; the model has {num_embeddings}: set another peft.init_text"
            )
        return list(itertools.islice(itertools.cycle(ids), self.num_virtual_tokens))

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """Normal numbers, or embeddings of tokens as the model holds them."""
        if self.config.init is PromptInit.random:
            return super().source(stored, held, seed)
        name = f"{ENCODER}.embedding.weight"
        ids = self._text or self._sampled(keyed_seed(seed, name))
        return _WordSource(name, self._words, self._word_name, ids, held)

    def _sampled(self, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        size = (self.num_virtual_tokens,)
        sampled: list[int] = torch.randint(
            self._words.num_embeddings, size, generator=generator
        ).tolist()
        return sampled


class _WordSource:
    """The embeddings of given tokens, under the name of the parameter that begins as them."""

    def __init__(
        self, name: str, words: nn.Embedding, word_name: str, ids: list[int], held: TensorSource
    ) -> None:
        self._name, self._words, self._word_name = name, words, word_name
        self._ids, self._held = ids, held

    def __contains__(self, name: str) -> bool:
        return name == self._name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return len(self._ids), self._words.embedding_dim

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor: fp32, CPU."""
        return self._values.reshape(-1)[start:stop]

    @cached_property
    def _values(self) -> torch.Tensor:
        width = self._words.embedding_dim
        rows = [self._held.read(self._word_name, i * width, (i + 1) * width) for i in self._ids]
        weight = torch.stack(rows).float().cpu()
        places = torch.arange(len(rows))
        with torch.no_grad():
            found = torch.func.functional_call(self._words, {"weight": weight}, (places,))
        assert isinstance(found, torch.Tensor)
        return found
