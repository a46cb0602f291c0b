"""CONTRACT-008: a derived contract is accepted where its base is, and refused if it is weaker than that."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from stageflow import DefinitionError, Pipeline
from tests.stages import gives, returns


@attrs.frozen(kw_only=True)
class Page:
    title: str
    author: str | None


@attrs.frozen(kw_only=True)
class SignedPage(Page):
    author: str
    signature: str = ""


@attrs.frozen(kw_only=True)
class Undersigned(SignedPage):
    """Two levels below."""


@attrs.frozen(kw_only=True)
class Untitled(Page):
    title: str | None  # type: ignore[assignment]  # pyright: ignore[reportIncompatibleVariableOverride]


@attrs.frozen(kw_only=True)
class Numbered(Page):
    title: int  # type: ignore[assignment]  # pyright: ignore[reportIncompatibleVariableOverride]


async def show_page(page: Page) -> str:
    return page.title


async def show_signed(page: SignedPage) -> str:
    return page.author


TAKES_PAGE: Any = show_page
TAKES_SIGNED: Any = show_signed


@pytest.mark.parametrize("kind", [Page, SignedPage, Undersigned])
async def test_a_derived_contract_is_accepted_where_its_base_is(kind: type[Page]) -> None:
    page = kind(title="t", author="a")
    # Between stages, by whoever declared the base, and within what holds the base.
    pipeline = Pipeline("p").with_stage("page", returns(page), output=kind).with_stage("show", TAKES_PAGE)
    results = await pipeline.run()
    assert results["page"].data is page
    assert results["show"].data == "t"
    for declared, value in ((Page, page), (list[Page], [page]), (Page | None, page)):
        output = (await Pipeline("p").with_stage("a", returns(value), output=declared).run())["a"].data
        assert (output[0] if isinstance(output, list) else output) is page
    await Pipeline("p", inputs=Page).with_stage("a", gives()).run(page)


def test_the_base_is_not_accepted_where_the_derived_one_is_wanted() -> None:
    pipeline = Pipeline("p").with_stage("page", gives(), output=Page).with_stage("show", TAKES_SIGNED)
    with pytest.raises(DefinitionError) as caught:
        pipeline.build()
    lines = str(caught.value).splitlines()
    assert "  page.author: gives None, wanted str" in lines
    assert "  page.signature: there is no such field" in lines


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (Untitled, "Untitled.title is weaker than in Page, which Untitled derives from: gives None, wanted str"),
        (Numbered, "Numbered.title is weaker than in Page, which Numbered derives from: gives int, wanted str"),
    ],
)
def test_a_derived_contract_that_is_weaker_than_its_base_is_a_definition_error(kind: Any, problem: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        Pipeline("p").with_stage("page", gives(), output=kind)
    assert str(caught.value) == f"output= of stage 'page': {problem}; narrow it, or derive from something else"
    with pytest.raises(DefinitionError) as caught:
        Pipeline("p", inputs=dict[str, kind])
    assert str(caught.value) == f"inputs= of the pipeline: {problem}; narrow it, or derive from something else"

    async def typed() -> object: ...

    typed.__annotations__["return"] = kind
    function: Any = typed
    with pytest.raises(DefinitionError) as caught:
        Pipeline("p", stages=[function])
    assert problem in str(caught.value)
