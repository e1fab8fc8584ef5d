"""Rows of the embedding and head for new tokens, trained alone, in the layout of ``peft``.

``peft`` calls it ``trainable_token_indices``: the adapter holds the rows themselves, which replace
those of the base. Tied weights share one set of rows; a head of its own has rows of its own.

Shape legend: V tokens, T new ones among them, D hidden size; leading dims are any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dtune.errors import ConfigError
from dtune.peft.base import replace_module
from dtune.types import ModelSpec, TensorSource

FIELD = "trainable_token_indices"
"""Of ``adapter_config.json``; without it the tensors mean something else."""
_SCALE = "embed_scale"
_INSTEAD = "set peft=full, which trains the whole model with its embedding"


class TokenEmbedding(nn.Module):
    """An embedding whose rows ``ids`` are those of a parameter ``rows`` [T, D], an fp32 master."""

    rows: nn.Parameter

    def __init__(self, base: nn.Embedding, ids: range) -> None:
        super().__init__()
        self.base = base
        self.ids = ids
        shape = (len(ids), base.embedding_dim)
        self.rows = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=base.weight.device))

    @property
    def weight(self) -> torch.Tensor:
        """Of the base, as models ask for it: its dtype and device are those of the result."""
        return self.base.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., D], in the dtype of the base."""
        y: torch.Tensor = self.base(input_ids)
        place = input_ids - self.ids.start
        is_new = (place >= 0) & (place < len(self.ids))
        rows = F.embedding(place.clamp(0, len(self.ids) - 1), self.rows).to(y.dtype)
        scale = self.base._buffers.get(_SCALE)
        if scale is not None:
            rows = rows * scale.to(y.dtype)
        return torch.where(is_new[..., None], rows, y)

    def extra_repr(self) -> str:
        """Shown in the printed model."""
        return f"ids={self.ids.start}..{self.ids.stop - 1}"


class TokenHead(nn.Module):
    """A head without bias whose rows ``ids`` are those of a parameter ``rows`` [T, D]."""

    rows: nn.Parameter

    def __init__(self, base: nn.Linear, ids: range, rows: nn.Parameter) -> None:
        super().__init__()
        self.base = base
        self.ids = ids
        self.rows = rows

    @property
    def weight(self) -> torch.Tensor:
        """Of the base, as models ask for it."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> logits [..., V]; those of ``ids`` overwrite what the base has given."""
        y: torch.Tensor = self.base(x)
        y[..., self.ids.start : self.ids.stop] = F.linear(x, self.rows.to(x.dtype)).to(y.dtype)
        return y

    def extra_repr(self) -> str:
        """Shown in the printed model."""
        return f"ids={self.ids.start}..{self.ids.stop - 1}"


class TokenRows:
    """The rows of ``model.added_tokens`` in one model; of nothing where there are none.

    A method calls ``inject`` in its own ``inject``, after it has frozen the model, and adds the
    rest to what it answers itself.
    """

    def __init__(self, ids: Sequence[int] = (), paths: Sequence[str] = ()) -> None:
        self._ids = list(ids)
        self._paths = list(paths)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Trained parameter -> shape."""
        self.replaced: dict[str, int] = {}
        """Type of module added -> how often."""

    @classmethod
    def inject(cls, model: nn.Module, spec: ModelSpec) -> TokenRows:
        """Wrap the embedding, and the head, of a frozen model on the meta device, in place.

        Raises:
            ConfigError: They are of a kind that cannot be wrapped, or the method adapts the head.
        """
        ids = spec.added_tokens
        if not ids:
            return cls()
        assert isinstance(model, PreTrainedModel), type(model)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {id(module): name for name, module in model.named_modules()}
        if not isinstance(embedding, nn.Embedding) or not _is_known(embedding):
            kind = type(embedding).__name__
            raise ConfigError(f"model.added_tokens: an embedding {kind} is not known; {_INSTEAD}")
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                f"model.added_tokens: the head is a {type(head).__name__} with this peft, but its "
                "rows of new tokens are trained by themselves; leave the head out of peft.targets"
            )
        if "bias" in dict(head.named_parameters()):
            raise ConfigError(f"model.added_tokens: the head has a bias; {_INSTEAD}")
        wrapped = TokenEmbedding(embedding, ids)
        is_tied = head.weight is embedding.weight
        rows = wrapped.rows if is_tied else nn.Parameter(torch.empty_like(wrapped.rows))
        first, last = names[id(embedding)], names[id(head)]
        replace_module(model, first, wrapped)
        replace_module(model, last, TokenHead(head, ids, rows))
        made = cls(ids, [first, last])
        trained = [first] if is_tied else [first, last]
        made.shapes = {f"{path}.rows": tuple(rows.shape) for path in trained}
        made.replaced = {"TokenEmbedding": 1, "TokenHead": 1}
        return made

    def stored_name(self, name: str) -> str:
        """The name without the wrapper: ``lm_head.base.weight`` is stored as ``lm_head.weight``."""
        for path in self._paths:
            inner = f"{path}.base."
            if name.startswith(inner):
                return f"{path}.{name.removeprefix(inner)}"
        return name

    def source(self, stored: TensorSource, others: TensorSource) -> TensorSource:
        """First values of the rows, which are those of the base, and what ``others`` has.

        ``stored``: the base's weights by the injected model's names.
        """
        if not self._ids:
            return others
        return _RowsSource(stored, others, self.shapes, self._ids[0])

    def fields(self) -> dict[str, object]:
        """What ``adapter_config.json`` says of them; decisive."""
        if not self._ids:
            return {FIELD: None}
        if len(self.shapes) == 1:
            return {FIELD: self._ids}
        return {FIELD: {path.rpartition(".")[2]: self._ids for path in self._paths}}

    def keys(self) -> dict[str, str]:
        """Trained parameter -> key in the adapter's file."""
        return {name: _key(name) for name in self.shapes}


def _key(name: str) -> str:
    return f"base_model.model.{name.removesuffix('.rows')}.token_adapter.trainable_tokens_delta"


def _is_known(embedding: nn.Embedding) -> bool:
    """Whether it only looks up, and multiplies by one number that it keeps as a buffer."""
    return type(embedding) is nn.Embedding or _SCALE in embedding._buffers


class _RowsSource:
    """Rows of the base's weights by the names of the parameters that begin as they are."""

    def __init__(
        self,
        stored: TensorSource,
        others: TensorSource,
        shapes: Mapping[str, tuple[int, ...]],
        first: int,
    ) -> None:
        self._stored, self._others = stored, others
        self._shapes = dict(shapes)
        self._first = first

    def __contains__(self, name: str) -> bool:
        return name in self._shapes or name in self._others

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes[name] if name in self._shapes else self._others.shape(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor: 1-D, CPU, dtype as stored."""
        if name not in self._shapes:
            return self._others.read(name, start, stop)
        weight = f"{name.removesuffix('.rows')}.base.weight"
        before = self._first * math.prod(self._shapes[name][1:])
        return self._stored.read(weight, before + start, before + stop)


def check_trained(model: nn.Module, spec: ModelSpec, *, peft: str) -> None:
    """ConfigError where a method has left the rows of new tokens as they are."""
    if not spec.added_tokens:
        return
    assert isinstance(model, PreTrainedModel), type(model)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None and not any(p.requires_grad for p in module.parameters()):
            raise ConfigError(
                f"model.added_tokens: peft={peft} does not train the rows of new tokens; set "
                "peft=lora or another of its family, or peft=full; or leave model.added_tokens out"
            )
