"""Which combinations hold, as data, and the check of a whole run before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.checkpoint.schema import Best
from dtune.config.places import check_places
from dtune.config.run import POLYMORPHIC, RunConfig
from dtune.data.schema import Format
from dtune.errors import ConfigError
from dtune.optim.schema.adamw import AdamwConfig, Flat
from dtune.parallel.schema import engines as all_engines
from dtune.patch.schema import Backend
from dtune.peft.schema.hf import READS_WEIGHT, HfConfig
from dtune.peft.schema.prompt import PromptConfig, PromptInit
from dtune.quant.schema import ByteConfig
from dtune.runtime.capabilities import require
from dtune.runtime.schema import Precision, Recompute
from dtune.runtime.watch.schema import OnHang


@dataclass(frozen=True)
class Illegal:
    """A cell of the matrix that does not hold: options by group, why, and the nearest legal one."""

    options: dict[str, frozenset[str]]
    reason: str
    instead: str


ILLEGAL: tuple[Illegal, ...] = (
    Illegal(
        {"peft": frozenset({"full"}), "quant": frozenset({"nf4", "fp4", "int8"})},
        "weights of 4 or 8 bits cannot be trained, and full fine-tuning trains all of them",
        "peft=lora, or quant=none",
    ),
    Illegal(
        {
            "optim": frozenset({"adamw8bit"}),
            "parallel": frozenset({"fsdp", "zero1", "zero2", "zero3"}),
        },
        "the 8-bit state of bitsandbytes is laid out in blocks that a shard boundary would cut",
        "optim=adamw, or parallel=ddp",
    ),
    Illegal(
        {"train.recompute": frozenset({"selective"}), "parallel": frozenset({"zero3"})},
        "ZeRO-3 gathers weights around each module, which keeping single products would bypass",
        "train.recompute=full, or parallel=fsdp",
    ),
    Illegal(
        {"peft": frozenset({"prefix"}), "train.compile": frozenset({"true"})},
        "each block reads the keys and values of its own place: none is compiled like another",
        "train.compile=false, or peft=lora",
    ),
    Illegal(
        {
            "peft": frozenset({"adalora"}),
            "parallel": frozenset({"fsdp", "zero1", "zero2", "zero3"}),
        },
        "AdaLoRA ranks all targets by whole weights and gradients, of which each rank has pieces",
        "parallel=ddp, or peft=lora",
    ),
    Illegal(
        {
            "train.offload_activations": frozenset({"true"}),
            "train.compile": frozenset({"true"}),
        },
        "what a compiled block saves for its backward is decided inside of it",
        "train.compile=false, or train.offload_activations=false",
    ),
    Illegal(
        {"train.compile": frozenset({"true"}), "parallel": frozenset({"zero3"})},
        "ZeRO-3 gathers weights in hooks that break a compiled block apart",
        "train.compile=false, or parallel=fsdp",
    ),
)


def choices(run: RunConfig) -> dict[str, str]:
    """The chosen option of each group and key that takes part in the matrix."""
    return {
        "peft": run.peft.name,
        "quant": run.quant.name,
        "kernels": run.kernels.name.value,
        "parallel": run.parallel.name,
        "precision": run.precision.name.value,
        "objective": run.objective.name,
        "optim": run.optim.name,
        "train.recompute": run.train.recompute.value,
        "train.compile": str(run.train.compile).lower(),
        "train.offload_activations": str(run.train.offload_activations).lower(),
    }


def forbids(rule: Illegal, chosen: dict[str, str]) -> bool:
    """Whether the rule is about this combination."""
    return all(chosen[group] in names for group, names in rule.options.items())


def find_illegal(chosen: dict[str, str]) -> Illegal | None:
    """The first rule that forbids the combination, or None where it holds."""
    return next((rule for rule in ILLEGAL if forbids(rule, chosen)), None)


def support_table() -> str:
    """What runs with which engine, as Markdown: ``yes``, or the number of the reason below.

    Options of a group that have the same cells share a row.
    """
    engines = all_engines()
    reasons: list[str] = []
    lines = [f"| | {' | '.join(engines)} |", f"|---{'|---' * len(engines)}|"]
    for group, names in matrix().items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for option in names:
            cells = tuple(_cell(group, option, engine, reasons) for engine in engines)
            alike.setdefault(cells, []).append(option)
        for cells, options in alike.items():
            lines.append(f"| `{group}={', '.join(options)}` | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    notes += [f"- {_in_words(rule)}" for rule in ILLEGAL if not _is_of_one_and_engine(rule)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _is_of_one_and_engine(rule: Illegal) -> bool:
    return "parallel" in rule.options and len(rule.options) == 2


def _in_words(rule: Illegal) -> str:
    cells = [f"{group}={', '.join(sorted(names))}" for group, names in rule.options.items()]
    return f"not `{'` with `'.join(cells)}`: {rule.reason}: use {rule.instead}"


def matrix() -> dict[str, tuple[str, ...]]:
    """Groups and keys of the matrix besides the engine, with their options."""
    groups = ("peft", "quant", "objective", "optim")
    return {
        **{group: POLYMORPHIC[group].names() for group in groups},
        "kernels": tuple(backend.value for backend in Backend),
        "precision": tuple(precision.value for precision in Precision),
        "train.recompute": tuple(one.value for one in Recompute if one is not Recompute.auto),
        "train.compile": ("false", "true"),
        "train.offload_activations": ("false", "true"),
    }


def _cell(group: str, option: str, engine: str, reasons: list[str]) -> str:
    chosen = {group: option, "parallel": engine}
    rule = next(
        (r for r in ILLEGAL if r.options.keys() <= chosen.keys() and forbids(r, chosen)), None
    )
    if rule is None:
        return "yes"
    reason = f"{rule.reason}: use {rule.instead}"
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"


def accumulation_steps(run: RunConfig, world_size: int) -> int:
    """Micro batches of one rank in one optimizer step."""
    return run.train.global_batch_size // (run.train.micro_batch_size * world_size)


def check_run(run: RunConfig, world_size: int) -> None:
    """Raise ConfigError for the first thing that cannot work, naming the key to turn."""
    chosen = choices(run)
    rule = find_illegal(chosen)
    if rule is not None:
        cell = " with ".join(f"{group}={chosen[group]}" for group in rule.options)
        raise ConfigError(f"{cell}: {rule.reason}; use {rule.instead}")
    _check_peft_type(run)
    _check_virtual_tokens(run)
    _check_packages(run)
    _check_world(run, world_size)
    _check_data(run)
    _check_evaluation(run)
    _check_speed(run)
    check_places(run)
    if run.watch.on_hang is OnHang.restart and run.launch.max_restarts == 0:
        raise ConfigError(
            "watch.on_hang=restart needs launch.max_restarts of at least 1; set "
            "launch.max_restarts=1, or watch.on_hang=stop"
        )
    if 0 < run.train.max_steps <= run.schedule.warmup_steps:
        raise ConfigError(
            f"schedule.warmup_steps={run.schedule.warmup_steps} leaves none of "
            f"train.max_steps={run.train.max_steps}; lower it or raise train.max_steps"
        )


def _check_peft_type(run: RunConfig) -> None:
    if run.quant.name == "none" or not isinstance(run.peft, HfConfig):
        return
    if run.peft.type in READS_WEIGHT:
        raise ConfigError(
            f"peft.type={run.peft.type} with quant={run.quant.name}: its layers compute with the "
            "weights of the base themselves; use quant=none, or peft=lora"
        )


def _check_virtual_tokens(run: RunConfig) -> None:
    from_text = isinstance(run.peft, PromptConfig) and run.peft.init is PromptInit.text
    if from_text and run.model.tokenizer != "same":
        raise ConfigError(
            "peft.init=text cuts peft.init_text with the tokenizer of model.path, and "
            f"model.tokenizer={run.model.tokenizer} is another; use peft.init=vocab"
        )
    check_attention(run, run.model.attention.value)


UNMASKED = ("flash_attention_2", "flex", "flex_attention")
"""Implementations of attention, by our names and transformers', that take no masks of ours."""


