"""CONTRACT-002: added, removed, retyped and renamed fields, nested too: found at build, named by path."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from stageflow import Breaks, ContractViolation, DefinitionError, Pipeline, compatibility
from tests.stages import FAILED, OK, gives, results_of, returns, states

PRODUCERS, CONSUMERS, STORED = Breaks.PRODUCERS, Breaks.CONSUMERS, Breaks.STORED


@attrs.frozen
class Author:
    name: str


@attrs.frozen
class Page:
    title: str
    author: Author


@attrs.frozen
class Doc:
    pages: list[Page]


@attrs.frozen
class AuthorWithAge:
    name: str
    age: int


@attrs.frozen
class AuthorWithDefault:
    name: str
    age: int = 0


@attrs.frozen
class Nobody:
    __extra_fields__ = "forbid"


@attrs.frozen
class NumberedAuthor:
    name: int


@attrs.frozen
class RenamedAuthor:
    called: str


def doc_of(author: Any) -> Any:
    """A document as above, but of other authors."""
    page = attrs.make_class("Page", {"title": attrs.field(type=str), "author": attrs.field(type=author)})
    return attrs.make_class("Doc", {"pages": attrs.field(type=list[page])})  # type: ignore[valid-type]


PATH = "doc.pages[].author"
CHANGES: dict[str, tuple[Any, dict[str, Breaks], str | None, Any]] = {
    # the new author: what is different, what a stage that wants it says of one that gives the old, and stored data
    "added": (
        AuthorWithAge,
        {f"{PATH}.age": PRODUCERS | STORED},
        "age: there is no such field",
        {"name": "x"},
    ),
    "added with a default": (AuthorWithDefault, {f"{PATH}.age": Breaks(0)}, "age: there is no such field", None),
    "removed": (Nobody, {f"{PATH}.name": PRODUCERS | CONSUMERS | STORED}, None, {"name": "x"}),
    "retyped": (
        NumberedAuthor,
        {f"{PATH}.name": PRODUCERS | CONSUMERS | STORED},
        "name: gives str, wanted int",
        {"name": "x"},
    ),
    "renamed": (
        RenamedAuthor,
        {f"{PATH}.name": PRODUCERS | CONSUMERS | STORED, f"{PATH}.called": PRODUCERS | STORED},
        "called: there is no such field",
        {"name": "x"},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_found_in_what_is_nested_with_whom_it_breaks(change: str) -> None:
    author, expected, _, _ = CHANGES[change]
    found: dict[str, Breaks] = {}
    for difference in compatibility(Doc, doc_of(author), root="doc"):
        found[difference.path] = found.get(difference.path, Breaks(0)) | difference.breaks
    assert found == expected


@pytest.mark.parametrize("change", CHANGES)
def test_between_stages_it_is_found_at_build(change: str) -> None:
    author, _, problem, _ = CHANGES[change]

    async def show(doc: object, other: int = 0) -> None: ...

    show.__annotations__["doc"] = doc_of(author)
    consumer: Any = show
    pipeline = Pipeline("p").with_stage("doc", gives(), output=Doc).with_stage("show", consumer)
    if problem is None:
        pipeline.build()
        return
    with pytest.raises(DefinitionError) as caught:
        pipeline.build()
    assert f"\n  doc.pages[].author.{problem}\n" in str(caught.value)


@pytest.mark.parametrize("change", CHANGES)
async def test_what_is_stored_is_refused_exactly_if_that_was_said(change: str) -> None:
    author, expected, _, _ = CHANGES[change]
    stored = {"pages": [{"title": "t", "author": {"name": "x"}}]}
    breaks = any(STORED in whom for whom in expected.values())
    results = await results_of(Pipeline("p").with_stage("doc", returns(stored), output=doc_of(author)))
    assert states(results) == {"doc": FAILED if breaks else OK}
    error = results.records["doc"].error
    if breaks:
        assert isinstance(error, ContractViolation)
        assert all(fault.path.startswith("doc.pages[0].author") for fault in error.faults)
