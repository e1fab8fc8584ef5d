"""The page about scaling, made from what was counted and what was predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.scaling.predict import (
    CARD,
    GPUS,
    LENGTH,
    PER_NODE,
    ROWS,
    WORKS,
    Prediction,
    Work,
    settings_of,
)
from dtune.measure.cards import GB
from dtune.measure.memory import GIB
from dtune.plan.cards import find_card
from dtune.plan.report import card_rows
from dtune.plan.times import ASSUMPTIONS

NEAR = 0.02
"""Engines whose predicted steps differ by less are told as equals."""
BLOCKS = 80
"""Of a model of 70B."""

HEAD = """# Scaling: what GPUs send each other, and which engine to use

Written by `python -m benchmarks.scaling.run`. What ranks send is counted; what it means for many
GPUs is predicted from it, and was not measured.

## What a rank sends in a step

Of `n` ranks with `m` micro batches each, a ring sends the share `s = (n - 1) / n` of what is
gathered or scattered, and `2 s` of what is reduced everywhere. `W` are the bytes of all weights as
the forward pass reads them (2 a parameter in bf16, about half a byte in nf4), and `T` is the number
of trained parameters, whose gradients are reduced in fp32.
"""
FORMULAS = (
    ("`ddp`", "`2 s 4T`", "once a step"),
    ("`zero1`", "`2 s 4T + s 2T`", "once a step"),
    ("`zero2`", "`2 m s 4T + s 2T`", "gradients in every micro batch"),
    ("`fsdp`", "`2 m s W + s 4T`", "the model twice in every micro batch"),
    ("  `reshard_after_forward=false`", "`m s W + s 4T`", "the model once in every micro batch"),
    (
        "  `shard_size=k`",
        "`(k - 1) / k (2 m W + 4T)` among `k`, `2 (n - k) / n 4T / k` over replicas",
        "the model stays among `k` neighbours",
    ),
    (
        "`zero3`",
        "`m s W` for forward, the same for backward, `m s 4T`",
        "the model and gradients in every micro batch",
    ),
)
AFTER_FORMULAS = """\
FSDP cuts by rows, and pads a tensor of fewer rows than there are shards to as many: over 1,024 GPUs
each factor A of LoRA, with 16 rows, is gathered 64 times over. ZeRO-3 keeps the last 1e9 parameters
of forward for backward, give or take tensors of a block, and gathers what is not larger than
`parallel.param_persistence_threshold` once a step.
"""

COUNTED = """## Counted

{cases} cases (engines, methods, options, accumulation) on {worlds} processes of one machine: every
collective by its kind and bytes as it passes torch's dispatcher, and beside it the bytes on the
sockets of gloo. The tests hold the formulas to all of them: those above within 1 % where nothing is
padded, and those of `dtune plan` within 0.1 % by kind and 2 % on the sockets. In MB from a rank in
a step of two micro batches, all kinds together, of a model of {millions} M parameters:
"""

RULES = """## Which engine

- **The base fits on one GPU and little of it is trained** (LoRA, QLoRA, IA3): `ddp`. A step sends
  the gradients of the adapters and nothing else, however large the base is and however many micro
  batches it has. Others may be predicted as fast where links are as good as here and passes long
  enough; `ddp` depends on neither.
- **More is trained than fits, or the base does not fit**: `fsdp`. Every micro batch gathers the
  model, so take the largest one that fits before accumulating: the tables say from how many tokens
  on passes take longer than what is sent beside them. `zero3` is for those who run DeepSpeed: it
  reduces gradients in every micro batch too.
- **All is trained, weights and gradients fit, and micro batches are too small for that, or links
  too slow**: `zero1`, which sends once a step whatever is accumulated. `zero2` reduces in every
  micro batch: where gradients do not fit either.
- **More than one node, and a replica fits on one**: `fsdp` with `parallel.shard_size={node}`. The
  gathers stay on the links of the node, and only gradients leave it; see below what many hops cost.
- **The base must be sharded and is not trained**: `quant=nf4`, which is gathered as bytes, a
  quarter of those of bf16. With it the base often fits on every GPU, and `ddp` is there again.

Predicted the fastest of what fits on `card={card}`, with {tokens:,} tokens a GPU in a step; of
those whose steps differ by less than {near:.0%}, the one that sends least comes first:
"""

ASSUMED = """## Assumed

- {rates}; {source}. Nodes of {node} GPUs.
- Every GPU has the same work, whatever their number: one micro batch of {rows} x {length:,} tokens,
  two documents a row, all trained on. So the global batch grows with the GPUs.
- Of each engine the least recomputation that fits by the high estimate of memory.
{model}
- Collectives take the time of their bytes. Nothing is waited for between the hops of a ring, links
  are shared with no one, and no GPU is slower than the others. For {most:,} GPUs that is too good
  where models are gathered: `fsdp` over all of them gathers the {groups} groups of a model of
  {blocks} blocks twice, {hops:,} hops one after the other, and each microsecond of a hop adds
  {added:.2f} s to a micro batch. `parallel.shard_size={node}` has {inside:,}.
- Losses, gradient norms and flags, a few bytes each, are left out.

`dtune bench` measures what is true, and `tflops=`, `bandwidth_tb=`, `link_gb=` and `network_gb=` of
[`dtune plan`](plan.md) put measured rates in place of those of data sheets.
"""

PREDICTED = """## {work}

