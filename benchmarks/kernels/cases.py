"""The computations of a transformer layer that dtune has kernels for, by dtune and by others.

Shape legend: T tokens, D hidden, F of the MLP, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from comparison import Alternative, Comparison, Layer
from dtune_kernels.catalog import CATALOG
from dtune_kernels.check import tensors_in
from dtune_kernels.fourbit import FourBitWeight, nf4_quantize
from dtune_kernels.glu import glu
from dtune_kernels.glu.reference import plain_glu
from dtune_kernels.library import Op
from dtune_kernels.rms_norm import add_rms_norm, rms_norm
from dtune_kernels.rms_norm.reference import plain_rms_norm
from dtune_kernels.rope import rope
from dtune_kernels.rope.reference import plain_rope
from peers import (
    has,
    liger,
    liger_losses,
    peft_linears,
    quantized_by_bitsandbytes,
    runs_liger,
)
from torch.utils._pytree import tree_flatten, tree_unflatten

Case = Callable[[Layer], Comparison]

EPS = 1e-6
SCALE = 2.0


def _compared(
    layer: Layer,
    inputs: tuple[torch.Tensor, ...],
    upstream: tuple[torch.Tensor, ...],
    *,
    dtune: Callable[..., Any],
    plain: Callable[..., Any],
    liger: Callable[..., Any] | None,
) -> Comparison:
    """All alternatives take the same inputs; plain is compiled as well where the layer says so."""
    alternatives = {"dtune": Alternative(dtune, inputs), "plain": Alternative(plain, inputs)}
    if layer.compile:
        compiled = torch.compile(plain, dynamic=False)
        alternatives["compiled"] = Alternative(compiled, inputs, counts=False)
    if liger is not None:
        alternatives["liger"] = Alternative(liger, inputs, counts=False)
    return Comparison(alternatives, upstream)


def compare_rms_norm(layer: Layer) -> Comparison:
    """Of a frozen weight; x [T, D]."""
    shape = layer.shape
    x = layer.randn(shape.tokens, shape.hidden, grad=True)
    weight = 1 + layer.randn(shape.hidden, scale=0.1)
    by_liger = liger().liger_rms_norm if runs_liger(layer.device) else None
    return _compared(
        layer,
        (x, weight),
        (torch.randn_like(x),),
        dtune=lambda x, weight: rms_norm(x, weight, eps=EPS),
        plain=lambda x, weight: plain_rms_norm(x, weight, EPS, False)[0],
        liger=by_liger and (lambda x, weight: by_liger(x, weight, EPS)),
    )


def compare_add_rms_norm(layer: Layer) -> Comparison:
    """The residual stream plus a block's output, then the norm; both [T, D]."""
    shape = layer.shape
    x, residual = (layer.randn(shape.tokens, shape.hidden, grad=True) for _ in range(2))
    weight = 1 + layer.randn(shape.hidden, scale=0.1)

    def plain(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + residual
        return plain_rms_norm(h, weight, EPS, False)[0], h

    by_liger = liger().liger_fused_add_rms_norm if runs_liger(layer.device) else None
    return _compared(
        layer,
        (x, residual, weight),
        (torch.randn_like(x), torch.randn_like(x)),
        dtune=lambda x, residual, weight: add_rms_norm(x, residual, weight, eps=EPS),
        plain=plain,
        liger=by_liger and (lambda x, residual, weight: by_liger(x, residual, weight, EPS)),
    )


def compare_rope(layer: Layer) -> Comparison:
    """Queries and keys as views of what their linears return."""
    q, k, cos, sin, _ = CATALOG["rope"].arguments(layer.shape, layer.dtype, layer.device)
    q.requires_grad_()
    k.requires_grad_()
    return _compared(
        layer,
        (q, k, cos, sin),
        (torch.randn_like(q), torch.randn_like(k)),
        dtune=rope,
        plain=lambda q, k, cos, sin: plain_rope(q, k, cos, sin, False),
        liger=liger().liger_rope if runs_liger(layer.device) else None,
    )


def compare_swiglu(layer: Layer) -> Comparison:
    """silu(gate) * up; both [T, F].

    Liger's backward overwrites gate and up by their gradients: later rounds have smaller numbers.
    """
    gate, up = (layer.randn(layer.shape.tokens, layer.shape.ffn, grad=True) for _ in range(2))
    return _compared(
        layer,
        (gate, up),
        (torch.randn_like(gate),),
        dtune=lambda gate, up: glu(gate, up, "silu"),
        plain=lambda gate, up: plain_glu(gate, up, "silu"),
        liger=liger().liger_swiglu if runs_liger(layer.device) else None,
    )


def _compare_dequantize(layer: Layer, *, nested: bool) -> Comparison:
    weight = layer.randn(layer.shape.ffn, layer.shape.hidden, scale=0.02)
    own = nf4_quantize(weight, double_quant=nested)
    alternatives = {
        "dtune": Alternative(
            lambda *tensors: own.with_tensors(tensors).dequantize(layer.dtype), own.tensors()
        ),
        "plain": Alternative(lambda *tensors: _plain_dequantize(own, tensors), own.tensors()),
    }
    if has("bitsandbytes"):
        theirs = quantized_by_bitsandbytes(weight, nested=nested)
        alternatives["bitsandbytes"] = Alternative(theirs.dequantize, theirs.tensors, counts=False)
    return Comparison(alternatives)


def _plain_dequantize(own: FourBitWeight, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    codes, absmax, absmax2, offset = (*tensors, None, None)[:4]
    rows, columns = own.shape
    settings = (rows, columns, own.kind, own.block_size, own.first, torch.bfloat16)
    result: torch.Tensor = CATALOG["dequantize_4bit"].plain(
        codes, absmax, absmax2, offset, *settings
    )
    return result


def compare_dequantize_nested(layer: Layer) -> Comparison:
    """NF4 with scales of 8 bits; a weight [F, D]."""
    return _compare_dequantize(layer, nested=True)


def compare_dequantize(layer: Layer) -> Comparison:
    """NF4 with scales of 32 bits; a weight [F, D]."""
    return _compare_dequantize(layer, nested=False)


class _Adapted:
    """Frozen weights, and adapters in fp32 as dtune trains them."""

    def __init__(self, layer: Layer, sizes: dict[str, tuple[int, int]]) -> None:
        rank, device = layer.shape.rank, layer.device
        self.weights, self.adapters = {}, {}
        for name, (outputs, inputs) in sizes.items():
            self.weights[name] = layer.randn(outputs, inputs, scale=inputs**-0.5)
            a = torch.randn(rank, inputs, device=device) * inputs**-0.5
            b = torch.randn(outputs, rank, device=device) * rank**-0.5
            self.adapters[name] = [a.requires_grad_(), b.requires_grad_()]

    def add_magnitudes(self) -> None:
        """Of DoRA: near the norms of the rows, as they are after some training."""
        for name, (a, b) in self.adapters.items():
            whole = self.weights[name].float() + SCALE * (b @ a).detach()
            magnitude = whole.norm(dim=1) * (1 + 0.1 * torch.rand_like(whole[:, 0]))
            self.adapters[name].append(magnitude.requires_grad_())

    @property
    def trained(self) -> tuple[torch.Tensor, ...]:
        return tuple(x for values in self.adapters.values() for x in values)

    def linears(self) -> list[Any]:
        """As dtune takes them."""
        from dtune_kernels.lora import Adapter, Linear

        return [
            Linear(self.weights[name], None, (Adapter(a, b, SCALE),))
            for name, (a, b, *_) in self.adapters.items()
        ]

    def alternatives(
        self,
        layer: Layer,
        x: torch.Tensor,
        *,
        dtune: Callable[..., Any],
        of_linears: Callable[..., Any],
        bare: str,
    ) -> dict[str, Alternative]:
        """By dtune; by PEFT with adapters in the layer's dtype, and as trained under autocast.

        Args:
            layer: The layer.
            x: The input.
            dtune: Takes x.
            of_linears: The same computation by any linears: takes them and x.
            bare: Name of the computation without adapters.
        """
        found = {"dtune": Alternative(dtune, (x,), self.trained)}
        if has("peft"):
            for name, dtype in (("peft", layer.dtype), ("peft, autocast", torch.float32)):
                modules, trained = peft_linears(
                    self.weights, self.adapters, scale=SCALE, dtype=dtype
                )
                run = _under_autocast(layer, of_linears, modules, enabled=dtype != layer.dtype)
                found[name] = Alternative(run, (x,), trained)
        plain = [lambda x, weight=weight: F.linear(x, weight) for weight in self.weights.values()]
        found[bare] = Alternative(lambda x: of_linears(plain, x), (x,), same=False)
        return found


def _under_autocast(
    layer: Layer, of_linears: Callable[..., Any], modules: Sequence[Any], *, enabled: bool
) -> Callable[..., Any]:
    def run(x: torch.Tensor) -> Any:
        with torch.autocast(layer.device.type, dtype=layer.dtype, enabled=enabled):
            return of_linears(modules, x)

    return run


def compare_lora_linear(layer: Layer) -> Comparison:
    """A projection [D, D]."""
    from dtune_kernels.lora import lora_linear

    tokens, hidden = layer.shape.tokens, layer.shape.hidden
    adapted = _Adapted(layer, {"o_proj": (hidden, hidden)})
    x = layer.randn(tokens, hidden, grad=True)
    (linear,) = adapted.linears()
    alternatives = adapted.alternatives(
        layer,
        x,
        dtune=lambda x: lora_linear(x, linear),
        of_linears=lambda linears, x: linears[0](x),
        bare="bare GEMMs",
    )
    return Comparison(alternatives, (layer.randn(tokens, hidden),))


def compare_lora_qkv(layer: Layer) -> Comparison:
    """Queries, keys and values of one input [T, D]."""
    from dtune_kernels.lora import lora_linears

    shape = layer.shape
    kv = shape.kv_heads * shape.head_dim
    outputs = {"q_proj": shape.heads * shape.head_dim, "k_proj": kv, "v_proj": kv}
    adapted = _Adapted(layer, {name: (size, shape.hidden) for name, size in outputs.items()})
    x = layer.randn(shape.tokens, shape.hidden, grad=True)
    group = adapted.linears()
    alternatives = adapted.alternatives(
        layer,
        x,
        dtune=lambda x: lora_linears(x, group),
        of_linears=lambda linears, x: tuple(linear(x) for linear in linears),
        bare="bare GEMMs",
    )
    return Comparison(
        alternatives, tuple(layer.randn(shape.tokens, size) for size in outputs.values())
    )


def compare_lora_mlp(layer: Layer) -> Comparison:
    """down(silu(gate(x)) * up(x)) of x [T, D]."""
    from dtune_kernels.lora import lora_mlp

    shape = layer.shape
    wide = (shape.ffn, shape.hidden)
    sizes = {"gate_proj": wide, "up_proj": wide, "down_proj": (shape.hidden, shape.ffn)}
    adapted = _Adapted(layer, sizes)
    x = layer.randn(shape.tokens, shape.hidden, grad=True)
    gate, up, down = adapted.linears()

    def of_linears(linears: Sequence[Any], x: torch.Tensor) -> Any:
        gate, up, down = linears
        return down(F.silu(gate(x)) * up(x))

    alternatives = adapted.alternatives(
        layer,
        x,
        dtune=lambda x: lora_mlp(x, gate, up, down, activation="silu"),
        of_linears=of_linears,
        bare="without adapters",
    )
    return Comparison(alternatives, (layer.randn(shape.tokens, shape.hidden),))


def compare_dora_linear(layer: Layer) -> Comparison:
    """A projection [D, D]."""
    from dtune_kernels.dora import dora_linear

    tokens, hidden = layer.shape.tokens, layer.shape.hidden
    adapted = _Adapted(layer, {"o_proj": (hidden, hidden)})
    adapted.add_magnitudes()
    x = layer.randn(tokens, hidden, grad=True)
    (linear,), magnitude = adapted.linears(), adapted.adapters["o_proj"][2]
    alternatives = adapted.alternatives(
        layer,
        x,
        dtune=lambda x: dora_linear(x, linear, magnitude),
        of_linears=lambda linears, x: linears[0](x),
        bare="bare GEMMs",
    )
    return Comparison(alternatives, (layer.randn(tokens, hidden),))


def compare_linear_cross_entropy(layer: Layer) -> Comparison:
    """A frozen head [V, D]; every token has a label."""
    from dtune_kernels.cross_entropy import linear_cross_entropy

    shape = layer.shape
    hidden = layer.randn(shape.tokens, shape.hidden, grad=True)
    weight = layer.randn(shape.vocab, shape.hidden, scale=shape.hidden**-0.5)
    labels = torch.randint(shape.vocab, (shape.tokens,), device=layer.device)
    inputs = (hidden, weight, labels)

    def own(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, labels, num_targets=len(labels))

    def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    alternatives = {"dtune": Alternative(own, inputs), "plain": Alternative(plain, inputs)}
    if runs_liger(layer.device):
        for name, run in liger_losses().items():
            alternatives[name] = Alternative(run, inputs, counts=False)
    # The mean over the tokens, as training takes it.
    upstream = torch.full((), 1 / shape.tokens, device=layer.device)
    return Comparison(alternatives, (upstream,))


def _case_of(op: Op) -> Case:
    def compare_op(layer: Layer) -> Comparison:
        arguments = op.arguments(layer.shape, layer.dtype, layer.device)
        flat, tree = tree_flatten(arguments)
        places = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor)]

        def run(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*tensors: torch.Tensor) -> Any:
                filled = list(flat)
                for place, x in zip(places, tensors, strict=True):
                    filled[place] = x
                with torch.no_grad():
                    result = function(*tree_unflatten(filled, tree))
                return list(tensors_in(result))

            return call

        tensors = tuple(flat[place] for place in places)
        # How near they are to each other is for `dtune kernels check` to say.
        return Comparison(
            {
                "dtune": Alternative(run(op.call), tensors),
                "plain": Alternative(run(op.plain), tensors, same=False),
            }
        )

    return compare_op


FUNCTIONS: dict[str, Case] = {
    "dequantize nf4 nested": compare_dequantize_nested,
    "lora linear": compare_lora_linear,
    "rms_norm": compare_rms_norm,
    "rope": compare_rope,
    "swiglu": compare_swiglu,
    "linear_cross_entropy": compare_linear_cross_entropy,
    "lora mlp": compare_lora_mlp,
    "lora qkv": compare_lora_qkv,
    "dora linear": compare_dora_linear,
    "add_rms_norm": compare_add_rms_norm,
    "dequantize nf4": compare_dequantize,
}
"""By name, the most telling first."""

OPS: dict[str, Case] = {f"op {name}": _case_of(op) for name, op in CATALOG.items()}
"""Every op alone, against what plain PyTorch runs for it."""
