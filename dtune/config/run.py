"""The whole config of a run: one typed tree, closed at every level."""

from __future__ import annotations

from dataclasses import dataclass, field

from dtune_launch.schema import launchers
from dtune_launch.spec import LaunchConfig
from omegaconf import MISSING

from dtune.checkpoint.schema import CheckpointConfig
from dtune.data.schema import DataConfig
from dtune.errors import ConfigError
from dtune.evaluate.schema import EvaluateConfig
from dtune.models.schema import ModelConfig
from dtune.objectives.schema import OBJECTIVES, ObjectiveConfig
from dtune.optim.schema import OPTIM, OptimConfig
from dtune.optim.schema.schedule import ScheduleConfig
from dtune.parallel.schema import PARALLEL, ParallelConfig
from dtune.patch.schema import KernelsConfig
from dtune.peft.schema import PEFT, PeftConfig
from dtune.quant.schema import QUANT, QuantConfig
from dtune.registry import Registry
from dtune.runtime.schema import LogConfig, PrecisionConfig
from dtune.runtime.watch.schema import WatchConfig
from dtune.train.guard_schema import GuardConfig
from dtune.train.schema import TrainConfig

LAUNCH: Registry[LaunchConfig] = Registry("launch", LaunchConfig, "dtune_launch.schema")
# They know the standard library only, and so not how to register.
for _launcher in launchers().values():
    LAUNCH.register(_launcher)

POLYMORPHIC: dict[
    str,
    Registry[QuantConfig]
    | Registry[PeftConfig]
    | Registry[ParallelConfig]
    | Registry[ObjectiveConfig]
    | Registry[OptimConfig]
    | Registry[LaunchConfig],
] = {
    "quant": QUANT,
    "peft": PEFT,
    "parallel": PARALLEL,
    "objective": OBJECTIVES,
    "optim": OPTIM,
    "launch": LAUNCH,
}
"""Groups whose keys depend on the chosen option."""


@dataclass
class RunConfig:
    """Everything that decides a run."""

    # Folder of the run. It must be empty or absent unless the run is resumed.
    run_dir: str = "runs/${model.name}-${peft.name}-${now:%Y%m%d-%H%M%S}"
    # false: start anew; auto: go on from the newest checkpoint in run_dir if there is one; a path.
    resume: str = "false"
    # Seed of initial values, order of data and dropout.
    seed: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = MISSING
    peft: PeftConfig = MISSING
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    parallel: ParallelConfig = MISSING
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    objective: ObjectiveConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = MISSING
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    launch: LaunchConfig = MISSING

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise ConfigError("run_dir is empty; name the folder of the run")
        if self.resume.lower() == "false":
            # The command line's false is a boolean, which arrives here as "False".
            self.resume = "false"
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be 0 or more")
