"""What a user declares: stages, and the values that say how they are run."""

from stageflow.stages.policy import DEFAULT, Default, Dependency, Join, OnFailure, StageKind, optional
from stageflow.stages.runner import Body, name_of
from stageflow.stages.stage import Runner, Stage, StageFunction, StageOptions, StageSpec, caller, declare, stage

__all__ = [
    "DEFAULT",
    "Body",
    "Default",
    "Dependency",
    "Join",
    "OnFailure",
    "Runner",
    "Stage",
    "StageFunction",
    "StageKind",
    "StageOptions",
    "StageSpec",
    "caller",
    "declare",
    "name_of",
    "optional",
    "stage",
]
