"""The job behind ``stageflow demo``: are the installed packages still what they were when they were installed?

Every distribution has a branch of its own: `read` its RECORD, the list of its files with their sizes and hashes, then
`verify` each of them. What is wrong with a file is a finding, and no failure; what cannot be read at all fails that one
branch, and is tolerated there; where there is nothing to compare with, the branch is cancelled. A `report` comes after
all of them, whatever has become of each.

Whatever a stage gives can be kept in a store. So an audit that was killed goes on with what it had verified; and since
the versions are part of what its stages are, it does not do so with what was read of another version.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import attrs
import trio

from stageflow.journal import RunStatus, StageState
from stageflow.output import StageOutput
from stageflow.pipeline import Pipeline
from stageflow.stages import OnFailure, StageKind, optional

if TYPE_CHECKING:
    from stageflow.context import StageContext
    from stageflow.engine import PipelineResults

__all__ = ["Audit", "Finding", "Target", "audit_of", "audit_pipeline", "find_targets", "normalised", "settled"]

_ALGORITHMS = {"sha256", "sha384", "sha512"}
_CHUNK = 1 << 20  # bytes that are hashed before somebody may cancel
_READ, _VERIFY = "{}: read", "{}: verify"


@final
@attrs.frozen
class Target:
    """A distribution to audit.

    Attributes:
        name: Its normalised name; a second one of that name, further down the path, is called ``"name (2)"``.
        version: Its version, as its metadata says.
        installed: Where to find its files.
    """

    name: str
    version: str
    installed: Distribution = attrs.field(repr=False, eq=False)


@final
@attrs.frozen
class Finding:
    """A file that is not what the RECORD says.

    Attributes:
        distribution: The distribution it belongs to.
        path: The file, as the RECORD has it.
        problem: ``"missing"``, ``"altered"`` or ``"unreadable"``.
        detail: What is known of that, in words.
    """

    distribution: str
    path: str
    problem: str
    detail: str


@final
@attrs.frozen(kw_only=True)
class Audit:
    """What an audit has found.

    Attributes:
        interrupted: Whether the audit was cut short; what is said of it then is what was known by that time.
        environment: The environment that was audited.
        seconds: How long that took.
        distributions: How many distributions there are.
        verified: How many of them were verified to the last file.
        files: How many files were compared.
        bytes: How large these are together.
        findings: The files that are not what they should be.
        failed: The distributions that could not be verified to the end, each with the reason.
        skipped: Those that have nothing to compare with, each with the reason.
    """

    interrupted: bool
    environment: str
    seconds: float
    distributions: int
    verified: int
    files: int
    bytes: int
    findings: tuple[Finding, ...]
    failed: Mapping[str, str]
    skipped: Mapping[str, str]

    @property
    def clean(self) -> bool:
        """Whether everything that could be compared was, and is as it should be, and everything could be read."""
        return not self.interrupted and not self.findings and not self.failed

    def as_json(self) -> dict[str, Any]:
        """Gives it as JSON knows it; the keys are the attributes, and ``clean``."""
        return {"clean": self.clean, **attrs.asdict(self, filter=lambda field, _: field.name[0] != "_")}


def normalised(name: str) -> str:
    """Gives a distribution's name as it is compared: lower case, with single hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


def find_targets(path: Sequence[str] | None = None) -> list[Target]:
    """Finds the distributions that are installed, sorted by name.

    Args:
        path: The directories to look in; `sys.path` if left out.
    """
    found: dict[str, tuple[str, str, Distribution]] = {}
    for installed in distributions() if path is None else distributions(path=list(path)):
        where = str(getattr(installed, "_path", installed))  # a directory that is twice on the path is one
        names, versions = (installed.metadata.get_all(key) or [""] for key in ("Name", "Version"))
        name = normalised(names[0] or Path(where).name.partition("-")[0])
        found.setdefault(where, (name, versions[0] or "unknown", installed))
    targets: dict[str, Target] = {}
    for name, version, installed in found.values():
        label, count = name, 1
        while label in targets:
            count += 1
            label = f"{name} ({count})"
        targets[label] = Target(label, version, installed)
    return [targets[label] for label in sorted(targets)]


def audit_pipeline(targets: Iterable[Target], *, threads: int | None = None) -> Pipeline:
    """Declares the audit of some distributions, a branch for each.

    Args:
        targets: The distributions.
        threads: How many of them are read or verified at once; if left out, one more than there are processors.
    """
    limiter = trio.CapacityLimiter(threads or min(9, (os.cpu_count() or 1) + 1))
    # A stage's limit would count the time it waits for a thread as well.
    pipeline = Pipeline("audit", default_timeout=None).with_stage("environment", _environment)
    verified: list[str] = []
    for target in targets:
        reads, verifies = _READ.format(target.name), _VERIFY.format(target.name)
        pipeline = pipeline.with_stage(
            reads,
            partial(_read, target.version, target.installed, limiter),
            after="environment",
            on_failure=OnFailure.TOLERATE,
        ).with_stage(
            verifies,
            partial(_verify, target.name, target.installed, limiter),
            after=reads,
            kind=StageKind.GUARD,
            on_failure=OnFailure.TOLERATE,
        )
        verified.append(verifies)
    return pipeline.with_stage("report", _report, after=["environment", *map(optional, verified)])


