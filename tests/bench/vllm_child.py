"""The other side of tests.bench.vllm: vLLM in its own environment, in one process with one thread.

Started with one line of JSON as argument (LLM's settings); answers each line of JSON on stdin with
one on stdout. It imports nothing of this project, whose packages are not installed there.
"""

from __future__ import annotations

import json
import os
import sys
import time

replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever vLLM prints is no reply


def run(llm, jobs: list[dict], concurrent: int) -> dict:
    """`jobs` with at most `concurrent` in flight, as tests.bench.vllm's Run."""
    from vllm import SamplingParams

    waiting = list(enumerate(jobs))[::-1]
    answers, first = [[] for _ in jobs], [0.0 for _ in jobs]
    in_flight, began = 0, time.process_time()
    while waiting or in_flight:
        while waiting and in_flight < concurrent:
            number, job = waiting.pop()
            prompt, extra = {"prompt_token_ids": job["prompt"]}, None
            if job.get("prefix"):
                length = job["length"]
                prompt = {
                    "prompt_token_ids": job["prompt"][:1] * length + job["prompt"],
                    "cache_salt": job["prefix"],
                }
                extra = {"kv_transfer_params": {"prefix": job["prefix"], "length": length}}
            sampling = SamplingParams(
                temperature=0,
                max_tokens=job["tokens"],
                ignore_eos=True,
                detokenize=True,
                extra_args=extra,
            )
            llm.llm_engine.add_request(str(number), prompt, sampling)
            in_flight += 1
        for output in llm.llm_engine.step():
            number = int(output.request_id)
            first[number] = first[number] or time.process_time() - began
            if output.finished:
                answers[number] = list(output.outputs[0].token_ids)
                in_flight -= 1
    spent = time.process_time() - began
    return {"cpu_s": spent, "tokens": sum(map(len, answers)), "first_s": first, "answers": answers}


def main() -> None:
    from vllm import LLM

    llm = LLM(**json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(llm, **json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
