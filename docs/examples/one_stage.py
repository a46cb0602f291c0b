import trio

from stageflow import StageContext, StageOutput, run_stage


async def total(ctx: StageContext) -> StageOutput:
    return StageOutput.ok(total=sum(ctx.inputs["fetch"]["rows"]))


async def main() -> None:
    output = await run_stage(total, inputs={"fetch": {"rows": [1, 2, 3]}})
    assert output["total"] == 6


if __name__ == "__main__":
    trio.run(main)
