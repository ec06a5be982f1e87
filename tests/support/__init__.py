"""What several tests share, one module per thing; nothing here is collected as a test.

Folders and files, made in a temporary folder:
    tiny_models.py       a tiny random model of each architecture, its prefixes, and the plain
                         generation that the engine must equal
    chat_families.py     a tiny random checkpoint of each family with its own chat template
    tiny_training.py     a tiny random checkpoint that can be trained: folder, model, rows
    tiny_chatglm.py      ChatGLM folders in the official layout; where golden files may lie
    folders.py           checkpoint and adapter folders to register: the right files, nothing to run
    uploads.py           uploads as people make them: json lines, zip, tar, gzip
    make_vocabulary.py   makes tests/data/chatglm/vocabulary.model (a program, run by hand)

Processes, started for real so that they can be killed for real:
    live_portal.py       `manage.py up` with a data folder of its own; free_port, wait_for
    web_process.py       the web process in front of a pretend worker
    worker_process.py    a worker process around pretend_engine.py or engine_worker.py
    pretend_engine.py    an engine without a model: the last message says what it does
    engine_worker.py     a worker with the real engine on a checkpoint folder
    openai_server.py     a small OpenAI-compatible server, for the backend that asks one
    completions_server.py   one that speaks vLLM's completions, for the backend of vLLM servers
    earlier_portal.py    a database as the first version left it
    launcher.py          what a cluster puts before a run's process: delays, kills, forwards signals

Rows of the database:
    page_fixtures.py     fixtures of the page tests: a member with one of everything, no worker
    page_rows.py         the rows behind them, and text_of(response)
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
