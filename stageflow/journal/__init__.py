"""What is remembered of a run: the record of every stage."""

from stageflow.journal.record import Attempt, Cause, CauseKind, Details, RunStatus, StageRecord, StageState

__all__ = ["Attempt", "Cause", "CauseKind", "Details", "RunStatus", "StageRecord", "StageState"]
