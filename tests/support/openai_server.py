"""A small OpenAI-compatible server: `python -m tests.support.openai_server PORT`. Streams the
last message back word by word.

"quirk NAME" streams one of QUIRKS as it stands, "many" refuses max_tokens above 100,
"error" answers 400, "busy" 429, "broken" ends in the middle, "slow" pauses between words; GET
/aborted counts readers that left.
"""

import asyncio
import json
import sys

from aiohttp import web

aborted = 0


def chunk(delta, **choice) -> str:
    choices = [{"index": 0, "delta": delta, "finish_reason": None, **choice}]
    return "data: " + json.dumps({"choices": choices}) + "\n\n"


DONE = "data: [DONE]\n\n"
# What servers and proxies have been seen to send.
QUIRKS = {
    "no-reason": chunk({"content": "kept"}) + DONE,
    "empty-reason": chunk({"content": "kept"}, finish_reason="") + DONE,
    "no-done": chunk({"content": "kept"}, finish_reason="stop"),
    "other-reason": chunk({"content": "kept"}, finish_reason="eos_token") + DONE,
    "empty-data": "data:\n\n: hello\n\nevent: x\ndata: \n\n" + chunk({"content": "kept"}) + DONE,
    "null-usage": chunk({"content": "kept"})
    + 'data: {"choices": [], "usage": {"prompt_tokens": null, "completion_tokens": null}}\n\n'
    + DONE,
    "null-choices": 'data: {"choices": null, "usage": null}\n\n'
    + chunk({"content": "kept"})
    + DONE,
    "lists": "data: ["
    + chunk({"content": "ke"})[6:-2]
    + ", 7, null]\n\n"
    + "data: "
    + json.dumps([json.loads(chunk({"content": "pt"})[6:])])
    + "\n\n"
    + DONE,
    "parts": chunk({"content": [{"type": "text", "text": "ke"}, "pt"]}) + chunk(None) + DONE,
    "carriage-returns": (chunk({"content": "kept"}) + DONE).replace("\n", "\r\n"),
    "reasoning": chunk({"reasoning_content": "why", "content": None})
    + chunk({"reasoning_content": "?"})
    + chunk({"content": "kept"})
    + DONE,
    "tools": chunk({"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "f"}}]})
    + chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a": '}}]})
    + chunk({"tool_calls": [{"index": 0, "function": {"name": "", "arguments": "1}"}}]})
    + chunk({"tool_calls": [{"index": 1, "function": {"name": "g", "arguments": ""}}]})
    + chunk({}, finish_reason="tool_calls")
    + DONE,
    "long-line": chunk({"content": "kept" * 100_000}, finish_reason="stop") + DONE,
    "error": chunk({"content": "kept"}) + 'data: {"error": "out of memory"}\n\n',
    "garbage": chunk({"content": "kept"}) + "data: {nonsense\n\n",
    "cut": chunk({"content": "kept"}),
}


async def models(request):
    return web.json_response({"data": [{"id": "big-model"}]})


async def completions(request):
    global aborted
    body = await request.json()
    if request.headers.get("Authorization") != "Bearer the-key":
        return web.json_response({"error": {"message": "wrong key"}}, status=401)
    if body["model"] != "big-model" or not body["stream"]:
        return web.json_response(
            {"error": {"message": f"no such model: {body['model']}"}}, status=404
        )
    text = body["messages"][-1]["content"]
    if text == "strict" and "top_k" in body:
        return web.json_response(
            {"detail": "Unexpected fields in the request: {'top_k'}"}, status=422
        )
    if text == "error":
        return web.json_response(
            {"error": {"message": "maximum context length is 10 tokens"}}, status=400
        )
    if text == "busy":
        return web.json_response({"error": {"message": "too many requests"}}, status=429)
    if text == "many" and body.get("max_tokens", 0) > 100:
        message = "max_tokens is too large: 4096. This model's maximum context length is 100."
        return web.json_response({"error": {"message": message}}, status=400)
    if text == "whole":
        message = {"role": "assistant", "content": "kept"}
        return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    if text.startswith("quirk "):
        await response.write(QUIRKS[text.split()[1]].encode())
        return response

    async def send(payload):
        await response.write(f"data: {json.dumps(payload)}\n\n".encode())

    words = text.split()
    await send({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
    try:
        for i, word in enumerate(words):
            if text.startswith("broken") and i:
                return response
            await send(
                {"choices": [{"index": 0, "delta": {"content": word + " "}, "finish_reason": None}]}
            )
            if text.startswith("slow"):
                await asyncio.sleep(0.05)
    except (ConnectionError, asyncio.CancelledError):
        aborted += 1
        raise
    await send(
        {
            "choices": [
                {
                    "index": 0,
                    "delta": {},
                    "finish_reason": "length" if body.get("max_tokens") == 1 else "stop",
                }
            ]
        }
    )
    usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)}
    await send({"choices": [], "usage": usage})
    await response.write(b"data: [DONE]\n\n")
    return response


async def count_aborted(request):
    return web.json_response(aborted)


def main():
    application = web.Application()
    application.router.add_get("/v1/models", models)
    application.router.add_post("/v1/chat/completions", completions)
    application.router.add_get("/aborted", count_aborted)
    web.run_app(
        application,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        print=lambda text: print("listening", flush=True),
    )


if __name__ == "__main__":
    main()
