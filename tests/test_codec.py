"""What is written comes back equal and of the same types, or it is refused when it is written."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import enum
import functools
import hashlib
import io
import json
import math
import pathlib
import sys
import types
import uuid
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageflow.errors import DefinitionError
from stageflow.frozen import FrozenDict, FrozenList, freeze
from stageflow.journal import StageState
from stageflow.journal.codec import (
    Encoded,
    Undecodable,
    Unstorable,
    decode,
    decode_tree,
    encode,
    reads_plainly,
    register_journal_type,
    same,
)
from stageflow.journal.events import StageSettled, read_event, write_event, write_success
from stageflow.journal.kinds import TAGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

HERE = sys.modules[__name__]
NO_BLOBS: dict[str, bytes] = {}


@attrs.frozen
class Page:
    title: Any
    _number: Any = 0


@attrs.define
class Doc:
    pages: Any
    seen: int = attrs.field(init=False, default=0)

    class Inner:
        """Is nothing that could be stored."""


@attrs.frozen(eq=False)
class ById:
    value: Any


@dataclasses.dataclass(frozen=True)
class Point:
    x: Any
    y: Any = dataclasses.field(default=0.0, kw_only=True)
    size: int = dataclasses.field(init=False, default=2)


class Pair(NamedTuple):
    left: Any
    right: Any = None


class Colour(enum.Enum):
    RED = "red"
    ONE = 1
    ALSO_ONE = 1  # noqa: PIE796 - an alias


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    FAST = "fast"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Bits(enum.IntFlag):
    LOW = 1


class Title(str):
    __slots__ = ()


class Celsius:
    """Is registered."""

    def __init__(self, degrees: Any) -> None:
        self.degrees = degrees


class Kelvin(Celsius):
    """Is not registered, but derives from what is."""


register_journal_type(Celsius, lambda value: {"degrees": value.degrees}, lambda tree: Celsius(tree["degrees"]))


def double(value: int) -> int:
    """Is a converter."""
    return value * 2


@attrs.frozen
class Doubling:
    value: int = attrs.field(converter=double)


def no_frozen_list(instance: object, attribute: object, value: object) -> None:
    """Is a validator."""
    if type(value) is FrozenList:
        raise ValueError("wants a list of its own")


@attrs.frozen
class Choosy:
    value: Any = attrs.field(validator=no_frozen_list)


@attrs.define
class Counting(dict[str, int]):
    name: str = ""


@attrs.define
class Broken(Exception):
    name: str = ""


@dataclasses.dataclass
class Seeded:
    seed: dataclasses.InitVar[int]
    value: int = 0


def back(encoded: Encoded) -> Any:
    """Reads what was written."""
    return decode(encoded.text, encoded.blobs.__getitem__)


def refusal(value: Any) -> str:
    """Gives the words with which a value is refused."""
    with pytest.raises(Unstorable) as caught:
        encode(value)
    assert str(caught.value) == f"{caught.value.path}: {caught.value.why}"
    return str(caught.value)


def complaint(tree: Any, blobs: Mapping[str, bytes] | None = None) -> str:
    """Gives the words with which what was written is not read."""
    with pytest.raises(Undecodable) as caught:
        decode_tree(tree, (blobs or NO_BLOBS).__getitem__)
    assert str(caught.value) == f"{caught.value.path}: {caught.value.why}"
    return str(caught.value)


# Laws

# Surrogates too, and often such as would join to one character.
TEXTS = st.text(st.characters() | st.sampled_from("$\ud83d\ude00"), max_size=6)
ZONES = (
    st.none()
    | st.timezones()
    | st.just(dt.UTC)
    | st.builds(dt.timezone, st.timedeltas(min_value=dt.timedelta(hours=-23), max_value=dt.timedelta(hours=23)))
    | st.builds(dt.timezone, st.just(dt.timedelta(hours=1)), TEXTS)
)
PARTS = st.lists(st.sampled_from(["a", "B", "..", "\udcff", "ä b"]), max_size=3)


def replaced(value: Any, fold: int) -> Any:
    """The second time, perhaps, that the clock shows it."""
    return value.replace(fold=fold)


HASHABLE_LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(700, 15_000).map(lambda bits: -(3**bits)),
    st.floats(),
    TEXTS,
    st.binary(max_size=8),
    st.integers(1024, 1025).map(bytes),
    st.builds(replaced, st.datetimes(timezones=ZONES), st.integers(0, 1)),
    st.builds(replaced, st.times(timezones=st.none() | st.just(dt.UTC)), st.integers(0, 1)),
    st.dates(),
    st.timedeltas(),
    st.timezones(),
    st.decimals().filter(lambda value: not value.is_snan()),  # which has no hash
    st.sampled_from([Decimal("-NaN123"), Decimal("1E+30"), Decimal("-0.00"), Decimal("-Infinity")]),
    st.fractions(),
    st.complex_numbers(),
    st.uuids(),
    st.builds(uuid.UUID, int=st.integers(0, 5), is_safe=st.sampled_from(uuid.SafeUUID)),
    st.sampled_from([pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath]).flatmap(
        lambda kind: PARTS.map(lambda parts: kind(*parts))
    ),
    st.sampled_from([*Colour, *Level, *Mode, *Access, Access(0), Access.READ | Access.WRITE, Bits(5), Bits.LOW]),
    st.builds(Celsius, st.integers()),
)


# Within others, a strategy by name is repeated in few words, where Hypothesis would warn of a long `repr`.


@st.composite
def hashable_leaves(draw: st.DrawFn) -> Any:
    """What can be in a set, and has nothing in it."""
    return draw(HASHABLE_LEAVES)


@st.composite
def hashable(draw: st.DrawFn) -> Any:
    """What can be in a set."""
    return draw(HASHABLE)


HASHABLE = st.recursive(
    hashable_leaves(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.frozensets(inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Page, inner, inner),
        st.builds(ById, inner),
        st.builds(Point, inner, y=inner),
    ),
    max_leaves=6,
)
VALUES = st.recursive(
    hashable() | st.just(Decimal("sNaN5")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(FrozenList),
        st.dictionaries(TEXTS, inner, max_size=4),
        st.dictionaries(TEXTS, inner, max_size=4).map(FrozenDict),
        st.dictionaries(hashable(), inner, max_size=3),
        st.sets(hashable(), max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Pair, inner, inner),
        st.builds(Page, inner, number=inner),
        st.builds(Doc, inner),
        st.builds(Point, inner, y=inner),
        st.builds(Celsius, inner),
    ),
    max_leaves=12,
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def law(*values: st.SearchStrategy[Any], examples: int = 50) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Checks a claim on many values; how long that takes is of no account."""
    return lambda claim: settings(deadline=None, max_examples=examples)(given(*values)(claim))


