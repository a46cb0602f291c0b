from collections.abc import Sequence

import trio
from trio.testing import MockClock

from stageflow import Pipeline, PipelineContext, PipelineTerminated, StageContext, StageOutput


async def look_up(ctx: StageContext) -> StageOutput:
    await trio.sleep(0.5)
    if ctx.data["user"] == "mallory":
        raise PermissionError("not on the list")
    return StageOutput.ok(greeting=f"hello {ctx.data['user']}")


async def translate(ctx: StageContext) -> StageOutput:
    await trio.sleep(0.5)
    return StageOutput.ok(text=ctx.inputs["look_up"]["greeting"].upper())


# Built once, when the service starts: a mistake in it shows now. The graph holds nothing of any run.
GRAPH = Pipeline("greet").with_stage("look_up", look_up).with_stage("translate", translate, after="look_up").build()


async def serve(user: str, request: str, limiter: trio.CapacityLimiter, answers: dict[str, str]) -> None:
    """Handles one request: one run."""
    context = PipelineContext(data={"user": user}, correlation_id=request)
    async with limiter:
        try:
            results = await GRAPH.run(context)
        except PipelineTerminated as error:  # one request that fails must not take the service with it
            answers[request] = f"sorry: {error.reason}"
        else:
            answers[request] = results["translate"]["text"]


async def main(users: Sequence[str]) -> dict[str, str]:
    answers: dict[str, str] = {}
    limiter = trio.CapacityLimiter(2)  # as many runs at once as the service can bear
    async with trio.open_nursery() as nursery:
        for number, user in enumerate(users):
            nursery.start_soon(serve, user, f"request-{number}", limiter, answers)
    return answers


if __name__ == "__main__":
    said = trio.run(main, ["ada", "mallory", "grace"], clock=MockClock(autojump_threshold=0))
    assert said == {
        "request-0": "HELLO ADA",
        "request-1": "sorry: PermissionError: not on the list",
        "request-2": "HELLO GRACE",
    }
