"""`PipelineResults`: what one holds in hand, whatever has ended a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, final

from stageflow.engine.collector import Collector, Records
from stageflow.errors import TenantMismatchError
from stageflow.output import Artifact, StageOutput

if TYPE_CHECKING:
    from stageflow.journal import RunStatus, StageRecord
    from stageflow.journal.undo import CompensationRecord
    from stageflow.trace import Trace

__all__ = ["PipelineResults"]


@final
class PipelineResults(Mapping[str, StageOutput]):
    """The outputs of the stages that succeeded, by name, and a record of every stage.

    It is one and the same thing on every way out of a run: what `StageGraph.run` returns, what its errors carry as
    `results`, and what `Run.results` shows while the run still goes. Outputs come in the order in which their stages
    ended. It pickles if outputs and errors do.
    """

    __slots__ = ("_collector",)

    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self._collector.run_id

    @property
    def tenant(self) -> str | None:
        """On whose behalf the run went."""
        return self._collector.tenant

    def visible_to(self, tenant: str | None) -> PipelineResults:
        """Gives the results themselves, to the tenant on whose behalf the run went.

        Raises:
            TenantMismatchError: It was another tenant's.
        """
        if tenant != self._collector.tenant:
            raise TenantMismatchError(f"run {self.run_id}", tenant=tenant, owner=self._collector.tenant)
        return self

    @property
    def status(self) -> RunStatus:
        """How the run ended; `RunStatus.RUNNING` until it has."""
        return self._collector.status

    @property
    def records(self) -> Mapping[str, StageRecord]:
        """All that is known of every stage, by name, in topological order."""
        return Records(self._collector)

    @property
    def partial(self) -> Mapping[str, Mapping[str, Any]]:
        """What stages that did not succeed (yet) had saved, by stage."""
        records = (record for record in self._collector.slots if record is not None)
        return {record.name: record.partial for record in records if record.partial and record.output is None}

    @property
    def children(self) -> Mapping[str, tuple[PipelineResults, ...]]:
        """The results of the runs that stages have made within themselves, by stage; live while they go."""
        records = (record for record in self._collector.slots if record is not None)
        return {record.name: record.details.children for record in records if record.details.children}

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The artifacts that came with the run and those that stages added, in that order."""
        return tuple(self._collector.artifacts)

    @property
    def compensation(self) -> CompensationRecord | None:
        """What was undone of the run, stage by stage, and what was not; `None` if there was nothing to undo."""
        return self._collector.compensation

    @property
    def trace(self) -> Trace:
        """The records as something one looks at, with ``rich.print(results.trace)``."""
        # Neither is needed by those who do not look.
        from datetime import UTC, datetime

        from stageflow.trace import Trace

        collector = self._collector
        return Trace(
            shape=collector.shape,
            run_id=collector.run_id,
            status=collector.status,
            records=tuple(collector.record(number) for number in range(len(collector.slots))),
            began_at=datetime.fromtimestamp(collector.began_at, UTC),
            started=collector.started,
            ended=collector.ended,
            compensation=collector.compensation,
        )

    def require(self, name: str) -> StageOutput:
        """Gives an output that has to be there; the same as ``results[name]``.

        Raises:
            MissingOutputError: It is not there; the error says why.
        """
        return self[name]

    def __getitem__(self, name: str) -> StageOutput:
        try:
            return self._collector.output(name)
        except KeyError:
            raise self._collector.missing(name) from None

    def __contains__(self, name: object) -> bool:
        return name in self._collector.succeeded

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._collector.succeeded))  # more may come while one reads

    def __len__(self) -> int:
        return len(self._collector.succeeded)

    def __repr__(self) -> str:
        collector = self._collector
        return (
            f"<PipelineResults of {collector.shape.pipeline!r}, {collector.status.value}: "
            f"{len(self)} of {len(collector.slots)} stages succeeded>"
        )
