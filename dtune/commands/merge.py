"""``dtune merge``: an adapter merged into its base, compared with it, and published if equal."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtune.commands.own import Command, split_settings
from dtune.commands.schema import MergeSettings
from dtune.commands.trained import UNUSED, WHY_UNUSED, Trained, choose_trained, one_process
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.evaluate.adapter_files import AdapterFiles, read_adapter
from dtune.runtime.capabilities import require
from dtune.runtime.files import published_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from dtune.evaluate.compare import Bounds, Difference
    from dtune.inference import Inference
    from dtune.runtime.world import World
    from dtune.types import Example

COMMAND = Command(
    name="dtune merge",
    usage="""dtune merge run_dir=RUN out=FOLDER [settings]: a run's adapter merged into its base.
dtune merge adapter=FOLDER model.path=BASE out=FOLDER: any adapter in PEFT's layout.""",
    own=MergeSettings,
    unused=UNUSED,
    why_unused=WHY_UNUSED,
    examples="""What is written is read again and compared with the base and its adapter, on rows of
data.eval_path (a built-in text without). Nothing is published above the bounds.""",
)


def run(argv: list[str]) -> int:
    """Merge, compare, publish."""
    if COMMAND.asks_help(argv):
        sys.stdout.write(COMMAND.help())
        return 0
    own, settings = split_settings(argv, MergeSettings, COMMAND)
    trained = choose_trained(own.run_dir, own.export, settings)
    if trained is None:
        return 0
    files = _check(own, trained)
    check_run(trained.config, 1)
    with one_process() as world:
        _Merging(own, trained, files, world).run()
    return 0