def check_attention(run: RunConfig, chosen: str) -> None:
    """ConfigError where packed documents cannot see a prefix under an implementation."""
    if run.peft.name == "prefix" and run.data.packing and chosen in UNMASKED:
        raise ConfigError(
            f"peft=prefix with data.packing=true and attention by {chosen}: packed documents would "
            "not see the prefix; use model.attention=sdpa, or data.packing=false"
        )


def _check_packages(run: RunConfig) -> None:
    if run.parallel.name.startswith("zero"):
        require("deepspeed", f"parallel={run.parallel.name}")
    if run.optim.name == "adamw8bit":
        require("bitsandbytes", "optim=adamw8bit")
    if run.log.tensorboard:
        require("tensorboard", "log.tensorboard")
    if run.log.wandb:
        require("wandb", "log.wandb")


def _check_world(run: RunConfig, world_size: int) -> None:
    if run.parallel.name == "single" and world_size > 1:
        raise ConfigError(
            f"parallel=single runs in one process, launch={run.launch.name} starts {world_size}; "
            "use parallel=ddp (the model fits on one device) or parallel=fsdp"
        )
    micro, total = run.train.micro_batch_size, run.train.global_batch_size
    together = micro * world_size
    if total % together == 0:
        return
    if total % world_size == 0:
        per_rank = total // world_size
        fitting = max(size for size in range(1, min(micro, per_rank) + 1) if per_rank % size == 0)
        advice = f"train.micro_batch_size={fitting}"
    else:
        advice = f"train.global_batch_size={max(1, total // together) * together}"
    raise ConfigError(
        f"train.global_batch_size={total} is not a multiple of train.micro_batch_size={micro} "
        f"x {world_size} ranks = {together}; set {advice}"
    )


