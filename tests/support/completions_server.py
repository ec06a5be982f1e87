"""A small server that speaks vLLM's /v1/completions as vLLM 0.32 was recorded to speak it:
`python -m tests.support.completions_server PORT FINGERPRINT [ADAPTERS]`; with a folder of adapters
it has the connector, without one it ignores what is said of prefixes, as vLLM does.

It answers with the words "a b c ..."; a prompt's last id says how: 2001 at leisure (with
SLOW_SERVER every one), 2002 breaks off, 2003 refuses for want of room, 2004 is busy. GET /last is
the last request's body, GET /asked and /aborted count requests and readers that left.
"""

import asyncio
import json
import os
import string
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

from aiohttp import web

from tests.support import ROOT
from tests.support.live_portal import free_port

KEY = "the-key"
CONTEXT = 64


class CompletionsServer:
    """`with CompletionsServer(fingerprint, adapters) as server:`"""

    def __init__(self, *arguments, **environment: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self.port), *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "listening\n"

    def ask(self, path):
        request = Request(f"{self.url}/{path}", headers={"Authorization": f"Bearer {KEY}"})
        with urlopen(request) as answer:
            return json.load(answer)

    def kill(self):
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()


# -- the process

FINGERPRINT, *ADAPTERS = sys.argv[2:] or [""]
seen = {"last": None, "asked": 0, "aborted": 0}
FAILED = {
    "error": {
        "message": "Internal server error",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
}


@web.middleware
async def with_key(request, handler):
    if request.headers.get("Authorization") != f"Bearer {KEY}":
        return web.json_response({"error": "Unauthorized"}, status=401)
    return await handler(request)


async def models(request):
    names = ("the-model", FINGERPRINT)
    listed = [{"id": name, "object": "model", "max_model_len": CONTEXT} for name in names]
    return web.json_response({"object": "list", "data": listed})


async def completions(request):
    body = seen["last"] = await request.json()
    seen["asked"] += 1
    prefix = body.get("kv_transfer_params", {}).get("prefix")
    fails = bool(ADAPTERS and prefix) and not Path(ADAPTERS[0], prefix).is_dir()
    if not body.get("stream"):
        return web.json_response(FAILED if fails else {"choices": []}, status=500 if fails else 200)
    last = body["prompt"][-1]
    if last == 2003:
        message = "max_tokens=5000 cannot be greater than max_model_len=64. (parameter=max_tokens)"
        return web.json_response({"error": {"message": message, "code": 400}}, status=400)
    if last == 2004:
        return web.json_response({"error": {"message": "too many requests"}}, status=429)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)

    async def send(payload):
        await response.write(f"data: {json.dumps(payload)}\n\n".encode())

    if fails:
        await send(FAILED)
        await response.write(b"data: [DONE]\n\n")
        return response
    count = min(body["max_tokens"], 26)
    try:
        for number, letter in enumerate(string.ascii_lowercase[:count]):
            if last == 2002 and number == 1:
                return response
            text = f"{letter} "
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
            choice |= {"stop_reason": None, "token_ids": [ord(letter)]}
            if body.get("logprobs") is not None:
                choice["logprobs"] = {
                    "text_offset": [2 * number],
                    "token_logprobs": [-0.5],
                    "tokens": [text],
                    "top_logprobs": [{text: -0.5, "other": -1.5}],
                }
            if number == count - 1:
                choice["finish_reason"] = "length" if body["max_tokens"] <= 26 else "stop"
            await send({"object": "text_completion", "choices": [choice]})
            if last == 2001 or "SLOW_SERVER" in os.environ:
                await asyncio.sleep(0.05)
    except (ConnectionError, asyncio.CancelledError):
        seen["aborted"] += 1
        raise
    prompt = len(body["prompt"])
    usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
    await send({"choices": [], "usage": usage})
    await response.write(b"data: [DONE]\n\n")
    return response


async def tell(request):
    return web.json_response(seen[request.path.removeprefix("/")])


def main():
    application = web.Application(middlewares=[with_key])
    application.router.add_get("/v1/models", models)
    application.router.add_post("/v1/completions", completions)
    for name in seen:
        application.router.add_get(f"/{name}", tell)
    web.run_app(
        application,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        print=lambda text: print("listening", flush=True),
    )


if __name__ == "__main__":
    main()
