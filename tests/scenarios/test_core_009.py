"""CORE-009: deltas between snapshots of 50 to 1000 messages are exact, and one changed message costs that message."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from stageflow import ContextSnapshot, Delta

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = [50, 100, 500, 1000]
MORE: dict[str, Any] = {"role": "assistant", "content": "more", "meta": {"tokens": 9}}

Messages = list[dict[str, Any]]


def messages(number: int) -> Messages:
    return [
        {"role": "user", "content": f"message {n} " + "x" * 1_000, "meta": {"tokens": n, "tags": ["a", "b"]}}
        for n in range(number)
    ]


def with_nested_change(old: Messages) -> Messages:
    middle = len(old) // 2
    changed = {**old[middle], "meta": {**old[middle]["meta"], "tags": ["a", "c"]}}
    return [*old[:middle], changed, *old[middle + 1 :]]


def with_one_replaced(old: Messages) -> Messages:
    return [*old[: len(old) // 2], MORE, *old[len(old) // 2 + 1 :]]


EDITS: dict[str, tuple[Callable[[Messages], Messages], int]] = {
    "one more": (lambda old: [*old, MORE], 1),
    "one more at the front": (lambda old: [MORE, *old], 1),
    "one more in the middle": (lambda old: [*old[: len(old) // 2], MORE, *old[len(old) // 2 :]], 1),
    "the last removed": (lambda old: old[:-1], 1),
    "the first removed": (lambda old: old[1:], 1),
    "one in the middle removed": (lambda old: [*old[: len(old) // 2], *old[len(old) // 2 + 1 :]], 1),
    "a window that moves on": (lambda old: [*old[1:], MORE], 2),
    "a nested field": (with_nested_change, 1),
    "one replaced": (with_one_replaced, 4),
    "none": (list, 0),
}


def shared(value: Any) -> Any:
    return value


def read_anew(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("number", SIZES)
@pytest.mark.parametrize("how", [shared, read_anew])
@pytest.mark.parametrize(("edit", "most"), EDITS.values(), ids=EDITS)
def test_a_change_of_one_message_is_exact_and_costs_that_message(
    edit: Callable[[Messages], Messages], most: int, how: Callable[[Any], Any], number: int
) -> None:
    plain = messages(number)
    old = ContextSnapshot({"messages": plain, "profile": {"name": "ada"}})
    new = old.evolve(messages=how(edit(old["messages"])))
    delta = new.diff(old)
    assert (old.apply(delta), new.apply(old.diff(new))) == (new, old)
    assert not new.diff(old.apply(delta))
    assert old["messages"] == plain
    assert len(delta) <= most
    # What it takes is a message, in whichever of the sizes; the snapshot would be 50 to 1000 of them.
    assert len(pickle.dumps(delta)) < 500
    assert len(json.dumps(delta.to_json_patch())) < 500


@pytest.mark.parametrize("number", SIZES)
def test_a_delta_of_all_messages_is_exact_and_no_larger_than_they_are(number: int) -> None:
    old = ContextSnapshot({"messages": messages(number)})
    new = old.evolve(messages=[{**message, "content": message["content"][::-1]} for message in old["messages"]])
    delta = new.diff(old)
    assert old.apply(delta) == new
    assert {change.path[-1] for change in delta} == {"content"}
    assert len(delta) == number
    assert len(pickle.dumps(delta)) < 1.1 * len(pickle.dumps(new))


@pytest.mark.parametrize("number", SIZES)
def test_a_conversation_can_be_told_again_from_its_deltas(number: int) -> None:
    snapshot = ContextSnapshot({"messages": []})
    deltas: list[Delta] = []
    for message in messages(number):
        following = snapshot.evolve(messages=[*snapshot["messages"], message])
        deltas.append(following.diff(snapshot))
        snapshot = following
    told = ContextSnapshot({"messages": []})
    for delta in pickle.loads(pickle.dumps(deltas)):
        told = told.apply(delta)
    assert told == snapshot
    assert told.version == snapshot.version == number
    assert {len(delta) for delta in deltas} == {1}
    assert len(pickle.dumps(deltas)) < 1.2 * len(pickle.dumps(snapshot.forget()))
