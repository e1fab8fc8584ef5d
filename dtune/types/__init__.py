"""The seams: what components hand to each other. Components import this, never each other."""

from dtune.types.batch import (
    IGNORE_INDEX,
    Batch,
    Example,
    LossParts,
    Message,
    Objective,
    Row,
)
from dtune.types.engine import (
    Engine,
    EngineState,
    FlatShard,
    OptimizerFactory,
    ScheduleFactory,
)
from dtune.types.model import (
    LOSS_LABELS,
    NUM_DOCUMENTS,
    NUM_TARGETS,
    FusesLoss,
    ModelSpec,
    Renamer,
    Role,
    TensorSource,
    innermost,
)
from dtune.types.surgery import (
    InjectReport,
    PeftMethod,
    Quantizer,
    TakesPartInSteps,
)

__all__ = [
    "IGNORE_INDEX",
    "LOSS_LABELS",
    "NUM_DOCUMENTS",
    "NUM_TARGETS",
    "Batch",
    "Engine",
    "EngineState",
    "Example",
    "FlatShard",
    "FusesLoss",
    "InjectReport",
    "LossParts",
    "Message",
    "ModelSpec",
    "Objective",
    "OptimizerFactory",
    "PeftMethod",
    "Quantizer",
    "Renamer",
    "Role",
    "Row",
    "ScheduleFactory",
    "TakesPartInSteps",
    "TensorSource",
    "innermost",
]
