"""The load: websocket clients in a process of their own. `python -m tests.bench.portal.sockets`
reads a plan from standard input.

Plan: {"port", "team": [[session, conversation]], "kind": "streams" or "idle", ...}; the outcome
goes to standard output as JSON. Clients acknowledge as the page does (static/portal/chat.js).
"""

import asyncio
import json
import statistics
import sys
import time

import aiohttp

ACKNOWLEDGE = 32 * 1024  # characters of frames between two acknowledgements
OPENING = 50  # sockets that open at the same time


async def connect(session: aiohttp.ClientSession, port: int, login: str, conversation: int):
    host = f"http://127.0.0.1:{port}"
    headers = {"Cookie": f"sessionid={login}", "Origin": host}
    return await session.ws_connect(
        f"{host}/ws/conversations/{conversation}/", headers=headers, max_msg_size=0
    )


async def stream(socket, question: str, delays: list[float]) -> dict:
    """Asks and reads to the end; how late each token was goes into `delays`, in seconds."""
    begun, first = time.monotonic(), None
    await socket.send_json({"type": "message.send", "content": question})
    tokens = frames = unacknowledged = 0
    async for message in socket:
        now = time.monotonic()
        frame = json.loads(message.data)
        frames += 1
        if frame["type"] == "message.delta":
            first = first or now - begun
            times = frame["text"].split()
            tokens += len(times)
            delays.extend(now - float(moment) for moment in times)
            unacknowledged += len(message.data)
            if unacknowledged >= ACKNOWLEDGE:
                unacknowledged = 0
                await socket.send_json(
                    {"type": "ack", "message": frame["message"], "seq": frame["seq"]}
                )
        elif frame["type"] in ("message.finished", "message.failed", "error"):
            break
    return {"tokens": tokens, "frames": frames, "first": first}


async def streams(session, plan: dict) -> dict:
    """`count` answers of `tokens` tokens, their questions sent `pause` seconds apart.

    With `long` ("TOKENS CHARACTERS") there is one more, which its reader reads or, if `deaf`, does
    not read at all.
    """
    delays: list[float] = []
    team = plan["team"][: plan["count"]]
    sockets = [await connect(session, plan["port"], *member) for member in team]
    beside = []
    if "long" in plan:
        sockets.append(await connect(session, plan["port"], *plan["team"][-1]))
        if plan["deaf"]:
            await sockets[-1].send_json({"type": "message.send", "content": plan["long"]})
        else:
            beside.append(asyncio.create_task(stream(sockets[-1], plan["long"], [])))
    tasks = []
    for socket in sockets[: plan["count"]]:
        tasks.append(asyncio.create_task(stream(socket, str(plan["tokens"]), delays)))
        await asyncio.sleep(plan["pause"])
    found = await asyncio.gather(*tasks)
    await asyncio.gather(*beside)
    for socket in sockets:
        await socket.close()
    quantiles = statistics.quantiles(delays, n=100)
    tokens = sum(one["tokens"] for one in found)
    return {
        "delivered": tokens / (plan["tokens"] * plan["count"]),
        "tokens": tokens,
        "frames": sum(one["frames"] for one in found),
        "first_token_p50_ms": 1000 * statistics.median(one["first"] for one in found),
        "p50_ms": 1000 * quantiles[49],
        "p99_ms": 1000 * quantiles[98],
    }


async def idle(session, plan: dict) -> dict:
    """Opens `count` sockets, holds them for `seconds`; each must then still answer."""
    gate = asyncio.Semaphore(OPENING)

    async def opened(number: int):
        async with gate:
            return await connect(session, plan["port"], *plan["team"][number % len(plan["team"])])

    async def answers(socket) -> bool:
        async with gate:
            await socket.send_json({"type": "hello"})
            return (await socket.receive_json(timeout=20))["type"] == "error"

    begun = time.monotonic()
    tried = await asyncio.gather(
        *(opened(number) for number in range(plan["count"])), return_exceptions=True
    )
    sockets = [socket for socket in tried if not isinstance(socket, BaseException)]
    opening = time.monotonic() - begun
    await asyncio.sleep(plan["seconds"])
    alive = await asyncio.gather(*map(answers, sockets), return_exceptions=True)
    for socket in sockets:
        await socket.close()
    return {"failed": plan["count"] - alive.count(True), "open_seconds": opening}


async def main() -> None:
    plan = json.load(sys.stdin)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        outcome = await {"streams": streams, "idle": idle}[plan["kind"]](session, plan)
    json.dump(outcome | {"cpu_seconds": time.process_time()}, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
