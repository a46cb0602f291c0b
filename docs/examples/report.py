import rich
import trio

from stageflow import Pipeline, StageContext, StageOutput, optional


async def fetch(ctx: StageContext) -> StageOutput:
    return StageOutput.ok(rows=[1, 2, 3])


async def left(ctx: StageContext) -> StageOutput:
    return StageOutput.ok(total=sum(ctx.inputs["fetch"]["rows"]))


async def right(ctx: StageContext) -> StageOutput:
    return StageOutput.cancel_branch("nothing to enrich")  # only this branch ends


async def report(ctx: StageContext) -> dict[str, object]:
    return {"total": ctx.inputs["left"]["total"], "enriched": "right" in ctx.inputs}


pipeline = (
    Pipeline("report")
    .with_stage("fetch", fetch, timeout=5)
    .with_stage("left", left, after="fetch")
    .with_stage("right", right, after="fetch")
    .with_stage("report", report, after=["left", optional("right")])
)

if __name__ == "__main__":
    results = trio.run(pipeline.run)
    print(results["report"]["total"], results.records["right"].state)
    rich.print(results.trace)
