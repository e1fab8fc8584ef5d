"""Tokens that are new to a model: in its tokenizer, and as rows of its embedding and head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dtune.errors import ConfigError
from dtune.types import ModelSpec, TensorSource

# Elements read at once for a mean: fixed, so that the order of the sum is.
_CHUNK = 1 << 22


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Make each text one token, in place. They are ordinary tokens: decoding shows them.

    A text is found as it is written: before normalisation, inside of words too, with the blanks
    around it kept.

    Raises:
        ConfigError: The tokenizer has one of them already.
    """
    known = tokenizer.get_vocab()
    held = [token for token in tokens if token in known]
    if held:
        raise ConfigError(
            f"model.added_tokens: the tokenizer has {', '.join(map(repr, held))} already; leave "
            "what it has out of the list"
        )
    count = tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    assert count == len(tokens), (count, tokens)


def added_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> range:
    """Ids of tokens that ``add_tokens`` has added, which follow each other."""
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in tokens]
    found = range(ids[0], ids[0] + len(ids))
    if ids != list(found):
        raise ConfigError(
            f"model.added_tokens: the tokenizer gives them the ids {ids}, which do not follow each "
            "other; give the model with a tokenizer that numbers its tokens without gaps"
        )
    return found


def grow(model: PreTrainedModel, spec: ModelSpec, ids: range) -> ModelSpec:
    """Give a model on the meta device rows for these ids, in place; return what then holds.

    Many models have more rows than their tokenizer has tokens: those are used first, as they are
    stored, and the model grows by what is missing only.
    """
    before = _rows(model)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding), type(embedding)
    rows = embedding.num_embeddings
    if ids.stop > rows:
        model.resize_token_embeddings(ids.stop, mean_resizing=False)
    after = _rows(model)
    grown = {name: count for name, count in before.items() if after[name] != count}
    # Of a tokenizer that has more tokens than the model has rows, those in between are new too.
    new = range(min(ids.start, rows), ids.stop)
    total = sum(p.numel() for p in model.parameters())
    return dataclasses.replace(spec, added_tokens=new, grown=grown, num_parameters=total)


def _rows(model: PreTrainedModel) -> dict[str, int]:
    names = model.named_parameters(remove_duplicate=False)
    return {name: parameter.shape[0] for name, parameter in names if parameter.dim()}


class GrownSource:
    """A source whose tensors have more rows than are stored: each new one the mean of the stored.

    The mean is summed in fp64 and has the dtype that is stored, whatever range is read.
    Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
    """

    def __init__(self, source: TensorSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """``shapes``: those that the grown tensors are to have."""
        self.source = source
        self._shapes = dict(shapes)
        self._means: dict[str, torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.source

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes.get(name) or self.source.shape(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor: 1-D, CPU, dtype as stored."""
        if name not in self._shapes:
            return self.source.read(name, start, stop)
        stored = math.prod(self.source.shape(name))
        read = self.source.read(name, min(start, stored), min(stop, stored))
        if stop <= stored:
            return read
        mean = self._mean(name)
        places = torch.arange(max(start, stored), stop) % mean.numel()
        return torch.cat((read, mean[places]))

    def _mean(self, name: str) -> torch.Tensor:
        """Mean row of what is stored, flat, in the stored dtype."""
        if name not in self._means:
            rows, *rest = self.source.shape(name)
            row = math.prod(rest)
            total = torch.zeros(row, dtype=torch.float64)
            step = max(1, _CHUNK // row)
            for first in range(0, rows, step):
                part = self.source.read(name, first * row, min(rows, first + step) * row)
                total += part.view(-1, row).sum(0, dtype=torch.float64)
            self._means[name] = (total / rows).to(part.dtype)
        return self._means[name]
