"""What is remembered of a run: the record of every stage."""

from stageflow.journal.record import Cause, CauseKind, RunStatus, StageRecord, StageState

__all__ = ["Cause", "CauseKind", "RunStatus", "StageRecord", "StageState"]
