import trio
from trio.testing import MockClock

from stageflow import StageContext, StageOutput, run_stage


async def patient(ctx: StageContext) -> StageOutput:
    await trio.sleep(3600)
    return StageOutput.ok(took=ctx.timer.stage_elapsed)


async def test_it_takes_an_hour(autojump_clock: MockClock) -> None:
    output = await run_stage(patient, timeout=4000)
    assert output["took"] == 3600