def settled(results: PipelineResults, targets: Iterable[Target]) -> int:
    """How many of the distributions are done with, in whatever way."""
    return sum(results.records[_VERIFY.format(target.name)].state.settled for target in targets)


def audit_of(results: PipelineResults, targets: Sequence[Target]) -> Audit:
    """Reads what an audit has found out of its results, of a run that was cut short too."""
    findings: list[Finding] = []
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    files = size = verified = 0
    for target in targets:
        read, verify = (results.records[name.format(target.name)] for name in (_READ, _VERIFY))
        said = verify.partial if verify.output is None else verify.output
        findings += said.get("findings", ())
        files += said.get("files", 0)
        size += said.get("bytes", 0)
        verified += verify.state is StageState.SUCCEEDED
        for record in (read, verify):
            if record.state is StageState.FAILED:
                failed[target.name] = record.cause.reason if record.cause else ""
        if read.state is StageState.CANCELLED and read.cause is not None:
            skipped[target.name] = read.cause.reason
    trace = results.trace
    return Audit(
        interrupted=results.status not in {RunStatus.SUCCEEDED, RunStatus.PARTIAL},
        environment=sys.prefix,
        seconds=0.0 if trace.ended is None else trace.ended - trace.started,
        distributions=len(targets),
        verified=verified,
        files=files,
        bytes=size,
        findings=tuple(findings),
        failed=failed,
        skipped=skipped,
    )


# The stages


async def _environment(_: StageContext) -> StageOutput:
    await trio.lowlevel.checkpoint()
    return StageOutput.ok(prefix=sys.prefix, python=sys.version.split()[0])


async def _read(version: str, installed: Distribution, limiter: trio.CapacityLimiter, _: StageContext) -> StageOutput:
    return await trio.to_thread.run_sync(_recorded_in, version, installed, limiter=limiter)


async def _verify(name: str, installed: Distribution, limiter: trio.CapacityLimiter, ctx: StageContext) -> StageOutput:
    recorded = ctx.inputs[_READ.format(name)]["recorded"]
    return await trio.to_thread.run_sync(_compare_all, name, installed, recorded, limiter=limiter)


async def _report(ctx: StageContext) -> StageOutput:
    await trio.lowlevel.checkpoint()
    said = [output for name, output in ctx.inputs.items() if name != "environment"]
    findings = sum(len(output["findings"]) for output in said)
    return StageOutput.ok(verified=len(said), files=sum(output["files"] for output in said), findings=findings)


# What they do in their threads


def _recorded_in(version: str, installed: Distribution) -> StageOutput:
    if _is_editable(installed):
        return StageOutput.cancel_branch("editable: its files are elsewhere")
    text = _text_of_record(installed)
    if text is None:
        return StageOutput.cancel_branch("no RECORD to compare with")
    recorded: list[list[str | int | None]] = []  # path, algorithm, digest and size: thousands, so not a class for each
    for row in csv.reader(io.StringIO(text, newline="")):
        path, entry, size = (*row, "", "", "")[:3]
        algorithm, _, digest = entry.partition("=")
        if algorithm in _ALGORITHMS:  # the RECORD itself and compiled files have no hash
            recorded.append([path, algorithm, digest, int(size) if size.isdecimal() else None])
    return StageOutput.ok(version=version, recorded=recorded)


def _is_editable(installed: Distribution) -> bool:
    origin = installed.read_text("direct_url.json")
    return bool(origin and json.loads(origin).get("dir_info", {}).get("editable"))


def _text_of_record(installed: Distribution) -> str | None:
    # `Distribution.read_text` gives None for a RECORD that is there but cannot be read, as for one that is not there.
    directory = getattr(installed, "_path", None)
    if isinstance(directory, Path) and (directory / "RECORD").exists():
        return (directory / "RECORD").read_text("utf-8")
    return installed.read_text("RECORD")


def _compare_all(
    name: str, installed: Distribution, recorded: Sequence[tuple[str, str, str, int | None]]
) -> StageOutput:
    findings: list[Finding] = []
    unreadable: OSError | None = None
    size = 0
    for path, algorithm, digest, expected in recorded:
        trio.from_thread.check_cancelled()
        try:
            problem, detail, length = _compare(Path(str(installed.locate_file(path))), algorithm, digest, expected)
        except OSError as error:
            unreadable = unreadable or error
            problem, detail, length = "unreadable", error.strerror or type(error).__name__, 0
        size += length
        if problem:
            findings.append(Finding(name, path, problem, detail))
    if unreadable is None:
        return StageOutput.ok(files=len(recorded), bytes=size, findings=findings)
    return StageOutput.fail(unreadable, files=len(recorded), bytes=size, findings=findings)


def _compare(path: Path, algorithm: str, recorded: str, expected: int | None) -> tuple[str, str, int]:
    """Gives what is wrong with a file, that in words, and how large it is."""
    digest = hashlib.new(algorithm)
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if expected is not None and size != expected:
                return "altered", f"{size:,} bytes, not {expected:,}", size
            while chunk := file.read(_CHUNK):
                trio.from_thread.check_cancelled()
                digest.update(chunk)
    except (FileNotFoundError, NotADirectoryError):
        return "missing", "", 0
    if base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode() != recorded.rstrip("="):
        return "altered", "other content", size
    return "", "", size
