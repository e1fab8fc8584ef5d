"""What the kernels are meant to reach, and whether they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from comparison import Result


@dataclass(frozen=True)
class Aim:
    """A number that a case should reach on every layer, or on one."""

    case: str
    wanted: float
    """At least: of the measured ceilings, or times as fast as ``against``."""
    against: str = ""
    """Beginning of the names of alternatives, the fastest of which counts; empty: the ceilings."""
    direction: str = ""
    """``forward`` or ``both``; empty for each."""
    layer: str = ""


@dataclass(frozen=True)
class Verdict:
    """An aim and what was measured."""

    aim: Aim
    layer: str
    direction: str
    got: float | None
    """None where nothing was measured."""
    why: str = ""
    """Why not."""

    @property
    def met(self) -> bool:
        """Whether it was measured, and is enough."""
        return self.got is not None and self.got >= self.aim.wanted

    def __str__(self) -> str:
        aim = self.aim
        what = f"as fast as {aim.against}" if aim.against else "of the measured ceilings"
        wanted = f"{aim.wanted:.2f} x {what}" if aim.against else f"{aim.wanted:.0%} {what}"
        head = f"{aim.case}, {self.direction}, {self.layer}: wanted {wanted}"
        if self.got is None:
            return f"{head}: not measured, {self.why}"
        got = f"{self.got:.2f} x" if aim.against else f"{self.got:.0%}"
        if self.met:
            return f"{head}: met, {got}"
        return f"{head}: missed by {1 - self.got / aim.wanted:.0%}, {got}"


AIMS = (
    Aim("dequantize nf4 nested", 0.90),
    Aim("dequantize nf4 nested", 2.0, against="bitsandbytes"),
    Aim("rms_norm", 0.85),
    Aim("rope", 0.85),
    Aim("swiglu", 0.85),
    Aim("lora linear", 1.15, against="peft", direction="both"),
    Aim("lora linear", 1 / 1.06, against="bare GEMMs", direction="both"),
    Aim("linear_cross_entropy", 1.3, against="liger", direction="both", layer="8b"),
)


def judge(results: Sequence[Result]) -> list[Verdict]:
    """Hold each aim against the results of its case; an aim without any is one that is not met."""
    verdicts = []
    for aim in AIMS:
        own = [
            result
            for result in results
            if result.case == aim.case
            and aim.direction in ("", result.direction)
            and aim.layer in ("", result.layer)
        ]
        verdicts.extend(_judge_one(aim, result) for result in own)
        if not own:
            layer, direction = aim.layer or "every layer", aim.direction or "each direction"
            verdicts.append(Verdict(aim, layer, direction, None, "the case was not run"))
    return verdicts


def _judge_one(aim: Aim, result: Result) -> Verdict:
    def verdict(got: float | None, why: str = "") -> Verdict:
        return Verdict(aim, result.layer, result.direction, got, why)

    if result.problem:
        return verdict(None, result.problem)
    if not aim.against:
        return verdict(result.share)
    names = [name for name in result.measured if name.startswith(aim.against)]
    if not names:
        why = [f"{k}: {v}" for k, v in result.left_out.items() if k.startswith(aim.against)]
        return verdict(None, "; ".join(why) or f"{aim.against} did not run here")
    return verdict(min(result.speedup(name) for name in names))
