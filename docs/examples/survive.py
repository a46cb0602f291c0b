import subprocess
import sys
import tempfile
from pathlib import Path

import trio

from stageflow import Pipeline, PipelineContext, RunStatus, StageContext, StageOutput, open_store

RUN = "order-7"


def note(ctx: StageContext, line: str) -> None:
    """Stands for what a stage does to the world, where no store can take it back."""
    with Path(ctx.data["world"]).open("a", encoding="utf-8") as world:
        world.write(f"{line}\n")


async def reserve(ctx: StageContext) -> StageOutput:
    note(ctx, f"reserve, attempt {ctx.attempt}")
    return StageOutput.ok(shelf=12)


async def charge(ctx: StageContext) -> StageOutput:
    note(ctx, f"charge {ctx.idempotency_key}, attempt {ctx.attempt}")
    if ctx.attempt == 1:
        print("waiting for the bank", flush=True)
        await trio.sleep(3600)
    return StageOutput.ok(paid=ctx.data["amount"])


async def ship(ctx: StageContext) -> StageOutput:
    note(ctx, f"ship, attempt {ctx.attempt}")
    return StageOutput.ok(shelf=ctx.inputs["reserve"]["shelf"], paid=ctx.inputs["charge"]["paid"])


GRAPH = (
    Pipeline("order")
    .with_stage("reserve", reserve)
    .with_stage("charge", charge, after="reserve", kind="work", timeout=None)
    .with_stage("ship", ship, after=["reserve", "charge"])
    .build()
)


async def begin(store_url: str, world: str) -> None:
    """What the child process does, as far as it gets."""
    async with open_store(store_url) as store:
        await GRAPH.run(PipelineContext(run_id=RUN, data={"world": world, "amount": 12}), store=store)


async def go_on(store_url: str) -> StageOutput:
    async with open_store(store_url) as store:
        (info,) = await store.runs()
        assert info.status is RunStatus.RUNNING  # nobody has written that it ended,
        assert not info.held  # and nobody is there who could

        print(await GRAPH.plan_resume(RUN, store=store))
        results = await GRAPH.resume(RUN, store=store)
        assert results.status is RunStatus.SUCCEEDED
        return results["ship"]


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        store_url, world = f"sqlite:{place}/runs.db", f"{place}/world.txt"
        command = [sys.executable, __file__, "child", store_url, world]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()  # now it is in the middle of `charge`
            child.kill()  # SIGKILL: it cannot tidy up, and does not know what hits it

        shipped = trio.run(go_on, store_url)
        assert shipped.data == {"shelf": 12, "paid": 12}

        done = Path(world).read_text("utf-8").splitlines()
        print(*done, sep="\n")
        assert [line.split()[0].strip(",") for line in done] == ["reserve", "charge", "charge", "ship"]
        assert done[1].replace("attempt 1", "attempt 2") == done[2]  # under the same key


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        _, _, store_url, world = sys.argv
        trio.run(begin, store_url, world)
    else:
        main()
