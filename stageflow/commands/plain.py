"""What is printed with ``--json``: runs, traces, plans and values as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stageflow.engine import PipelineResults
    from stageflow.journal import StageRecord
    from stageflow.journal.plan import ResumePlan
    from stageflow.journal.store import RunInfo
    from stageflow.journal.undo import CompensationRecord
    from stageflow.trace import Trace

__all__ = ["plain", "plain_info", "plain_plan", "plain_results", "plain_trace"]


def plain_results(results: PipelineResults) -> dict[str, Any]:
    """Gives the results of a run: its trace, and the outputs."""
    outputs = {name: plain(output.data) for name, output in results.items()}
    return {**plain_trace(results.trace), "outputs": outputs}


def plain_trace(trace: Trace) -> dict[str, Any]:
    """Gives a trace: the run, and of every stage how it is, why, how often it was tried and how long it took."""
    return {
        "run_id": trace.run_id,
        "pipeline": trace.shape.pipeline,
        "status": trace.status.value,
        "began_at": trace.began_at.isoformat(),
        "duration": None if trace.ended is None else trace.ended - trace.started,
        "records": {record.name: _plain_record(record) for record in trace.records},
        "compensation": None if trace.compensation is None else _plain_compensation(trace.compensation),
    }


def _plain_compensation(record: CompensationRecord) -> dict[str, Any]:
    undos = {
        name: {"state": undo.state.value, "attempts": undo.attempts, "reason": undo.reason}
        for name, undo in record.undos.items()
    }
    return {"status": record.status.value, "undos": undos}


def _plain_record(record: StageRecord) -> dict[str, Any]:
    cause = record.cause
    return {
        "state": record.state.value,
        "branch": record.branch,
        "attempts": record.attempts,
        "duration": record.duration,
        "cause": None if cause is None else {"kind": cause.kind.value, "stage": cause.stage, "reason": cause.reason},
    }


def plain_info(info: RunInfo) -> dict[str, Any]:
    """Gives a run as it is listed."""
    return {
        "run_id": info.run_id,
        "pipeline": info.pipeline,
        "tenant": info.tenant,
        "status": info.status.value,
        "held": info.held,
        "began_at": info.began_at.isoformat(),
        "changed_at": info.changed_at.isoformat(),
        "recoveries": info.recoveries,
        "base": info.base,
        "compensation": None if info.compensation is None else info.compensation.value,
        "stages": dict(info.stages),
    }


def plain_plan(plan: ResumePlan) -> dict[str, Any]:
    """Gives what resuming a run would do."""
    steps = {
        name: {
            "action": step.action.value,
            "reason": step.reason,
            "changed": list(step.changed),
            "blocks": step.blocks,
        }
        for name, step in plan.steps.items()
    }
    return {"run_id": plan.run_id, "pipeline": plan.pipeline, "over": plan.over, "steps": steps}


def plain(value: Any) -> Any:
    """Gives a value as JSON knows it; of what it does not know, what `repr` says."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    items: Any = value
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): plain(part) for key, part in items.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in items]
    return repr(value)
