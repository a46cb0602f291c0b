"""The audit behind `stageflow demo`, on made-up and on really installed distributions."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.metadata import Distribution, distribution
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from stageflow import PipelineResults, Run, RunStatus, StageState, UnifiedPipelineCancelled
from stageflow.demo import Audit, Finding, Target, audit_of, audit_pipeline, find_targets, normalised, settled
from stageflow.journal.store import open_store

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def install(
    site: Path,
    name: str,
    files: Mapping[str, str],
    *,
    version: str = "1.0",
    record: str | None = None,
    **origin: object,
) -> Path:
    """Makes up an installed distribution, as an installer would leave it, and gives its metadata directory."""
    directory = site / f"{name}-{version}.dist-info"
    directory.mkdir(parents=True)
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{directory.name}/RECORD,,", f"{name}/__pycache__/gone.pyc,,"]
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text)}")
    (directory / "RECORD").write_text("\n".join(lines) + "\n" if record is None else record)
    if origin:
        (directory / "direct_url.json").write_text(json.dumps(origin))
    return directory


def audited(site: Path) -> tuple[Audit, PipelineResults]:
    targets = find_targets([str(site)])
    results = trio.run(audit_pipeline(targets).run)
    assert settled(results, targets) == len(targets)
    return audit_of(results, targets), results


def test_files_as_they_were_installed_are_no_finding(tmp_path: Path) -> None:
    install(tmp_path, "tidy", {"tidy/__init__.py": "x = 1\n", "tidy/empty.py": ""})
    audit, results = audited(tmp_path)
    assert results.status is RunStatus.SUCCEEDED
    assert audit.clean
    assert (audit.distributions, audit.verified, audit.files, audit.bytes) == (1, 1, 2, 6)
    assert dict(results["report"]) == {"verified": 1, "files": 2, "findings": 0}


def test_missing_and_altered_files_are_findings_and_no_failures(tmp_path: Path) -> None:
    install(tmp_path, "torn", {"torn/a.py": "a", "torn/b.py": "b", "torn/c.py": "c", "torn/d/e.py": "e"})
    (tmp_path / "torn/a.py").unlink()
    (tmp_path / "torn/b.py").write_text("B")
    (tmp_path / "torn/c.py").write_text("c" * 1000)
    (tmp_path / "torn/d/e.py").unlink()
    (tmp_path / "torn/d").rmdir()
    (tmp_path / "torn/d").write_text("where the directory was")
    audit, results = audited(tmp_path)
    assert results.status is RunStatus.SUCCEEDED
    assert not audit.clean
    assert audit.failed == {}
    assert audit.findings == (
        Finding("torn", "torn/a.py", "missing", ""),
        Finding("torn", "torn/b.py", "altered", "other content"),
        Finding("torn", "torn/c.py", "altered", "1,000 bytes, not 1"),
        Finding("torn", "torn/d/e.py", "missing", ""),
    )


def test_what_cannot_be_read_fails_its_own_branch_only_and_what_was_found_is_kept(tmp_path: Path) -> None:
    install(tmp_path, "locked", {"locked/a.py": "a", "locked/b.py": "b", "locked/c.py": "c"})
    install(tmp_path, "tidy", {"tidy.py": ""})
    (tmp_path / "locked/a.py").unlink()
    (tmp_path / "locked/b.py").unlink()
    (tmp_path / "locked/b.py").mkdir()  # what root cannot read either
    audit, results = audited(tmp_path)
    assert results.status is RunStatus.PARTIAL
    assert results.records["locked: verify"].state is StageState.FAILED
    assert isinstance(results.records["locked: verify"].error, OSError)
    assert results.records["tidy: verify"].state is StageState.SUCCEEDED
    assert dict(results["report"]) == {"verified": 1, "files": 1, "findings": 0}
    assert not audit.clean
    assert audit.verified == 1
    assert list(audit.failed) == ["locked"]
    assert audit.findings == (
        Finding("locked", "locked/a.py", "missing", ""),
        Finding("locked", "locked/b.py", "unreadable", "Is a directory"),
    )


def test_a_record_that_cannot_be_read_fails_its_own_branch_only(tmp_path: Path) -> None:
    directory = install(tmp_path, "garbled", {"garbled.py": ""})
    install(tmp_path, "tidy", {"tidy.py": ""})
    (directory / "RECORD").write_bytes(b"garbled.py,sha256=\xff,0\n")
    audit, results = audited(tmp_path)
    assert results.records["garbled: read"].state is StageState.FAILED
    assert results.records["garbled: verify"].state is StageState.SKIPPED
    assert results.records["tidy: verify"].state is StageState.SUCCEEDED
    assert not audit.clean
    assert "UnicodeDecodeError" in audit.failed["garbled"]


def test_where_there_is_nothing_to_compare_with_the_branch_is_cancelled_with_the_reason(tmp_path: Path) -> None:
    bare = install(tmp_path, "bare", {"bare.py": ""})
    (bare / "RECORD").unlink()
    install(tmp_path, "linked", {"linked.pth": "/elsewhere"}, url="file:///elsewhere", dir_info={"editable": True})
    install(tmp_path, "local", {"local.py": ""}, url="file:///elsewhere", dir_info={})
    (tmp_path / "linked.pth").write_text("changed")
    audit, results = audited(tmp_path)
    assert results.status is RunStatus.PARTIAL
    assert results.records["bare: read"].state is StageState.CANCELLED
    assert results.records["linked: verify"].state is StageState.SKIPPED
    assert results.records["local: verify"].state is StageState.SUCCEEDED
    assert audit.clean
    assert audit.skipped == {"bare": "no RECORD to compare with", "linked": "editable: its files are elsewhere"}


def test_lines_of_a_record_that_say_nothing_to_check_are_no_findings(tmp_path: Path) -> None:
    install(tmp_path, "odd", {}, record='gone.py,,\nodd.py,md5=abc,1\n\n"with, comma.py",sha256=abc,\nshort\n')
    audit, _ = audited(tmp_path)
    assert audit.findings == (Finding("odd", "with, comma.py", "missing", ""),)
    assert audit.files == 1


def test_names_are_normalised_and_a_second_distribution_of_a_name_is_audited_too(tmp_path: Path) -> None:
    install(tmp_path / "first", "Some_Thing.x", {"thing.py": ""})
    install(tmp_path / "second", "some-thing-x", {"thing.py": ""}, version="2.0")
    path = [str(tmp_path / "first"), str(tmp_path / "first"), str(tmp_path / "second")]
    targets = find_targets(path)
    assert [(target.name, target.version) for target in targets] == [
        ("some-thing-x", "1.0"),
        ("some-thing-x (2)", "2.0"),
    ]
    assert normalised("Some_Thing.x") == normalised("some--thing-X") == "some-thing-x"


def test_a_distribution_without_metadata_is_named_after_its_directory(tmp_path: Path) -> None:
    (install(tmp_path, "lost", {"lost.py": ""}) / "METADATA").unlink()
    assert [(target.name, target.version) for target in find_targets([str(tmp_path)])] == [("lost", "unknown")]


def test_every_distribution_has_a_branch_of_its_own_even_a_single_one(tmp_path: Path) -> None:
    install(tmp_path, "alone", {"alone.py": ""})
    shape = audit_pipeline(find_targets([str(tmp_path)])).build().shape
    strands = {tuple(shape.names[number] for number in branch.strand) for branch in shape.branches}
    assert strands == {("environment",), ("alone: read", "alone: verify"), ("report",)}


def test_an_audit_that_is_recorded_and_read_again_is_the_same(tmp_path: Path) -> None:
    install(tmp_path, "torn", {"torn/a.py": "a", "torn/b.py": "b"})
    install(tmp_path, "linked", {}, url="file:///elsewhere", dir_info={"editable": True})
    (tmp_path / "torn/a.py").unlink()
    targets = find_targets([str(tmp_path)])

    async def recorded() -> tuple[Audit, Audit]:
        async with open_store("memory:") as store:
            first = await audit_pipeline(targets).build().run(store=store)
            # Another graph, as another process has it, which runs nothing again.
            again = await audit_pipeline(targets).build().resume(first.run_id, store=store)
        return audit_of(first, targets), audit_of(again, targets)

    first, again = trio.run(recorded)
    assert attrs.evolve(again, seconds=first.seconds) == first
    assert first.findings == (Finding("torn", "torn/a.py", "missing", ""),)


def test_a_report_is_made_of_nothing_if_nothing_is_installed(tmp_path: Path) -> None:
    audit, results = audited(tmp_path)
    assert results.status is RunStatus.SUCCEEDED
    assert audit.clean
    assert audit.distributions == 0


async def test_an_audit_that_is_cancelled_ends_within_a_file_however_large(tmp_path: Path) -> None:
    record = f"vast.bin,sha256=abc,{1 << 36}\n"
    install(tmp_path, "vast", {}, record=record)
    with (tmp_path / "vast.bin").open("wb") as file:
        file.truncate(1 << 36)  # it takes no room, but minutes to read
    targets = find_targets([str(tmp_path)])
    runs: list[Run] = []

    async def cancelled_when_it_reads() -> None:
        async with audit_pipeline(targets).build().open() as run:
            runs.append(run)
            while run.results.records["vast: verify"].state is not StageState.RUNNING:  # noqa: ASYNC110 - has no event
                await trio.sleep(0.001)
            run.cancel("seen enough")

    with pytest.raises(UnifiedPipelineCancelled), trio.fail_after(30):
        await cancelled_when_it_reads()
    assert runs[0].results.records["vast: verify"].state is StageState.CANCELLED
    audit = audit_of(runs[0].results, targets)
    assert (audit.interrupted, audit.clean, audit.verified) == (True, False, 0)


def test_an_audit_as_json_has_these_keys(tmp_path: Path) -> None:
    install(tmp_path, "torn", {"torn.py": "a"})
    (tmp_path / "torn.py").unlink()
    audit, _ = audited(tmp_path)
    found = json.loads(json.dumps(audit.as_json()))
    assert sorted(found) == [
        "bytes",
        "clean",
        "distributions",
        "environment",
        "failed",
        "files",
        "findings",
        "interrupted",
        "seconds",
        "skipped",
        "verified",
    ]
    assert found["findings"] == [{"distribution": "torn", "path": "torn.py", "problem": "missing", "detail": ""}]


def test_a_really_installed_distribution_is_clean() -> None:
    installed: Distribution = distribution("attrs")
    targets = [Target("attrs", installed.version, installed)]
    audit = audit_of(trio.run(audit_pipeline(targets).run), targets)
    assert audit.clean
    assert audit.verified == 1
    assert audit.files > 10