@law(VALUES | PLAIN, st.sampled_from([0, 50, 4096]), examples=80)
def test_everything_comes_back_as_it_was(value: Any, threshold: int) -> None:
    encoded = encode(value, threshold=threshold)
    assert encoded.text.isascii()
    assert same(value, back(encoded)) is None


@pytest.fixture
def few_digits() -> Iterator[None]:
    """Python parses no more digits of an int than it always does."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(sys.int_info.str_digits_check_threshold)
    yield
    sys.set_int_max_str_digits(before)


@pytest.mark.usefixtures("few_digits")
def test_what_reads_plainly_needs_nothing_to_be_read() -> None:
    @law(VALUES | PLAIN, st.sampled_from([0, 50, 4096]), examples=80)
    def claim(value: Any, threshold: int) -> None:
        text = encode(value, threshold=threshold).text
        if reads_plainly(text):
            assert same(value, decode(text, dict[str, bytes]().__getitem__)) is None

    claim()


@pytest.mark.parametrize(
    ("value", "plainly"),
    [
        ({"rows": [1, 2.5, None, "é"], "more": {}}, True),
        ({"digits": 10**638}, True),
        ({"digits": 10**639}, False),
        ({"digits": "7" * 700}, False),  # which is a string, but to see that one has to read it
        ({"day": dt.date(2024, 2, 29)}, False),
        ({"$": 1}, False),
        ({"text": "x" * 5000}, False),
    ],
)
def test_what_needs_something_to_be_read_does_not_read_plainly(value: Any, plainly: bool) -> None:
    assert reads_plainly(encode(value).text) is plainly


@law(VALUES)
def test_what_came_back_is_frozen_and_is_written_the_same_again(value: Any) -> None:
    encoded = encode(value)
    again = back(encoded)
    assert encode(again) == encoded
    assert same(freeze(again), again) is None
    if type(again) in (FrozenDict, FrozenList, frozenset):
        assert freeze(again) is again


@law(VALUES, st.sampled_from([0, 50, 4096]))
def test_every_blob_is_referred_to_and_kept_by_its_content(value: Any, threshold: int) -> None:
    encoded = encode(value, threshold=threshold)
    everything = encoded.text.encode() + b"".join(encoded.blobs.values())
    for key, content in encoded.blobs.items():
        assert hashlib.sha256(content).hexdigest() == key
        assert key.encode() in everything


@law(VALUES, VALUES)
def test_sameness_goes_both_ways(one: Any, other: Any) -> None:
    assert same(one, one) is None
    assert (same(one, other) is None) == (same(other, one) is None)


@law(VALUES, VALUES)
def test_what_is_written_alike_is_the_same(one: Any, other: Any) -> None:
    if encode(one) == encode(other):
        assert same(one, other) is None


def beside(key: Any, part: Any) -> dict[Any, Any]:
    """A mapping with something else in it."""
    return {"first": 1, key: part}


@law(
    st.recursive(
        st.builds(object),
        lambda inner: st.one_of(
            st.tuples(PLAIN, inner).map(list),
            st.tuples(PLAIN, inner),
            st.builds(beside, TEXTS.map(" {}".format) | st.integers() | st.dates(), inner),
            st.builds(Page, inner),
            st.builds(Pair, PLAIN, inner),
            st.builds(Point, st.just(1), y=inner),
        ),
        max_leaves=4,
    )
)
def test_the_path_of_a_refusal_leads_to_what_is_refused(value: Any) -> None:
    with pytest.raises(Unstorable) as caught:
        encode(value)
    assert type(eval(caught.value.path, {"data": value, "datetime": dt})) is object


TAG_NAMES = st.sampled_from(
    [*TAGS, "raw", "json", "", ":", "nothing", "a:b", "builtins:eval", "os:system", "builtins:list", "builtins:set"]
    + [f"{__name__}:{name}" for name in ("Page", "Point", "Pair", "Colour", "Access", "Celsius", "encode", "HERE")]
)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from(["RED", "Europe/Berlin", "1"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["title", "number", "x", "$", "v", "left"]), inner, max_size=3),
        st.fixed_dictionaries({"$": TAG_NAMES | inner, "v": inner}),
    ),
    max_leaves=8,
)


@law(TREES, examples=80)
def test_nonsense_is_read_or_complained_about(tree: Any) -> None:
    with contextlib.suppress(Undecodable):
        encode(decode_tree(tree, NO_BLOBS.__getitem__))


# What is stored, and how


WRITTEN: list[tuple[Any, str]] = [
    (None, "null"),
    (True, "true"),
    (3, "3"),
    (0.1, "0.1"),
    (-0.0, "-0.0"),
    ("ä", r'"\u00e4"'),
    ("\ud83d", r'"\ud83d"'),
    ("\ud83d\ude00", '{"$":"str","v":"eda0bdedb880"}'),
    (math.nan, '{"$":"float","v":"nan"}'),
    (-math.inf, '{"$":"float","v":"-inf"}'),
    (-(16**4000), f'{{"$":"int","v":"-0x1{4000 * chr(48)}"}}'),
    (b"\x00\xff", '{"$":"bytes","v":"AP8="}'),
    ([1, [2]], "[1,[2]]"),
    ({"a": {"b": 1}}, '{"a":{"b":1}}'),
    ({1: "a", "b": 2}, '{"$":"dict","v":[[1,"a"],["b",2]]}'),
    ({"$": "uuid"}, '{"$":"dict","v":[["$","uuid"]]}'),
    ({"\ud83d\ude00": 1}, '{"$":"dict","v":[[{"$":"str","v":"eda0bdedb880"},1]]}'),
    ((1, "a"), '{"$":"tuple","v":[1,"a"]}'),
    ({"b", "a"}, '{"$":"set","v":["a","b"]}'),
    (frozenset({2, 1}), '{"$":"set","v":[1,2]}'),
    (1 - 2.5j, '{"$":"complex","v":[1.0,-2.5]}'),
    (Decimal("1.50"), '{"$":"decimal","v":"1.50"}'),
    (Decimal("sNaN7"), '{"$":"decimal","v":"sNaN7"}'),
    (Fraction(2, 3), '{"$":"fraction","v":[2,3]}'),
    (dt.date(2024, 2, 29), '{"$":"date","v":"2024-02-29"}'),
    (dt.time(1, 2, 3, 4, fold=1), '{"$":"time","v":["01:02:03.000004",1,null]}'),
    (dt.timedelta(-1, 2, 3), '{"$":"timedelta","v":[-1,2,3]}'),
    (dt.UTC, '{"$":"timezone","v":[[0,0,0]]}'),
    (dt.timezone(dt.timedelta(hours=1), "X"), '{"$":"timezone","v":[[0,3600,0],"X"]}'),
    (ZoneInfo("Asia/Tokyo"), '{"$":"zone","v":"Asia/Tokyo"}'),
    (
        dt.datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
        '{"$":"datetime","v":["2024-10-27T02:30:00",1,{"$":"zone","v":"Europe/Berlin"}]}',
    ),
    (uuid.UUID(int=1), '{"$":"uuid","v":"00000000-0000-0000-0000-000000000001"}'),
    (
        uuid.UUID(int=1, is_safe=uuid.SafeUUID.safe),
        '{"$":"uuid","v":["00000000-0000-0000-0000-000000000001",0]}',
    ),
    (pathlib.PurePosixPath("a/b"), '{"$":"PurePosixPath","v":"a/b"}'),
    (pathlib.PureWindowsPath("c:/A"), r'{"$":"PureWindowsPath","v":"c:\\A"}'),
    (Colour.ALSO_ONE, f'{{"$":"{__name__}:Colour","v":"ONE"}}'),
    (Level.LOW, f'{{"$":"{__name__}:Level","v":"LOW"}}'),
    (Mode.FAST, f'{{"$":"{__name__}:Mode","v":"FAST"}}'),
    (Access.READ | Access.WRITE, f'{{"$":"{__name__}:Access","v":3}}'),
    (Pair(1), f'{{"$":"{__name__}:Pair","v":{{"left":1,"right":null}}}}'),
    (Page("x"), f'{{"$":"{__name__}:Page","v":{{"title":"x","number":0}}}}'),
    (Point(1, y=2), f'{{"$":"{__name__}:Point","v":{{"x":1,"y":2}}}}'),
    (Celsius(20), f'{{"$":"{__name__}:Celsius","v":{{"degrees":20}}}}'),
]


@pytest.mark.parametrize(("value", "text"), WRITTEN, ids=[text[:40] for _, text in WRITTEN])
def test_a_value_is_written_as_json_with_tags(value: Any, text: str) -> None:
    encoded = encode(value)
    assert encoded == Encoded(text, {})
    assert same(value, back(encoded)) is None
    assert same(value, decode_tree(json.loads(text), NO_BLOBS.__getitem__)) is None


def test_paths_of_this_system_come_back_as_such() -> None:
    path = pathlib.Path("a/b")
    assert type(back(encode(path))) is type(path)


def test_ints_of_any_size_come_back() -> None:
    for digits in (600, 4_299, 4_300, 4_301, 20_000):
        for value in (10**digits, -(10**digits) + 1):
            assert back(encode([value])) == [value]


def test_an_int_that_another_process_might_not_parse_is_not_written_in_decimal() -> None:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        encoded = encode([10**5_000], threshold=100_000)
    finally:
        sys.set_int_max_str_digits(limit)
    assert back(encoded) == [10**5_000]


def test_dicts_lists_and_sets_come_back_frozen_wherever_they_are() -> None:
    value: Any = back(encode(Page({"a": [{1}]}, {1: [2]})))
    inside = [value.title, value.title["a"], value.title["a"][0], value._number, value._number[1]]
    assert list(map(type, inside)) == [FrozenDict, FrozenList, frozenset, FrozenDict, FrozenList]


def test_the_order_of_a_mapping_comes_back() -> None:
    assert list(back(encode({"b": 1, "a": 2}))) == ["b", "a"]
    assert list(back(encode({2: 1, 1: 2}))) == [2, 1]


def test_several_nan_in_one_set_or_mapping_come_back() -> None:
    assert len(back(encode({float("nan"), float("nan")}))) == 2
    table = back(encode({float("nan"): 1, float("nan"): 2}))
    assert list(table.values()) == [1, 2]


def test_a_class_of_the_program_itself_can_be_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = attrs.make_class("InMain", ["value"])
    kind.__module__ = "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "InMain", kind, raising=False)
    encoded = encode(kind(value=1))
    assert encoded.text == '{"$":"__main__:InMain","v":{"value":1}}'
    assert type(back(encoded)) is kind


def test_a_class_that_nobody_has_imported_yet_is_imported(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "just_written.py").write_text("import enum\nclass Size(enum.Enum):\n    BIG = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        size = decode('{"$":"just_written:Size","v":"BIG"}', NO_BLOBS.__getitem__)
        assert size is sys.modules["just_written"].Size.BIG
    finally:
        sys.modules.pop("just_written", None)


WRAPS: list[Any] = [lambda value: [value], lambda value: {"a": value}, lambda value: (value,), Page]  # pyright: ignore[reportUnknownLambdaType]


@pytest.mark.parametrize("wrap", WRAPS, ids=range(len(WRAPS)))
def test_a_hundred_levels_are_stored_and_more_are_refused(wrap: Any) -> None:
    value: Any = 1
    for _ in range(100):
        value = wrap(value)
    assert same(back(encode(value)), value) is None
    with pytest.raises(Unstorable, match="more than 100 deep"):
        encode(wrap(value))


# What is refused


def local_class() -> Any:
    """Gives a class that cannot be imported."""

    @attrs.frozen
    class Local:
        value: int = 1

    return Local


def unset_field() -> Any:
    doc = Doc([])
    del doc.pages
    return doc


STORED = "or say with register_journal_type how it is stored"
GENERAL = f"give a mapping, or an instance of an attrs class or a dataclass, {STORED}"


REFUSED: list[tuple[Any, str]] = [
    ({"a": [1, object()]}, f"data.a[1]: it is an instance of object; {GENERAL}"),
    ({"odd key": {3: object}}, "data['odd key'][3]: it is a class; keep its name"),
    ({"class": Page([Point(1, y=len)])}, "data['class'].title[0].y: it is a function; keep what it gives"),
    (Page(1, math), "data._number: it is a module; keep its name"),
    (
        Pair(1, (2, ValueError("x"))),
        "data.right[1]: it is an exception; keep what matters of it, such as str(error)",
    ),
    ([Broken()], "data[0]: it is an exception; keep what matters of it, such as str(error)"),
    ([io.StringIO()], "data[0]: it is an open file; keep its path, or what is in it"),
    ([iter([])], "data[0]: it can be read only once; make a list of it"),
    ([bytearray()], "data[0]: it is a view of memory that may change; make bytes of it"),
    ([functools.partial(len)], f"data[0]: it is an instance of partial; {GENERAL}"),
    (
        {frozenset({len}): 1},
        "data{frozenset({<built-in function len>})}{<built-in function len>}: it is a function; keep what it gives",
    ),
    (
        [collections.OrderedDict()],
        (
            "data[0]: it is an instance of OrderedDict; give a plain dict, or say with register_journal_type how it is "
            "stored"
        ),
    ),
    (
        Title("x"),
        "data: it is an instance of Title; give a plain str, or say with register_journal_type how it is stored",
    ),
    (
        [Counting()],
        "data[0]: it is an instance of Counting; give a plain dict, or say with register_journal_type how it is stored",
    ),
    ([Kelvin(1)], f"data[0]: it is an instance of Kelvin; {GENERAL}"),
    ([Celsius({"a": len})], "data[0].degrees.a: it is a function; keep what it gives"),
    (Doc.Inner(), f"data: it is an instance of Doc.Inner; {GENERAL}"),
    (
        [local_class()()],
        (
            f"data[0]: its class local_class.<locals>.Local cannot be imported again as "
            f"'{__name__}:local_class.<locals>.Local'; define it at the top of a module"
        ),
    ),
    (unset_field(), "data.pages: it was never set; give the field a value"),
    (
        [dt.datetime(2024, 1, 1, tzinfo=type("Own", (dt.tzinfo,), {})())],
        "data[0].tzinfo: it is a time zone of another library; use zoneinfo.ZoneInfo or datetime.timezone",
    ),
    (
        {"page": Page([Doubling(3)])},
        (
            "data.page.title[0].value: it is 6, but would come back as 12; if its class changes what it is given, or "
            "keeps what it is not given, say with register_journal_type how it is stored"
        ),
    ),
    (
        [attrs.evolve(Doc([]), pages=1), Choosy([1])],
        (
            f"data[1]: it could not be read again: {{'value': [1]}} cannot be read as {__name__}:Choosy: "
            f"ValueError: wants a list of its own"
        ),
    ),
    (
        [Seeded(1)],
        (
            f"data[0]: it could not be read again: {{'value': 0}} cannot be read as {__name__}:Seeded: TypeError: "
            f"Seeded.__init__() missing 1 required positional argument: 'seed'"
        ),
    ),
]


@pytest.mark.parametrize(("value", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_would_not_come_back_is_refused_with_its_path(value: Any, words: str) -> None:
    assert refusal(value) == words


def test_a_field_that_cannot_be_given_is_refused_if_it_has_changed() -> None:
    doc = Doc([])
    doc.seen = 3
    assert refusal({"doc": doc}).startswith("data.doc.seen: it is 3, but would come back as 0;")


def test_a_time_zone_read_from_a_file_is_refused() -> None:
    tokyo = pathlib.Path("/usr/share/zoneinfo/Asia/Tokyo")
    if not tokyo.exists():
        pytest.skip("there is no file of a time zone")
    for key in (None, "Europe/Berlin"):
        with tokyo.open("rb") as file:
            zone = ZoneInfo.from_file(file, key=key)
        assert refusal([zone]).startswith("data[0]: it is a time zone without a name, or read from a file")


def test_a_circle_is_refused_where_it_closes() -> None:
    circle: dict[str, Any] = {"name": "x", "pages": [1]}
    circle["pages"].append({"doc": circle})
    words = "it is also what it is in, and a circle cannot be written; refer to it by a name"
    assert refusal({"top": circle}) == f"data.top.pages[1].doc: {words}"
    assert refusal({"top": freeze(circle)}) == f"data.top.pages[1].doc: {words}"
    page = Doc([])
    page.pages.append(page)
    assert refusal(page) == f"data.pages[0]: {words}"


def test_depth_is_refused_with_the_start_of_its_path() -> None:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    assert refusal(value) == (
        "data[0][0][0][0][0][0][0][0]: it is nested more than 100 deep; make it flat, or keep it in a file"
    )


def test_a_stack_that_is_nearly_full_refuses_in_words_too() -> None:
    value: Any = 1
    for _ in range(90):
        value = Page(value)
    encoded = encode(value)
    met: set[str] = set()

    def deeper(depth: int) -> None:
        if depth % 16 == 0:
            for action in (lambda: encode(value), lambda: back(encoded)):
                try:
                    action()
                except (Undecodable, Unstorable) as error:
                    met.add(str(error))
        deeper(depth + 1)

    with pytest.raises(RecursionError):
        deeper(0)
    assert met == {
        "data: it is nested too deep to be written from here",
        "data: it is nested too deep to be read from here",
    }


def test_a_refusal_calls_the_value_what_it_is_called() -> None:
    with pytest.raises(Unstorable) as caught:
        encode([len], root="output of 'load'")
    assert caught.value.path == "output of 'load'[0]"


# Registered classes


def test_registered_classes_are_the_same_if_what_is_stored_of_them_is() -> None:
    assert same(Celsius([1]), Celsius([1])) is None
    assert same([Celsius([1])], [Celsius([1.0])]) == "data[0].degrees[0]"


def test_a_class_that_derives_from_a_builtin_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Name(str):
        __slots__ = ()

    Name.__qualname__ = "Name"
    monkeypatch.setattr(HERE, "Name", Name, raising=False)
    assert "an instance of Name" in refusal([Name("x")])
    register_journal_type(Name, lambda name: name[:], Name)
    again = back(encode({"a": Name("x")}))
    assert type(again["a"]) is Name
    assert again == {"a": "x"}


def test_a_class_with_fields_can_be_registered_and_the_last_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = attrs.make_class("Twice", {"value": attrs.field(converter=lambda value: value * 2)})
    kind.__module__ = __name__
    monkeypatch.setattr(HERE, "Twice", kind, raising=False)
    assert refusal(kind(1)).startswith("data.value: it is 2, but would come back as 4")
    register_journal_type(kind, lambda twice: twice, kind)
    register_journal_type(kind, lambda twice: twice.value // 2, kind)
    assert back(encode(kind(1))).value == 2


def test_what_was_registered_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = type("Frail", (), {"__module__": __name__})
    monkeypatch.setattr(HERE, "Frail", kind, raising=False)
    register_journal_type(kind, lambda _: 1 / 0, lambda _: kind())
    assert refusal([kind()]) == "data[0]: what was registered to store it raised ZeroDivisionError: division by zero"
    register_journal_type(kind, lambda _: None, lambda _: 3)
    assert refusal([kind()]) == (
        f"data[0]: it could not be read again: what was registered to read {__name__}:Frail gave an instance of int"
    )
    register_journal_type(kind, lambda _: None, lambda _: 1 / 0)
    assert complaint([{"$": f"{__name__}:Frail", "v": None}]) == (
        f"data[0]: None cannot be read as {__name__}:Frail: ZeroDivisionError: division by zero"
    )


def test_a_class_that_cannot_be_found_again_cannot_be_registered() -> None:
    kind = local_class()
    with pytest.raises(DefinitionError, match=r"^class local_class.<locals>.Local cannot be imported again as"):
        register_journal_type(kind, lambda _: None, lambda _: kind())


@pytest.mark.parametrize("kind", [dict, str, tuple, FrozenList, bool, type(None), dt.datetime, uuid.UUID])
def test_what_is_stored_as_it_is_cannot_be_registered(kind: Any) -> None:
    with pytest.raises(DefinitionError, match=f"^{kind.__name__} is stored as it is; register a class of your own"):
        register_journal_type(kind, lambda _: None, lambda _: kind())


# Sameness


class Equal:
    """Is equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class Grumpy:
    """Cannot be compared."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("no")

    __hash__ = object.__hash__


BERLIN = ZoneInfo("Europe/Berlin")
NOON = dt.datetime(2024, 1, 1, 12, tzinfo=BERLIN)


SAME: list[tuple[Any, Any]] = [
    (math.nan, float("nan")),
    (Decimal("NaN"), Decimal("NaN")),
    (Decimal("sNaN"), Decimal("sNaN")),
    (complex(math.nan, 1), complex(math.nan, 1)),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({"a": [{1: {2}}]}, freeze({"a": [{1: {2}}]})),
    ({1, "a"}, frozenset({"a", 1})),
    ({float("nan")}, {float("nan")}),
    ({(float("nan"), 1)}, {(float("nan"), 1)}),
    ({float("nan"): 1, float("nan"): 2}, {float("nan"): 2, float("nan"): 1}),
    ({ById(1), ById(2)}, {ById(2), ById(1)}),
    (ById([math.nan]), ById([float("nan")])),
    (Point(1), Point(1)),
    (NOON, NOON.replace(tzinfo=ZoneInfo.no_cache("Europe/Berlin"))),
    (Equal(), Equal()),
    (Access(3), Access.READ | Access.WRITE),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=range(len(SAME)))
def test_these_are_the_same(one: Any, other: Any) -> None:
    assert same(one, other) is None
    assert same(other, one) is None


DIFFERENT: list[tuple[Any, Any, str]] = [
    (1, True, "data"),
    (1, 1.0, "data"),
    (0.0, -0.0, "data"),
    (complex(0.0, 0.0), complex(0.0, -0.0), "data"),
    ("a", b"a", "data"),
    (Decimal("1.0"), Decimal("1.00"), "data"),
    (Decimal("NaN1"), Decimal("NaN2"), "data"),
    ([1, [2, 3]], [1, [2, 4]], "data[1][1]"),
    ([1], [1, 2], "data"),
    ([1], (1,), "data"),
    ((1, 2), Pair(1, 2), "data"),
    ({"a": {"odd key": 1}}, {"a": {"odd key": 2}}, "data.a['odd key']"),
    ({"a": 1}, {"b": 1}, "data{'a'}"),
    ({"a": 1}, {"a": 1, "b": 1}, "data"),
    ({1: "a"}, {True: "a"}, "data{1}"),
    ({1: "a"}, {1: "b"}, "data[1]"),
    ({1}, {1.0}, "data{1}"),
    ({(1, "a")}, {(True, "a")}, "data{(1, 'a')}[0]"),
    ({float("nan")}, {1}, "data{nan}"),
    ({}, collections.OrderedDict(), "data"),
    ("x", Title("x"), "data"),
    (Colour.ONE, Colour.RED, "data"),
    (Level.LOW, 1, "data"),
    (Page(1), Page(True), "data.title"),
    (Page([1, 2]), Page([1, 3]), "data.title[1]"),
    (Page(1), Point(1), "data"),
    (Doc([]), unset_field(), "data.pages"),
    (NOON, NOON.replace(fold=1), "data"),
    (NOON, NOON.astimezone(dt.timezone(dt.timedelta(hours=1))), "data"),
    (dt.timezone(dt.timedelta(0), "X"), dt.UTC, "data"),
    (pathlib.PureWindowsPath("A"), pathlib.PureWindowsPath("a"), "data"),
    (pathlib.PurePosixPath("a"), pathlib.PosixPath("a"), "data"),
    (uuid.UUID(int=1), uuid.UUID(int=1, is_safe=uuid.SafeUUID.safe), "data"),
    (object(), object(), "data"),
    (Grumpy(), Grumpy(), "data"),
]


@pytest.mark.parametrize(("one", "other", "path"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_these_differ(one: Any, other: Any, path: str) -> None:
    assert same(one, other) == path
    assert same(other, one) is not None


def test_fields_that_cannot_be_given_count_for_sameness() -> None:
    one, other = Doc([]), Doc([])
    other.seen = 1
    assert one != other
    assert same([one], [other], root="output") == "output[0].seen"
    object.__setattr__(point := Point(1), "size", 3)
    assert same(Point(1), point) == "data.size"


def test_circles_are_told_apart_by_the_whole() -> None:
    one: list[Any] = []
    one.append(one)
    assert same(one, one) is None
    assert same(one, [one]) is None or same(one, [one]) == "data"
    other: list[Any] = []
    other.append(other)
    assert same(one, other) == "data"


# Blobs


def test_a_long_item_is_kept_once_by_its_content() -> None:
    long = ["x" * 10] * 500
    first, second = encode({"page": 1, "long": long}), encode({"page": 2, "long": freeze(long), "also": long})
    [(key, content)] = first.blobs.items()
    assert json.loads(content) == long
    assert first.text == f'{{"page":1,"long":{{"$":"json","v":"{key}"}}}}'
    assert second.blobs == first.blobs
    assert back(second) == {"page": 2, "long": long, "also": long}


def test_a_long_item_beside_what_is_not_plain_is_the_same_blob() -> None:
    long = ["x" * 10] * 500
    assert encode({"when": NOON, "long": long}).blobs == encode({"long": long}).blobs


def test_a_set_is_the_same_blob_in_whatever_order_it_was_made() -> None:
    numbers = [number << 20 for number in range(1000)]
    assert encode([set(numbers)]) == encode([set(reversed(numbers))])  # noqa: C414


def test_many_short_items_stay_in_the_text() -> None:
    assert encode({str(number): "x" * 90 for number in range(100)}).blobs == {}


@pytest.mark.parametrize("value", [["x" * 5000], "x" * 5000, Page("x" * 5000), {1: "x" * 5000}, (NOON, "x" * 5000)])
def test_what_is_long_and_no_mapping_is_kept_as_a_whole(value: Any) -> None:
    encoded = encode(value)
    [key] = encoded.blobs
    assert encoded.text == f'{{"$":"json","v":"{key}"}}'
    assert same(back(encoded), value) is None


def test_the_threshold_is_the_longest_text_that_stays() -> None:
    assert encode("x" * 98, threshold=100).blobs == {}
    assert len(encode("x" * 99, threshold=100).blobs) == 1


def test_long_bytes_are_kept_raw() -> None:
    content = bytes(range(256)) * 5
    key = hashlib.sha256(content).hexdigest()
    encoded = encode({"a": [content, content], "b": Page(content), "short": b"x"})
    assert encoded.blobs == {key: content}
    raw = f'{{"$":"raw","v":"{key}"}}'
    assert encoded.text == (
        f'{{"a":[{raw},{raw}],"b":{{"$":"{__name__}:Page","v":{{"title":{raw},"number":0}}}},'
        f'"short":{{"$":"bytes","v":"eA=="}}}}'
    )
    assert back(encoded)["a"] == [content, content]
    assert back(encode(content, threshold=0)) == content


def test_a_blob_is_fetched_only_if_it_is_referred_to() -> None:
    fetched: list[str] = []

    def fetch(key: str) -> bytes:
        fetched.append(key)
        return encoded.blobs[key]

    encoded = encode({"long": "x" * 5000})
    decode('{"a":1}', fetch)
    assert fetched == []
    decode(encoded.text, fetch)
    assert fetched == list(encoded.blobs)


# What cannot be read

PAGE = f"{__name__}:Page"
KEY = hashlib.sha256(b"[").hexdigest()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "data: it cannot be parsed: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ("[1", "data: it cannot be parsed: JSONDecodeError: Expecting ',' delimiter: line 1 column 3 (char 2)"),
        ("1 2", "data: it cannot be parsed: ValueError: there is more after character 1"),
        ("[NaN]", "data: it cannot be parsed: ValueError: NaN is no JSON"),
        ("[" * 100_000, "data: it is nested too deep to be read from here"),
    ],
    ids=range(5),
)
def test_malformed_text_is_complained_about(text: str, words: str) -> None:
    with pytest.raises(Undecodable) as caught:
        decode(text, NO_BLOBS.__getitem__)
    assert str(caught.value) == words


UNREADABLE: list[tuple[Any, str]] = [
    ({"a": [{"$": "uuid"}]}, "data.a[0]: {'$': 'uuid'} is no tag"),
    ([{"$": "uuid", "v": 1, "w": 2}], "data[0]: {'$': 'uuid', 'v': 1, 'w': 2} is no tag"),
    ([{"$": ["uuid"], "v": 1}], "data[0]: {'$': ['uuid'], 'v': 1} is no tag"),
    ((1,), "data: an instance of tuple is no JSON"),
    (
        {"$": "money", "v": 1},
        "data: the tag 'money' is unknown; was this written by a later version of stageflow?",
    ),
    (
        {"$": "uuid", "v": "x"},
        "data: 'x' cannot be read as uuid: ValueError: badly formed hexadecimal UUID string",
    ),
    ({"$": "bytes", "v": "*"}, "data: '*' cannot be read as bytes: Error: Only base64 data is allowed"),
    ({"$": "zone", "v": "../x"}, "data: '../x' cannot be read as zone: ValueError: "),
    (
        {"$": "nowhere.at_all:Page", "v": {}},
        (
            "data: its class 'nowhere.at_all:Page' cannot be imported (ModuleNotFoundError: No module named "
            "'nowhere'); if it was moved or renamed, leave it there under its old name too"
        ),
    ),
    (
        {"$": f"{__name__}:Gone", "v": {}},
        f"data: its class '{__name__}:Gone' cannot be imported (KeyError: 'Gone'); ",
    ),
    ({"$": f"{__name__}:PAGE", "v": {}}, f"data: '{__name__}:PAGE' is no class of that name"),
    ({"$": f"{__name__}:attrs", "v": {}}, f"data: '{__name__}:attrs' is no class of that name"),
    ({"$": "builtins:eval", "v": {}}, "data: 'builtins:eval' is no class of that name"),
    (
        {"$": "subprocess:Popen", "v": ["true"]},
        (
            "data: subprocess:Popen has no fields and is not registered; if register_journal_type was called for it "
            "when this was written, call it again before it is read"
        ),
    ),
    ({"$": PAGE, "v": {"title": 1, "size": 2}}, "data: Page no longer has the field 'size'"),
    ({"$": PAGE, "v": {}}, f"data: {{}} cannot be read as {PAGE}: TypeError: Page.__init__() missing 1 required"),
    ({"$": PAGE, "v": {"title": {"$": "x:y", "v": 1}}}, "data.title: its class 'x:y' cannot be imported"),
    ({"$": PAGE, "v": {"title": 1, "number": {"$": 1}}}, "data._number: {'$': 1} is no tag"),
    ({"$": f"{__name__}:Colour", "v": "BLUE"}, "data: Colour no longer has the member 'BLUE'"),
    ({"$": f"{__name__}:Access", "v": 8}, f"data: 8 cannot be read as {__name__}:Access: ValueError: "),
    ({"$": "dict", "v": [[[], 1]]}, "data: [[[], 1]] cannot be read as dict: TypeError: unhashable type"),
    ({"$": "dict", "v": [[1, {"$": 1}]]}, "data[1]: {'$': 1} is no tag"),
    ({"a": {"$": "raw", "v": "ab"}}, "data.a: its blob 'ab' cannot be fetched: KeyError: 'ab'"),
    ({"a": {"$": "raw", "v": ["ab"]}}, "data.a: ['ab'] is no key of a blob"),
    ({"a": {"$": "json", "v": "cd"}}, "data.a: its blob 'cd' is not what was stored under that key"),
    (
        {"a": {"$": "json", "v": KEY}},
        "data.a: it cannot be parsed: JSONDecodeError: Expecting value: line 1 column 2 (char 1)",
    ),
]


@pytest.mark.parametrize(("tree", "words"), UNREADABLE, ids=range(len(UNREADABLE)))
def test_what_cannot_be_read_is_complained_about_with_its_path(tree: Any, words: str) -> None:
    assert complaint(tree, {"cd": b"1", KEY: b"["}).startswith(words)


def test_a_class_that_is_gone_is_complained_about(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode({"pages": [Page(1)]})
    monkeypatch.delattr(HERE, "Page")
    with pytest.raises(Undecodable) as caught:
        back(encoded)
    assert caught.value.path == "data.pages[0]"
    assert caught.value.why.startswith(f"its class '{__name__}:Page' cannot be imported")


def test_a_class_that_has_another_in_its_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page(1)
    encode(page)
    kind = attrs.make_class("Page", ["title", "number"])
    kind.__module__ = __name__
    monkeypatch.setattr(HERE, "Page", kind)
    assert refusal([page]).startswith("data[0]: it is Page(title=1, _number=0), but would come back as Page(title=1")


def test_a_module_that_fails_when_it_is_imported_is_complained_about(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "fails_at_once.py").write_text("raise RuntimeError('not today')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "(RuntimeError: not today)" in complaint({"$": "fails_at_once:Page", "v": {}})


def test_reading_asks_no_module_for_what_it_might_make_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    module: Any = types.ModuleType("makes_up")
    module.__getattr__ = asked.append
    monkeypatch.setitem(sys.modules, "makes_up", module)
    assert "KeyError: 'Page'" in complaint({"$": "makes_up:Page", "v": {}})
    assert asked == []


def test_an_error_of_fetching_that_is_no_lack_of_it_passes() -> None:
    def fetch(key: str) -> bytes:
        raise RuntimeError(key)

    with pytest.raises(RuntimeError, match="ab"):
        decode('{"$":"raw","v":"ab"}', fetch)


TIMES = st.floats(allow_nan=False, allow_infinity=False)


@given(st.integers(1, 9), TIMES, TIMES)
def test_the_short_way_to_write_a_success_is_that_of_events(attempts: int, began: float, ended: float) -> None:
    settled = StageSettled(state=StageState.SUCCEEDED, attempts=attempts, started=began, ended=ended)
    assert write_success(attempts, began, ended) == write_event(settled)
    kind, body = write_success(attempts, began, ended)
    assert read_event(kind, json.loads(body)) == settled
