"""What a graph looks like, in the terminal and as a Mermaid flowchart."""

from __future__ import annotations

import io
import re
import textwrap

import pytest
from rich.console import Console

from stageflow import Join, Pipeline, StageContext, optional
from tests.stages import chain, fan, gives


def drawn(pipeline: Pipeline, width: int = 80, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    Console(file=file, width=width, force_terminal=False, color_system=None).print(pipeline.build())
    file.seek(0)
    return file.read()


def picture(text: str) -> str:
    return textwrap.dedent(text).lstrip("\n")


def is_high(ctx: StageContext) -> bool:
    return True


def orders() -> Pipeline:
    return (
        Pipeline("orders")
        .with_stage("fetch", gives(), kind="work", timeout=5)
        .with_stage("check", gives(), kind="guard", after="fetch")
        .with_stage("route", gives(), kind="route", after="check")
        .with_stage("high", gives(), after="route", when=is_high)
        .with_stage("audit", gives(), after="high", on_failure="tolerate")
        .with_stage("low", gives(), after="route", when=lambda ctx: False)
        .with_stage("enrich", gives(), kind="enrich", after="route", timeout=None)
        .with_stage("merge", gives(), after=["audit", "low", optional("enrich")], join="any_settled")
        .with_stage("note", gives(), after="fetch")
        .with_stage("done", gives(), after=["merge", "note"], join=Join.n_of(1))
    )


# In the terminal


def test_a_graph_shows_its_branches_and_what_does_not_go_without_saying() -> None:
    assert drawn(orders()) == picture("""
        orders
        10 stages in 8 branches
        unless a stage says otherwise: timeout 30 s, on failure fail_fast

        fetch         work       timeout 5 s
        ├─ check      guard      after fetch
        │  route      route      after check
        │  ├─ high    transform  after route · when is_high
        │  │  audit   transform  after high · on failure tolerate
        │  ├─ low     transform  after route · when a condition holds
        │  ├─ enrich  enrich     after route · no timeout
        │  └─ merge   transform  after audit, low, optional enrich · join any_settled
        ├─ note       transform  after fetch
        └─ done       transform  after merge, note · join n_of 1
    """)


def test_what_does_not_fit_goes_on_below_its_column() -> None:
    assert drawn(orders(), width=56).splitlines()[5:] == [
        "fetch         work       timeout 5 s",
        "├─ check      guard      after fetch",
        "│  route      route      after check",
        "│  ├─ high    transform  after route · when is_high",
        "│  │  audit   transform  after high",
        "│  │                     on failure tolerate",
        "│  ├─ low     transform  after route",
        "│  │                     when a condition holds",
        "│  ├─ enrich  enrich     after route · no timeout",
        "│  └─ merge   transform  after audit, low, optional",
        "│                        enrich",
        "│                        join any_settled",
        "├─ note       transform  after fetch",
        "└─ done       transform  after merge, note · join n_of 1",
    ]


def test_a_thousand_branches_fold() -> None:
    assert drawn(fan(1000)) == picture("""
        fan
        1,002 stages in 1,002 branches
        unless a stage says otherwise: timeout 30 s, on failure fail_fast

        root     transform
        ├─ b0    transform  after root
        ├─ b1    transform  after root
        ├─ b2    transform  after root
        ├─ join  transform  after b0, b1, b2, b3, b4 and 995 more
        └─ … 997 more
    """)


def test_a_chain_of_10_000_folds_in_its_middle() -> None:
    assert drawn(chain(10_000)) == picture("""
        chain
        10,000 stages in 1 branch
        unless a stage says otherwise: timeout 30 s, on failure fail_fast

        s0     transform
        s1     transform  after s0
        … 9,996 more
        s9998  transform  after s9997
        s9999  transform  after s9998
    """)


def test_what_a_pipeline_says_for_all_of_its_stages_is_said_once() -> None:
    pipeline = (
        Pipeline("defaults", on_failure="isolate", default_timeout=None)
        .with_stage("one", gives(), timeout=None, on_failure="isolate")
        .with_stage("two", gives(), after="one", timeout=0.5)
    )
    assert drawn(pipeline) == picture("""
        defaults
        2 stages in 1 branch
        unless a stage says otherwise: timeout no limit, on failure isolate

        one  transform
        two  transform  after one · timeout 0.5 s
    """)


def test_a_terminal_without_unicode_gets_a_drawing_it_can_show() -> None:
    assert drawn(fan(2), encoding="ascii").splitlines()[4:] == [
        "root     transform",
        "|- b0    transform  after root",
        "|- b1    transform  after root",
        "`- join  transform  after b0, b1",
    ]


# Mermaid


def test_mermaid_has_branches_as_nested_subgraphs_and_joins_and_conditions_on_their_edges() -> None:
    assert orders().build().to_mermaid() == picture("""
        flowchart TD
            s0["fetch"]
            subgraph b1["check"]
                s1{{"check"}}
                s3{"route"}
                subgraph b2["high"]
                    s4["high"]
                    s7["audit"]
                end
                subgraph b3["low"]
                    s5["low"]
                end
                subgraph b4["enrich"]
                    s6["enrich"]
                end
                subgraph b5["merge"]
                    s8["merge"]
                end
            end
            subgraph b6["note"]
                s2["note"]
            end
            subgraph b7["done"]
                s9["done"]
            end
            s0 --> s1
            s0 --> s2
            s1 --> s3
            s3 -->|when| s4
            s3 -->|when| s5
            s3 --> s6
            s4 --> s7
            s7 -->|any_settled| s8
            s5 -->|any_settled| s8
            s6 -.->|any_settled| s8
            s8 -->|n_of 1| s9
            s2 -->|n_of 1| s9
    """)


def test_a_join_with_a_condition_has_both_on_its_edges() -> None:
    pipeline = fan(2).with_stage("last", gives(), after=["b0", "b1"], join="any", when=is_high)
    edges = [line.strip() for line in pipeline.build().to_mermaid().splitlines() if "when" in line]
    assert edges == ["s1 -->|any, when| s4", "s2 -->|any, when| s4"]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("plain name", "plain name"),
        ('say "hello"', "say #34;hello#34;"),
        ("<b>", "#60;b#62;"),
        ("#35;", "#35;35#59;"),
        ("a\nb", "a b"),
        ("`code`", "#96;code#96;"),
        ("1. first", "1#46; first"),
        ("- item", "#45; item"),
        ("v1.2-rc", "v1.2-rc"),
        ("a[0]{1}|x", "a#91;0#93;#123;1#125;#124;x"),
        ("日本", "日本"),
        ("end", "end"),
    ],
)
def test_a_label_says_the_name_whatever_is_in_it(name: str, label: str) -> None:
    text = Pipeline("labels").with_stage(name, gives()).build().to_mermaid()
    assert text == f'flowchart TD\n    s0["{label}"]\n'
    decoded = re.sub(r"#(\d+);", lambda found: chr(int(found[1])), label)
    assert decoded == name.replace("\n", " ")


def test_mermaid_is_the_same_for_the_same_declarations() -> None:
    assert orders().build().to_mermaid() == orders().build().to_mermaid()


def test_a_thousand_nested_branches_neither_recurse_nor_lose_a_stage() -> None:
    pipeline = Pipeline("deep").with_stage("0", gives())
    for number in range(1, 1000):
        pipeline = pipeline.with_stage(f"{number}", gives(), after=f"{number - 1}")
        pipeline = pipeline.with_stage(f"side {number}", gives(), after=f"{number - 1}")
    text = pipeline.build().to_mermaid()
    assert len(re.findall(r'^ *s\d+\["', text, re.MULTILINE)) == 1999
    assert text.count("subgraph") == len(re.findall(r"^ *end$", text, re.MULTILINE)) == 1998
    assert len(drawn(pipeline).splitlines()) <= 62
