"""A worker process with the real engine on a checkpoint folder. It prints "listening", then the id
of each request that it takes.

    python -m tests.support.engine_worker unix:/path.sock TOKEN FOLDER
"""

import asyncio
import sys


def main():
    from chat.checkpoints.describe import fingerprint
    from chat.worker import process
    from chat.worker.serving import OneCheckpoint, Target
    from chat.worker.wire import Address

    url, token, folder = sys.argv[1:]

    def load():
        import torch

        from chat.engine.engine import Engine, EngineConfig
        from chat.engine.loading import load

        torch.set_num_threads(1)
        engine = Engine(load(folder, device="cpu"), EngineConfig(max_rows=4))
        submit = engine.submit

        def told(request, *more, **options):
            print(request.id, flush=True)
            return submit(request, *more, **options)

        engine.submit = told
        return engine

    supply = OneCheckpoint(Target("tiny", fingerprint(folder)), load)
    listening = process.bind(Address.parse(url))
    print("listening", flush=True)
    sys.exit(asyncio.run(process.serve(listening, token, supply)))


if __name__ == "__main__":
    main()
