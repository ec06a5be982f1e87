"""Every page in every dress, to compare two states of the templates by eye or pixel by pixel.

    python -m tests.browser.screenshots FOLDER [--only WORD] [--against OTHER_FOLDER]

A portal of its own in a temporary folder, with the same rows and the same clock each time, so that
two states of the code give the same pictures: NAME-LANGUAGE-WIDTH-SCHEME.png. `--against` compares
with pictures taken before, lists those that differ and leaves NAME.diff.png where they do. No model
is up: what the inference worker says is put in its place. Takes about five minutes.
"""

import argparse
import os
import shutil
import sys
import tempfile
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

NOW = datetime(2026, 3, 5, 6, 30, tzinfo=UTC)
WIDTHS = (375, 1440)  # px
NOISE = 3  # of 255 levels a channel: what the browser's edges differ by between two runs
PASSWORD = "correct horse battery"
READY = {
    "state": "ready",
    "checkpoint": "base",
    "device": "cpu",
    "dtype": "float32",
    "active_rows": 2,
    "max_rows": 64,
    "queue": 1,
    "tokens_per_second": 123.4,
    "max_length": 1024,
    "adapters": {"resident": ["a", "b"], "device_bytes": 9_000_000},
    "memory": {"kv_cache_bytes": 300_000_000},
}
worker = {"state": "unavailable"}