def _check(own: MergeSettings, trained: Trained) -> AdapterFiles:
    """What can be said before torch is imported."""
    out = Path(own.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={own.out} exists and is not empty; name another folder")
    if own.run_dir and trained.config.peft.exports_model:
        where = trained.exported or trained.config.model.path
        raise ConfigError(
            f"peft={trained.config.peft.name} trains weights of the base itself: the run's model "
            f"is whole already, at {where}"
        )
    if own.quantize != "none":
        require("bitsandbytes", f"quantize={own.quantize}")
    if own.run_dir:
        files = read_adapter(str(trained.exported), key="run_dir")
    else:
        files = read_adapter(own.adapter, key="adapter")
    if why := files.why_not_merged:
        raise ConfigError(
            f"{files.folder} is an adapter of type {files.kind}, which cannot be merged into "
            f"weights: {why}; use it as it is, with dtune chat or dtune generate"
        )
    return files


@dataclass
class _Merging:
    """One merge."""

    own: MergeSettings
    trained: Trained
    files: AdapterFiles
    world: World

    def run(self) -> None:
        """Reference -> merge -> write -> read again -> compare -> publish."""
        from dtune.inference import assemble_inference, check_adapters

        config = self.trained.config
        same_base = self.own.check_base and not self.own.run_dir
        check_adapters(config, {"it": self.files}, same_base=same_base)
        parts = assemble_inference(config, self.world)
        examples = self._examples(parts)
        reference, merged, moved = self._merge(parts, examples)
        dtype = self._dtype(parts)
        bounds = self._bounds(parts, dtype)
        out = Path(self.own.out).expanduser()
        with published_folder(out) as temporary:
            record = self._write(parts, merged, temporary, dtype, examples, reference, bounds)
            record["adapter_moves_logits"] = moved
            if moved < 4 * record["difference"]["mean"] / record["difference"]["spread"]:
                _say(
                    f"the adapter moves logits by only {moved:.2g} of their standard deviation, "
                    "which rounding hides in part: dtype=fp32 keeps more of it"
                )
            text = json.dumps({**self._facts(parts), **record}, indent=1) + "\n"
            (temporary / "merge.json").write_text(text, encoding="utf-8")
        _say(f"merged model in {out}")

    def _examples(self, parts: Inference) -> list[Example]:
        from dtune.evaluate.compare import cut_examples
        from dtune.inference import rows_to_compare

        return cut_examples(rows_to_compare(parts, self.own.rows))

    def _dtype(self, parts: Inference) -> torch.dtype:
        import torch

        named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        spec = parts.built.spec
        stored = spec.stored_dtype or torch.float32
        return named.get(self.own.dtype, stored)

    def _bounds(self, parts: Inference, dtype: torch.dtype) -> Bounds:
        from dataclasses import replace

        from dtune.build import STORAGE
        from dtune.evaluate.compare import Bounds

        config = parts.built.spec.config.get_text_config()
        bounds = Bounds.of_rounding(
            [dtype, STORAGE[parts.run.precision.name]],
            num_layers=config.num_hidden_layers,
            width=config.hidden_size,
            perplexity_ratio=self.own.max_perplexity_ratio or 1.02,
        )
        if given := self.own.max_logit_difference:
            bounds = replace(bounds, mean=given, largest=16 * given)
        return bounds

    def _merge(
        self, parts: Inference, examples: list[Example]
    ) -> tuple[list[torch.Tensor], PreTrainedModel, float]:
        """Logits of the base with its adapter, the merged model in fp32, how far the two move."""
        import torch
        from transformers import PreTrainedModel

        from dtune.evaluate.adapters import load_adapter
        from dtune.evaluate.compare import compare_logits, logits_of
        from dtune.inference import load_float_base
        from dtune.train.merge import merge_into_base, untie_if_touched

        reference: list[torch.Tensor] = []
        if self.own.run_dir:
            engine = parts.load(self.world, self.trained.exported)
            reference = logits_of(engine.module, examples, self.world.device, engine.compute)
            del engine
            gc.collect()
        cpu = torch.device("cpu")
        base = load_float_base(parts, dtype=torch.float32, device=cpu)
        assert isinstance(base, PreTrainedModel), type(base)
        before = logits_of(base, examples, cpu)
        untie_if_touched(base, self.files.shapes)
        wrapped = load_adapter(base, self.files)
        if not reference:
            reference = logits_of(wrapped, examples, cpu)
        moved = compare_logits(examples, reference, before).relative_mean
        return reference, merge_into_base(wrapped, kind=self.files.kind), moved

    def _write(
        self,
        parts: Inference,
        merged: PreTrainedModel,
        folder: Path,
        dtype: torch.dtype,
        examples: list[Example],
        reference: list[torch.Tensor],
        bounds: Bounds,
    ) -> dict[str, Any]:
        from dataclasses import replace

        from dtune.train.merge import quantize_written, save_merged

        quantize = self.own.quantize
        floats = folder / "float" if quantize != "none" else folder
        save_merged(merged, parts.tokenizer, floats, dtype)
        found = self._compare(floats, examples, reference)
        self._judge("merged", found, bounds)
        record: dict[str, Any] = {"difference": asdict(found), "bounds": asdict(bounds)}
        if quantize != "none":
            quantize_written(floats, folder, parts.tokenizer, quantize)
            shutil.rmtree(floats)
            found = self._compare(folder, examples, reference)
            infinite = float("inf")
            ratio = self.own.max_perplexity_ratio or 1.25
            bounds = replace(bounds, mean=infinite, largest=infinite, perplexity_ratio=ratio)
            self._judge(f"merged, then {quantize}", found, bounds)
            record["quantized"] = {"difference": asdict(found), "max_perplexity_ratio": ratio}
        return record

    def _compare(
        self, folder: Path, examples: list[Example], reference: list[torch.Tensor]
    ) -> Difference:
        """What was written, as others read it, against the base with its adapter."""
        from dtune.evaluate.compare import compare_logits, logits_of
        from dtune.train.merge import load_written

        model = load_written(folder, self.world.device)
        return compare_logits(examples, reference, logits_of(model, examples, self.world.device))

    def _judge(self, what: str, found: Difference, bounds: Bounds) -> None:
        """Print both numbers; ConfigError where a bound is broken, and nothing is published."""
        _say(
            f"{what} against base with adapter: logits differ by {found.mean:.3g} on average, "
            f"{found.largest:.3g} at most ({found.relative_mean:.2g} and "
            f"{found.relative_largest:.2g} of their standard deviation; bounds "
            f"{bounds.mean:.2g} and {bounds.largest:.2g}); perplexity {found.perplexity:.4f} "
            f"against {found.reference_perplexity:.4f}"
        )
        broken = bounds.broken_by(found)
        if broken:
            raise ConfigError(
                f"{what}: {'; '.join(broken)}. Nothing was published. The merged model is not "
                "what was trained; if it is near enough for you, raise max_logit_difference or "
                "max_perplexity_ratio, or write it more exactly with dtype=fp32"
            )

    def _facts(self, parts: Inference) -> dict[str, Any]:
        config = self.trained.config
        return {
            "base": config.model.path,
            "adapter": str(self.files.folder),
            "peft_type": self.files.kind,
            "trained_against": f"quant={config.quant.name}",
            "dtype": str(self._dtype(parts)).removeprefix("torch."),
            "quantize": self.own.quantize,
        }


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
