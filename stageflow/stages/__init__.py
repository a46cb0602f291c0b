"""What a user declares: stages, and the values that say how they are run."""

from stageflow.stages.interceptor import Interceptor, Proceed
from stageflow.stages.limit import Limit
from stageflow.stages.options import StageOptions, caller, declare, stage
from stageflow.stages.policy import DEFAULT, Default, Dependency, Join, OnFailure, StageKind, optional
from stageflow.stages.runner import Body, name_of
from stageflow.stages.settings import Settings
from stageflow.stages.stage import Runner, Stage, StageFunction, StageSpec

__all__ = [
    "DEFAULT",
    "Body",
    "Default",
    "Dependency",
    "Interceptor",
    "Join",
    "Limit",
    "OnFailure",
    "Proceed",
    "Runner",
    "Settings",
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