@contextmanager
def portal():
    """The URL of a portal that runs in a thread of this process until the block ends."""
    with tempfile.TemporaryDirectory(prefix="portal-pictures-") as folder:
        os.environ["PORTAL_DATA_DIR"] = folder
        os.environ["PORTAL_LOG_LEVEL"] = "ERROR"
        os.environ["DJANGO_SETTINGS_MODULE"] = "portal.settings"
        import django

        django.setup()
        from django.core.management import call_command
        from django.utils import timezone

        from chat.worker import router
        from tests.support.live_portal import free_port

        timezone.now = lambda: NOW
        router.status_sync = lambda *args, **options: _said()
        call_command("migrate", verbosity=0)
        call_command("collectstatic", verbosity=0, interactive=False)
        import uvicorn

        from portal.asgi import application

        port = free_port()
        server = uvicorn.Server(
            uvicorn.Config(application, port=port, log_level="error", lifespan="off")
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


def _said() -> dict:
    from chat.worker.router import WorkerUnavailable

    if worker["state"] == "unavailable":
        raise WorkerUnavailable("nobody there")
    return worker


def fill() -> dict[str, str]:
    """Makes the rows; name of a picture -> path of its page, for those that show one object."""
    from portal.models import ApiKey, User

    mei = User.objects.create_user("mei", password=PASSWORD, first_name="予安", last_name="周")
    User.objects.create_user("newcomer", password=PASSWORD)
    User.objects.create_superuser("chief", password=PASSWORD)
    for name in ("notebook", "old script"):
        ApiKey.create_for(mei, name)
    ApiKey.objects.update(prefix="sk-aBcDeF")  # drawn by chance
    ApiKey.objects.filter(name="old script").update(revoked_at=NOW, last_used_at=ago(days=1))
    base, adapters = _models(mei)
    dataset, datasets = _datasets(mei, base)
    runs = _tuning_runs(mei, dataset, base, adapters) | _evaluations(mei, dataset, base, adapters)
    talk = _conversations(mei, base, adapters)
    return {"conversation": f"/chat/{talk.pk}/", **datasets, **runs}


def ago(**time) -> datetime:
    return NOW - timedelta(**time)


STARTED = {"started_at": ago(minutes=95), "attempt": 1}
ENDED = {**STARTED, "finished_at": ago(minutes=5)}


def _models(owner):
    from django.conf import settings

    from chat.models import Adapter, Checkpoint

    description = {
        "architecture": "Qwen2ForCausalLM",
        "context_length": 1024,
        "parameters": 2_170_000,
    }
    base = Checkpoint.objects.create(
        name="base",
        path=str(settings.BASE_DIR / "chat" / "starter" / "model"),
        fingerprint="f" * 64,
        description=description,
        is_default=True,
        is_starter=True,
    )
    adapters = [
        Adapter.objects.create(
            name=f"裤装 {number}",
            checkpoint=base,
            owner=owner,
            folder=f"adapters/{number}",
            sha256=f"{number}" * 64,
            pre_seq_len=8,
            step=500 if number % 2 else None,
            shared=number == 2,
        )
        for number in range(7)
    ]
    return base, adapters


def _datasets(owner, base):
    from portal.models import Run
    from tests.support.page_rows import json_lines
    from tuning.datasets import editing, store
    from tuning.models import CheckRun, CollectedExample
    from tuning.plan import frozen_inputs

    rows = [
        {
            "content": f"类型#裤*颜色#米白*编号#{row}",
            "summary": f"这条米白色的裤子很好看，第{row}条。",
        }
        for row in range(50)
    ]
    dataset = store.ingest(json_lines(rows), name="广告文案", owner=owner)
    store.add_split(dataset, 5)
    bad = json_lines(
        [{"content": "a", "summary": "b"}, "no object", {"content": 1, "summary": "b"}]
    )
    noted = store.ingest(bad, name="with notes", owner=owner, skip_bad_rows=True)
    edited = store.ingest(json_lines(rows), name="改过的文案", owner=owner)
    fixed = editing.line_of(rows[1]["content"], "这条米白色的裤子百搭又显瘦。")
    added = [editing.line_of("类型#裙*风格#简约", "简约的裙子，怎么搭都好看。")]
    editing.change_rows(edited, base=edited.current, replaced={2: fixed}, excluded=[7], added=added)
    for number, original in enumerate(("", "这条裙子是裤子。", "")):
        CollectedExample.objects.create(
            dataset=edited,
            by=owner,
            prompt="给这条裙子写一句广告",
            response=f"轻盈的面料，走动时像风一样。（{number}）",
            history=[["你好", "你好！"]] * number,
            original=original,
            model_label="base",
        )
    part = {
        "lengths": [[tokens, 4000 // (1 + abs(tokens - 40))] for tokens in range(8, 130, 3)],
        "longest": [[row, 130 - row] for row in range(1, 20)],
    }
    counted = CheckRun.objects.create(
        owner=owner,
        kind=Run.Kind.CHECK,
        name="改过的文案",
        status=Run.Status.SUCCEEDED,
        dataset_version=edited.current,
        checkpoint=base,
        recipe=frozen_inputs(edited.current, "train", base),
        report={
            "rows": 50,
            "near_duplicates": {"count": 2, "pairs": [[9, 3], [31, 12]]},
            "prompt": part,
            "response": part,
        },
        progress=50,
        total=50,
        **ENDED,
    )
    place = f"/datasets/{edited.pk}"
    return dataset, {
        "dataset-edited": f"{place}/",
        "dataset-row": f"{place}/rows/train/2/?checkpoint={base.pk}&max_target_length=20",
        "dataset-row-new": f"{place}/rows/new/",
        "dataset-difference": f"{place}/versions/2/",
        "dataset-review": f"{place}/review/",
        "dataset-check": f"/checks/{counted.pk}/?max_target_length=64",
        "dataset": f"/datasets/{dataset.pk}/",
        "dataset-split": f"/datasets/{dataset.pk}/?split=validation",
        "dataset-notes": f"/datasets/{noted.pk}/",
    }


def _tuning_runs(owner, dataset, base, adapters):
    from chat.models import Adapter
    from portal.models import Run
    from tuning.models import TuningMetric, TuningRun

    recipe = {
        "max_steps": 1500,
        "pre_seq_len": 8,
        "precision": "auto",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "prefix_projection": False,
        "learning_rate": 0.02,
    }
    speed = {"samples_per_second": 12.3, "trainable_parameters": 1_234_567}
    error = {"code": "out_of_memory", "message": "CUDA out of memory: 1.2 GiB"}
    proof = {
        "prompts": 8,
        "tokens": 187,
        "same": 8,
        "gap": 0.0,
        "tolerance": 1e-3,
        "holds": True,
    }
    made = {
        "done": {
            "status": "succeeded",
            "progress": 1500,
            "loss": 1.234,
            "validation_loss": 1.75,
            "result_step": 1400,
            "proof": proof,
            **speed,
            **ENDED,
        },
        "failed": {
            "status": "failed",
            "progress": 700,
            "loss": 2.5,
            "error": error,
            "recipe": {**recipe, "learning_rate": 0.05, "pre_seq_len": 16},
            **ENDED,
        },
        "stopped": {"status": "cancelled", "progress": 3, **ENDED},
        "training": {"status": "running", "phase": "training", "progress": 400, **speed, **STARTED},
        "loading": {"status": "running", "phase": "loading", **STARTED},
        "stopping": {"status": "running", "phase": "saving", "cancel_requested": True, **STARTED},
        "queued": {"status": "queued"},
    }
    runs = {
        name: TuningRun.objects.create(
            owner=owner,
            kind=Run.Kind.TUNING,
            name=name,
            dataset_version=dataset.current,
            checkpoint=base,
            total=1500,
            **{"recipe": recipe, **fields},
        )
        for name, fields in made.items()
    }
    done = runs["done"]
    Adapter.objects.filter(pk__in=[adapters[0].pk, adapters[1].pk]).update(run=done)
    losses = {step: 5 - step / 400 for step in range(10, 1501, 10)}
    TuningMetric.objects.bulk_create(
        TuningMetric(
            run=run,
            step=step,
            loss=loss + 0.4 * (run != done),
            learning_rate=0.1,
            validation_loss=loss + 0.5 if step % 100 == 0 else None,
        )
        for run in (done, runs["failed"])
        for step, loss in losses.items()
        if step <= run.progress
    )
    for step in (500, 1000, 1500):
        (done.steps_folder / f"step-{step}").mkdir(parents=True)
    done.folder.mkdir(parents=True, exist_ok=True)
    log = "".join(f"step {step}  loss {loss:.3f}\n" for step, loss in losses.items())
    done.log_path.write_text(log)
    pages = {f"tuning-{name}": f"/tuning/{run.pk}/" for name, run in runs.items()}
    pages["tuning-compared"] = f"/tuning/{done.pk}/?with={runs['failed'].pk}"
    return pages | {"tuning-like": f"/tuning/new/?like={done.pk}"}


def _evaluations(owner, dataset, base, adapters):
    from evaluation.models import METRICS, EvaluationRun, Prediction
    from portal.models import Run
    from tests.support.page_rows import evaluation

    def compared(low, high, **more):
        plain = evaluation(owner, dataset, base, value=10.0)
        gain = {"value": (low + high) / 2, "low": low, "high": high}
        gains = dict.fromkeys(METRICS, gain)
        return evaluation(
            owner, dataset, base, adapters[0], 40.0, baseline=plain, difference=gains, **more
        )

    def ongoing(name, status, adapter=adapters[1], **more):
        return EvaluationRun.objects.create(
            owner=owner,
            kind=Run.Kind.EVALUATION,
            name=name,
            status=status,
            recipe={},
            dataset_version=dataset.current,
            split="validation",
            checkpoint=base,
            adapter=adapter,
            total=5,
            **more,
        )

    better = compared(28.0, 32.0, **ENDED)
    for row in range(2, 30):
        Prediction.objects.create(
            run=better,
            row=row,
            prompt="类型#裤 " * 9,
            reference="这条裤子很好看",
            text="这条裤子真好看",
            scores=dict.fromkeys(METRICS, 20.0 + row),
        )
    _seen_from_all_sides(better)
    error = {"code": "process_lost", "message": "It ended."}
    predicting = ongoing("predicting", "running", progress=2, phase="predicting", **STARTED)
    lost = ongoing("lost", "failed", progress=2, error=error, **ENDED)
    runs = {
        "better": better,
        "base": better.baseline,
        "worse": compared(-3.0, -1.0),
        "unclear": compared(-1.0, 1.0, failed_rows=2),
        "predicting": predicting,
        "pending": ongoing("pending", "queued"),
        "lost": lost,
        "half": ongoing("half", "running", progress=5, baseline=predicting, **STARTED),
        "orphan": ongoing("orphan", "cancelled", baseline=lost, **ENDED),
        "halting": ongoing("halting", "running", None, cancel_requested=True, **STARTED),
    }
    pages = {f"evaluation-{name}": f"/evaluations/{run.pk}/" for name, run in runs.items()}
    return pages | {
        "evaluation-page-2": f"/evaluations/{better.pk}/?page=2&order=row",
        "evaluation-changes": f"/evaluations/{better.pk}/?marks=changes",
        "evaluation-compare": f"/evaluations/compare/?run={better.pk}",
        "evaluation-leaderboard": "/evaluations/leaderboard/",
        "evaluation-report": f"/evaluations/{better.pk}/report/",
    }


def _seen_from_all_sides(run):
    """Every metric, a forgetting card and a decision, for the richest page."""
    from evaluation.models import EvaluationRun
    from evaluation.rescoring import score_again
    from portal.models import User

    recipe = {"dataset": {"sha256": "s"}}
    EvaluationRun.objects.filter(pk__in=[run.pk, run.baseline_id]).update(recipe=recipe)
    score_again(run.baseline)
    score_again(run)
    answers = [
        {"prompt": "日本的首都是哪座城市？", "base": "东京。", "text": "这条裤子很好看。"}
        | {"base_right": True, "right": False}
    ]
    general = {
        "questions": 64,
        "base_right": 48,
        "right": 47,
        "kept": 46,
        "loss": {"base": 2.31, "tuned": 2.57},
        "answers": answers,
    }
    EvaluationRun.objects.filter(pk=run.pk).update(
        general=general,
        review="approved",
        review_note="前 50 行看过，没有编造。",
        reviewed_by=User.objects.get(username="chief"),
        reviewed_at=NOW,
    )


def _conversations(owner, base, adapters):
    from chat.models import Conversation, Message

    talk = Conversation.objects.create(
        owner=owner, title="问候", checkpoint=base, adapter=adapters[0]
    )
    for number, title in enumerate(["昨天", "last week", ""]):
        other = Conversation.objects.create(owner=owner, title=title, checkpoint=base)
        Conversation.objects.filter(pk=other.pk).update(updated_at=ago(days=1 + 4 * number))
    answers = [
        {
            "content": "**好** `code`\n\n```python\nprint('你好')\n```\n\n- 一\n- 二",
            "usage": {"completion_tokens": 42},
            "timings": {"tokens_per_second": 33.25},
        },
        {
            "content": "长",
            "finish_reason": "length",
            "usage": {"completion_tokens": 512},
            "model_label": "base:裤装 0",
        },
        {"content": "写到一半", "status": "stopped"},
        {"content": "写到", "status": "interrupted"},
        {"status": "failed", "error": {"code": "context_length_exceeded", "message": "Too long."}},
        {"content": "最后\n两行", "usage": {"completion_tokens": 3}},
    ]
    for answer in answers:
        talk.messages.create(role=Message.Role.USER, content="你好\n  第二行 <i>")
        fields = {"model_label": "base", **answer}
        talk.messages.create(role=Message.Role.ASSISTANT, checkpoint=base, **fields)
    return talk


CHIEF = {
    "chief-checkpoint-new": "/checkpoints/new/",
    "chief-admin": "/admin/",
    "chief-admin-evaluations": "/admin/evaluation/evaluationrun/",
    "chief-admin-evaluation": "/admin/evaluation/evaluationrun/2/change/",
    "chief-admin-audit": "/admin/admin/logentry/",
}
PAGES = {
    "home": "/",
    "chat": "/chat/",
    "datasets": "/datasets/",
    "upload": "/datasets/upload/",
    "tuning": "/tuning/",
    "tuning-new": "/tuning/new/",
    "evaluations": "/evaluations/",
    "evaluation-new": "/evaluations/new/",
    "tasks": "/tasks/",
    "account": "/account/",
    "checkpoint-new": "/checkpoints/new/",
    "adapters": "/adapters/",
    "missing": "/missing/",
}


def shoot(folder: Path, only: str = ""):
    from playwright.sync_api import sync_playwright

    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    folder.mkdir(parents=True, exist_ok=True)
    with portal() as url:
        objects = fill()
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for language in ("zh-hans", "en"):
                camera = Camera(browser, url, language, folder, only)
                camera.visit("", {"login": "/login/?next=/"}, _wrong_login)
                camera.visit("newcomer", {f"new-{name}": path for name, path in PAGES.items()})
                camera.visit("chief", CHIEF)
                camera.visit("mei", PAGES | objects, _open_everything)
                worker.update(READY)
                camera.visit("mei", {"tasks-ready": "/tasks/?whose=mine"})
                worker.update(state="loading")
                camera.visit("mei", {"tasks-loading": "/tasks/"})
                worker.update(state="unavailable")
            browser.close()


class Camera:
    def __init__(self, browser, url, language, folder, only):
        self.browser, self.url, self.language = browser, url, language
        self.folder, self.only = folder, only

    def visit(self, user: str, pages: dict[str, str], more=None):
        """Pictures of `pages`, {name: path}, as `user` sees them; "" is nobody.

        `more(camera, page, name)` is called on each for further ones.
        """
        pages = {name: path for name, path in pages.items() if self.only in name}
        if not pages:
            return
        context = self.browser.new_context(
            base_url=self.url, reduced_motion="reduce", timezone_id="Asia/Shanghai"
        )
        cookie = {"name": "django_language", "value": self.language, "url": self.url}
        context.add_cookies([cookie])
        page = context.new_page()
        page.clock.set_fixed_time(NOW)  # timers go on
        if user:
            page.goto("/login/")
            page.fill("#id_username", user)
            page.fill("#id_password", PASSWORD)
            page.press("#id_password", "Enter")
            page.wait_for_url(f"{self.url}/")
        for name, path in pages.items():
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 800})
                page.goto(path)
                self.picture(page, name)
                if more:
                    more(self, page, name)
        context.close()

    def picture(self, page, name: str, schemes=("light", "dark")):
        width = page.viewport_size["width"]
        for scheme in schemes:
            page.emulate_media(color_scheme=scheme)
            page.evaluate("document.fonts.ready")
            path = self.folder / f"{name}-{self.language[:2]}-{width}-{scheme}.png"
            page.screenshot(path=path, full_page=True)


def _wrong_login(camera, page, name):
    page.fill("#id_username", "mei")
    page.fill("#id_password", "wrong")
    page.press("#id_password", "Enter")
    page.locator("#login-error").wait_for()
    camera.picture(page, f"{name}-wrong")


def _open_everything(camera, page, name):
    """What is folded up: menus and details of the page, each dialog, and a form's refusal."""
    if page.locator("main details").count():
        page.evaluate(
            "document.querySelectorAll('main details').forEach((one) => (one.open = true))"
        )
        camera.picture(page, f"{name}-open", ["light"])
    for dialog in page.locator("dialog").all()[:2]:
        dialog.evaluate("dialog => dialog.showModal()")
        camera.picture(page, f"{name}-{dialog.get_attribute('id')}", ["light"])
        dialog.evaluate("dialog => dialog.close()")
    form = {"upload": "#upload", "tuning-new": "#run-form", "evaluation-new": "main form"}.get(name)
    if form:
        for field in page.locator("[name=pre_seq_len], [name=max_examples]").all():
            field.evaluate("field => { field.value = -1 }")
        page.locator(form).evaluate("form => HTMLFormElement.prototype.submit.call(form)")
        page.locator(".error, [role=alert]").first.wait_for()
        camera.picture(page, f"{name}-refused", ["light"])


def compare(before: Path, after: Path) -> list[str]:
    """One line for each picture that differs, or that only one side has."""
    from PIL import Image, ImageChops

    paths = [path for folder in (before, after) for path in folder.glob("*.png")]
    names = {path.name for path in paths if not path.name.endswith(".diff.png")}
    found = []
    for name in sorted(names):
        if not ((before / name).exists() and (after / name).exists()):
            found.append(f"{name}: only on one side")
            continue
        one, other = (Image.open(folder / name).convert("RGB") for folder in (before, after))
        if one.size != other.size:
            found.append(f"{name}: {one.size} -> {other.size}")
            continue
        difference = ImageChops.difference(one, other).point(lambda level: 255 * (level > NOISE))
        box = difference.getbbox()
        if box:
            found.append(f"{name}: differs in {box}")
            difference.save(after / name.replace(".png", ".diff.png"))
    print(f"{len(names)} pictures, {len(found)} differ")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="pages with this in their name")
    parser.add_argument("--against", type=Path, help="pictures of another state")
    options = parser.parse_args()
    shoot(options.folder, options.only)
    if options.against:
        different = compare(options.against, options.folder)
        print("\n".join(different))
        sys.exit(bool(different))
