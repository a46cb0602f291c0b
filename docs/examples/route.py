import trio

from stageflow import Pipeline, StageContext, StageOutput, StageState


async def score(ctx: StageContext) -> StageOutput:
    value = ctx.data["score"]
    return StageOutput.ok(way="high" if value > 50 else "low")


async def high(ctx: StageContext) -> StageOutput:
    return StageOutput.ok(verdict="accepted")


async def low(ctx: StageContext) -> StageOutput:
    return StageOutput.ok(verdict="to be reviewed")


async def answer(ctx: StageContext) -> StageOutput:
    (taken,) = ctx.inputs.values()
    return StageOutput.ok(verdict=taken["verdict"])


pipeline = (
    Pipeline("applications")
    .with_stage("score", score, kind="route")
    .with_stage("high", high, after="score", when=lambda ctx: ctx.inputs["score"]["way"] == "high")
    .with_stage("low", low, after="score", when=lambda ctx: ctx.inputs["score"]["way"] == "low")
    .with_stage("answer", answer, after=["high", "low"], join="any_settled")
)

if __name__ == "__main__":
    results = trio.run(pipeline.run, {"score": 75})
    assert results["answer"]["verdict"] == "accepted"
    assert results.records["low"].state is StageState.SKIPPED
    assert results.records["low"].attempts == 0  # its body was never entered