`dtune plan {command}`,
with the engine and `train.recompute=` of each row. *Sending* is the time of all collectives,
*exposed* the part of it that no pass runs beside, and *hidden from* the tokens of a GPU in a step
from which on the passes take longer than what is sent beside them.
"""


def render(counted: dict[str, Any], predictions: Sequence[Prediction]) -> str:
    """The page."""
    formulas = _table(("`parallel=`", "bytes from a rank in a step", ""), FORMULAS)
    parts = [HEAD, formulas, AFTER_FORMULAS, _counts(counted), _choice(predictions), _assumed()]
    parts += [_predicted(work, predictions) for work in WORKS]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_METHODS = (("full", "none"), ("lora", "none"), ("lora", "nf4"), ("ia3", "none"))
_ENGINES = ("ddp", "zero1", "zero2", "fsdp", "zero3")


def _counts(counted: dict[str, Any]) -> str:
    """Of the plain cases in bf16 what was counted."""
    rows = {(row["case"], row["ranks"]): row for row in counted["rows"]}
    worlds = sorted({ranks for _, ranks in rows})
    shown = [
        (engine, peft, quant, f"{engine}-{peft}-{quant}-bf16-micros2")
        for engine in _ENGINES
        for peft, quant in _METHODS
    ]

    def megabytes(case: str, ranks: int) -> str:
        return f"{sum(rows[case, ranks]['counted'].values()) / 1e6:.3f}"

    head = COUNTED.format(
        cases=len({case for case, _ in rows}),
        worlds=f"{', '.join(map(str, worlds[:-1]))} and {worlds[-1]}",
        millions=f"{rows['ddp-full-none-bf16-micros2', worlds[0]]['trained'] / 1e6:.1f}",
    )
    table = _table(
        ("`parallel=`", "`peft=`", "`quant=`", *(f"{ranks} ranks" for ranks in worlds)),
        (
            (f"`{engine}`", f"`{peft}`", f"`{quant}`", *(megabytes(case, n) for n in worlds))
            for engine, peft, quant, case in shown
        ),
    )
    versions = ", ".join(f"{name} {version}" for name, version in counted["versions"].items())
    raw = f"All cases by kind: `benchmarks/results/communication-cpu.json`, with {versions}."
    return f"{head}\n{table}\n{raw}\n"


def _choice(predictions: Sequence[Prediction]) -> str:
    """The rules, and the fastest engines of each work and size."""
    head = RULES.format(node=PER_NODE, card=CARD, tokens=ROWS * LENGTH, near=NEAR)
    table = _table(
        ("", *(f"{gpus:,} GPUs" for gpus in GPUS)),
        ((work.name, *(_fastest(predictions, work.name, gpus) for gpus in GPUS)) for work in WORKS),
    )
    return f"{head}\n{table}"


def _fastest(predictions: Sequence[Prediction], work: str, gpus: int) -> str:
    fits = [one for one in predictions if (one.work, one.gpus) == (work, gpus) and one.fits]
    if not fits:
        return "nothing fits"
    least = min(one.step for one in fits)
    near = [one for one in fits if one.step <= (1 + NEAR) * least]
    first, *others = sorted(near, key=lambda one: one.sent)
    also = f"; {', '.join(f'`{_short(one.engine)}`' for one in others)}" if others else ""
    return f"**`{_short(first.engine)}`**: {first.tokens_per_second:,.0f} tokens/s a GPU{also}"


def _short(engine: str) -> str:
    return engine.replace("parallel=", "").replace("parallel.", "")


def _assumed() -> str:
    (_, rates), (_, source) = card_rows(find_card(CARD))
    groups = BLOCKS + 1
    hops = 2 * groups * (GPUS[-1] - 1)
    return ASSUMED.format(
        rates=rates,
        source=source,
        node=PER_NODE,
        rows=ROWS,
        length=LENGTH,
        model="\n".join(f"- {one[0].upper()}{one[1:]}." for one in ASSUMPTIONS),
        most=GPUS[-1],
        groups=groups,
        blocks=BLOCKS,
        hops=hops,
        added=hops * 1e-6,
        inside=2 * groups * (PER_NODE - 1),
    )


def _predicted(work: Work, predictions: Sequence[Prediction]) -> str:
    settings = [*settings_of(work, GPUS[-1]), f"card={CARD}", f"gpus={GPUS[-1]}"]
    head = PREDICTED.format(work=work.name, command=" ".join(settings))
    columns = (
        *("GPUs", "engine", "recompute", "GiB (high)", "GB sent", "between nodes"),
        *("passes s", "sending s", "exposed s", "tokens/s a GPU", "hidden from"),
    )
    rows = (_row(one) for one in predictions if one.work == work.name)
    return f"{head}\n{_table(columns, rows)}"


def _row(one: Prediction) -> Sequence[str]:
    first = (f"{one.gpus:,}", f"`{_short(one.engine)}`", one.recompute)
    sizes = (f"{one.memory / GIB:.1f}", f"{one.sent / GB:.2f}", f"{one.between_nodes / GB:.2f}")
    if not one.fits:
        return (*first, *sizes, "does not fit", "", "", "", "")
    seconds = (f"{one.passes:.3f}", f"{one.sending:.3f}", f"{one.exposed:.3f}")
    return (*first, *sizes, *seconds, f"{one.tokens_per_second:,.0f}", f"{one.hiding:,.0f}")