def _check_data(run: RunConfig) -> None:
    is_text = run.data.format is Format.text
    if run.objective.name == "pretrain" and not is_text:
        raise ConfigError(
            f"objective=pretrain reads plain text, data.format={run.data.format.value} holds "
            "conversations; set data.format=text or objective=sft"
        )
    if run.objective.name == "sft" and is_text:
        raise ConfigError(
            "objective=sft needs conversations, data.format=text has none; "
            "set objective=pretrain or another data.format"
        )


SHARDED = ("fsdp", "zero1", "zero2", "zero3")
"""Engines under which a rank holds pieces of what it trains, or puts it where it likes."""


def _check_speed(run: RunConfig) -> None:
    engine = run.parallel.name
    is_flat = isinstance(run.optim, AdamwConfig) and run.optim.flat is Flat.always
    if is_flat and engine in SHARDED:
        raise ConfigError(
            f"optim.flat=always with parallel={engine}, which has its own places for what is "
            "trained; use optim.flat=auto, or parallel=ddp"
        )
    cache_gib = run.quant.cache_gib if isinstance(run.quant, ByteConfig) else 0.0
    if cache_gib and engine in ("fsdp", "zero3"):
        raise ConfigError(
            f"quant.cache_gib={cache_gib:g} keeps whole weights on every rank, and "
            f"parallel={engine} cuts them to save that memory; use quant.cache_gib=0, or "
            "parallel=ddp"
        )


def _check_evaluation(run: RunConfig) -> None:
    has_eval = run.data.eval_path != "none"
    if run.train.eval_every and not has_eval:
        raise ConfigError(f"train.eval_every={run.train.eval_every} needs data.eval_path")
    if run.train.early_stopping and not run.train.eval_every:
        raise ConfigError(f"train.early_stopping={run.train.early_stopping} needs train.eval_every")
    has_answers = has_eval and run.evaluate.generate and run.objective.name == "sft"
    if run.checkpoint.best is Best.exact_match and not has_answers:
        raise ConfigError(
            "checkpoint.best=exact_match needs objective=sft, data.eval_path and "
            "evaluate.generate=true; or set checkpoint.best=loss"
        )
