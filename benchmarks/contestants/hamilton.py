"""Hamilton's async driver: functions whose parameters are named after the functions they come after."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape

LIBRARY = "asyncio"


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    new_module: Any = importlib.import_module("hamilton.ad_hoc_utils").create_temporary_module
    driver: Any = importlib.import_module("hamilton.async_driver")
    names = [f"stage_{number}" for number in range(len(shape))]
    functions = [
        _function(name, body, [names[other] for other in before])
        for name, body, before in zip(names, bodies, shape.dependencies, strict=True)
    ]
    graph: Any = driver.AsyncDriver({}, new_module(*functions), result_builder=None)
    wanted = [names[number] for number in shape.ends]

    async def run() -> None:
        await graph.execute(wanted)

    return run


def _function(name: str, body: Body, parameters: list[str]) -> Any:
    async def function(**inputs: Any) -> Any:
        await body()

    function.__name__ = function.__qualname__ = name
    function.__annotations__ = {**dict.fromkeys(parameters, object), "return": object}
    signature = [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, annotation=object) for each in parameters]
    function.__signature__ = inspect.Signature(signature, return_annotation=object)  # type: ignore[attr-defined]
    return function
