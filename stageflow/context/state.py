"""`RunState`: what the contexts of all stages of one run share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stageflow.context.context import PipelineContext
    from stageflow.output import Artifact

__all__ = ["RunState"]


@final
class RunState:
    """What the contexts of all stages of one run share.

    Attributes:
        pipeline: The pipeline's name.
        run_id: The run's id.
        origin: The description the run was started with.
        started: When it began, on Trio's clock.
        deadline: When the scopes that stood around the run at that moment will cancel it, or its own deadline.
        artifacts: Every artifact so far.
        key: What stands for the run in keys of idempotency, if that is not its id.
        depth: How many runs it is nested in.
        parent: The id of the run it is nested in, or `None`.
        lent: Instead of a `Limit`, the one that stages of this run take from: a stage around it holds a token of the
            former, and lends that.
    """

    __slots__ = (
        "artifacts",
        "deadline",
        "depth",
        "key",
        "lent",
        "origin",
        "parent",
        "pipeline",
        "run_id",
        "started",
    )

    def __init__(
        self,
        *,
        pipeline: str,
        run_id: str,
        origin: PipelineContext,
        started: float,
        deadline: float,
        artifacts: list[Artifact],
    ) -> None:
        self.pipeline: str = pipeline
        self.run_id: str = run_id
        self.origin: PipelineContext = origin
        self.started: float = started
        self.deadline: float = deadline
        self.artifacts: list[Artifact] = artifacts
        self.key: str | None = None
        self.depth: int = 0
        self.parent: str | None = None
        self.lent: Mapping[Any, Any] = {}  # this layer does not know limits
