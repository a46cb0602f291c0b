import trio
from trio.testing import MockClock

from stageflow import Pipeline, StageContext, StageOutput, StageTimeoutError


async def crawl(ctx: StageContext) -> StageOutput:
    seen: list[str] = []
    for number in range(1000):
        await trio.sleep(1)  # fetch a page
        seen.append(f"/page/{number}")
        if len(seen) % 10 == 0:
            ctx.save_partial(seen=seen)
    return StageOutput.ok(seen=seen)


pipeline = Pipeline("crawl").with_stage("crawl", crawl, timeout=60.5)


def kept_after_a_minute() -> int:
    try:
        trio.run(pipeline.run, clock=MockClock(autojump_threshold=0))  # a minute of virtual time
    except StageTimeoutError as late:
        return len(late.results.partial["crawl"]["seen"])
    return 1000


if __name__ == "__main__":
    assert kept_after_a_minute() == 60
