"""The pages through the door people hold: who sees what, what a form refuses, what is written where. No worker is up here."""

import io
import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
from django.conf import settings as project
from django.core.exceptions import ValidationError
from django.utils import timezone
from django.utils.translation import override

from chat import generation, worker_client
from chat.models import Adapter, Checkpoint, Conversation, Message
from chat.worker_client import WorkerUnavailable
from evaluation.models import METRICS, EvaluationRun, Prediction
from evaluation.views import marked
from portal.models import ApiKey, Run, User
from portal.templatetags.portal import duration, model_name, person, thousands, when
from tuning import datasets
from tuning.models import Dataset, TuningMetric, TuningRun

pytestmark = pytest.mark.django_db

PAGES = [
    "/", "/chat/", "/datasets/", "/datasets/upload/", "/tuning/", "/tuning/new/", "/evaluations/", "/evaluations/new/",
    "/tasks/", "/account/", "/checkpoints/new/", "/adapters/",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    """The worker does not answer; `generation` notes what it was asked for and finds nobody."""
    asked = []

    async def start(message):
        asked.append(message)
        error = {"message": "The inference worker is not up.", "code": "worker_unavailable"}
        await Message.objects.filter(pk=message.pk).aupdate(status=Message.Status.FAILED, error=error)
        raise WorkerUnavailable("The inference worker is not up.")

    def status_sync(*args, **options):
        raise WorkerUnavailable("nobody there")

    monkeypatch.setattr(generation, "start", start)
    monkeypatch.setattr(worker_client, "status_sync", status_sync)
    return asked


@pytest.fixture
def checkpoint(db):
    description = {"architecture": "Qwen2ForCausalLM", "context_length": 1024, "parameters": 2_170_000}
    return Checkpoint.objects.create(
        name="base", path="/nowhere", fingerprint="f" * 64, description=description, is_default=True, is_starter=True
    )


@pytest.fixture
def adapter(checkpoint, member):
    return Adapter.objects.create(
        name="tuned", checkpoint=checkpoint, owner=member, folder="adapters/x", sha256="a" * 64, pre_seq_len=8
    )


def json_lines(rows, name="train.json"):
    file = io.BytesIO("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    file.name = name
    return file


@pytest.fixture
def dataset(member, data_dir):
    rows = [{"content": f"问{row}", "summary": f"答{row}"} for row in range(50)]
    return datasets.ingest(json_lines(rows), name="ads", owner=member)


@pytest.fixture
def tuning_run(member, dataset, checkpoint):
    run = TuningRun.objects.create(
        owner=member, kind=Run.Kind.TUNING, name="my run", task="t", status=Run.Status.RUNNING, progress=20, total=100,
        recipe={"max_steps": 100, "pre_seq_len": 8, "precision": "auto", "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1},
        dataset_version=dataset.current, checkpoint=checkpoint, loss=2.5, started_at=timezone.now(), attempt=1,
    )  # fmt: skip
    points = [TuningMetric(run=run, step=step, loss=5 - step / 10, learning_rate=0.1) for step in range(1, 21)]
    TuningMetric.objects.bulk_create(points)
    return run


def evaluation(owner, dataset, checkpoint, adapter=None, value=10.0, baseline=None, **more):
    scores = {metric: {"value": value, "low": value - 1, "high": value + 1} for metric in METRICS}
    run = EvaluationRun.objects.create(
        owner=owner, kind=Run.Kind.EVALUATION, name="scores", task="t", status=Run.Status.SUCCEEDED, recipe={},
        dataset_version=dataset.current, split="train", checkpoint=checkpoint, adapter=adapter, scores=scores, total=2,
        progress=2, baseline=baseline, **more,
    )  # fmt: skip
    for row, text in enumerate(["今天的裙子很好看", "<b>裤子</b>"]):
        found = dict.fromkeys(METRICS, value + row)
        Prediction.objects.create(run=run, row=row, prompt="p", reference="今天的裙子真好看", text=text, scores=found)
    return run


@pytest.fixture
def evaluated(member, dataset, checkpoint, adapter):
    base = evaluation(member, dataset, checkpoint, value=10.0)
    difference = {metric: {"value": 30.0, "low": 28.0, "high": 32.0} for metric in METRICS}
    return evaluation(member, dataset, checkpoint, adapter, 40.0, baseline=base, difference=difference)


@pytest.fixture
def conversation(member, checkpoint):
    found = Conversation.objects.create(owner=member, title="mine", checkpoint=checkpoint)
    found.messages.create(role="user", content="<i>ask</i>")
    found.messages.create(
        role="assistant", content="**bold** <script>alert(1)</script>", checkpoint=checkpoint, model_label="base"
    )
    return found


def text_of(response) -> str:
    return response.content.decode()


# ---- who sees what


@pytest.mark.parametrize("path", PAGES)
def test_without_a_login_every_page_is_the_login_page(client, path):
    response = client.get(path)
    assert response.status_code == 302
    assert response["Location"].startswith("/login/?next=")


@pytest.mark.parametrize("language", ["zh-hans", "en"])
def test_every_page_answers_in_both_languages_before_anything_exists(client, member, language, data_dir):
    client.force_login(member)
    client.cookies["django_language"] = language
    for path in PAGES:
        response = client.get(path)
        assert response.status_code == 200, path
        assert f'lang="{"zh-Hans" if language == "zh-hans" else "en"}"' in text_of(response)


def test_no_page_has_inline_script_style_or_handlers(
    client, staff, member, conversation, dataset, tuning_run, evaluated
):
    client.force_login(member)
    objects = [
        f"/chat/{conversation.pk}/", f"/datasets/{dataset.pk}/", f"/tuning/{tuning_run.pk}/",
        f"/evaluations/{evaluated.pk}/",
    ]  # fmt: skip
    for path in [*PAGES, *objects]:
        response = client.get(path)
        assert response.status_code == 200, path
        page = text_of(response)
        assert not re.search(r'<[^>]+\s(style|on\w+)="', page), path
        for tag in re.findall(r"<script[^>]*>", page):
            assert " src=" in tag or 'type="application/json"' in tag, path
        assert "<style" not in page
        policy = response["Content-Security-Policy"]
        assert "unsafe-inline" not in policy and "unsafe-eval" not in policy


def test_other_peoples_objects_do_not_exist(client, other_member, conversation, dataset, tuning_run, evaluated):
    client.force_login(other_member)
    for path in [
        f"/chat/{conversation.pk}/", f"/datasets/{dataset.pk}/", f"/tuning/{tuning_run.pk}/",
        f"/evaluations/{evaluated.pk}/",
    ]:  # fmt: skip
        assert client.get(path).status_code == 404, path
    for path in [
        f"/chat/{conversation.pk}/say/", f"/chat/{conversation.pk}/retry/", f"/chat/{conversation.pk}/rename/",
        f"/chat/{conversation.pk}/delete/", f"/datasets/{dataset.pk}/split/", f"/datasets/{dataset.pk}/rename/",
        f"/datasets/{dataset.pk}/delete/", f"/tuning/{tuning_run.pk}/cancel/", f"/tuning/{tuning_run.pk}/resume/",
        f"/evaluations/{evaluated.pk}/cancel/", f"/evaluations/{evaluated.pk}/resume/",
    ]:  # fmt: skip
        assert client.post(path, {"text": "x", "title": "x", "name": "x", "validation": 1}).status_code == 404, path
    assert Conversation.objects.count() == Dataset.objects.count() == 1
    assert not Run.objects.get(pk=tuning_run.pk).cancel_requested


def test_the_tasks_page_shows_others_runs_only_as_busy(client, member, other_member, staff, tuning_run):
    for user, sees in [(member, True), (other_member, False), (staff, True)]:
        client.force_login(user)
        page = text_of(client.get("/tasks/"))
        assert ("my run" in page) is sees
        assert f"#{tuning_run.pk}" in page and "20 / 100" in page


def test_the_rail_tells_how_far_the_running_work_is(client, other_member, tuning_run):
    client.force_login(other_member)
    assert 'stroke-dasharray="20 100"' in text_of(client.get("/chat/"))


# ---- account


def test_a_key_is_shown_once_works_and_can_be_revoked(client, member):
    client.force_login(member)
    page = text_of(client.post("/account/", {"action": "create_key", "name": "my script"}))
    secret = re.search(r"sk-[\w-]{40,}", page)[0]
    assert ApiKey.user_of(secret) == member
    again = text_of(client.get("/account/"))
    assert secret not in again and "my script" in again
    client.post("/account/", {"action": "revoke_key", "key": ApiKey.objects.get().pk})
    assert ApiKey.user_of(secret) is None


def test_nobody_revokes_anothers_key_not_even_staff(client, member, staff):
    key, secret = ApiKey.create_for(member)
    client.force_login(staff)
    assert client.post("/account/", {"action": "revoke_key", "key": key.pk}).status_code == 404
    assert ApiKey.user_of(secret) == member


def test_the_password_changes_only_with_the_old_one_and_the_login_stays(client, member):
    client.force_login(member)
    fields = {"action": "change_password", "new_password1": "staple battery 9", "new_password2": "staple battery 9"}
    client.post("/account/", {**fields, "old_password": "wrong"})
    assert not User.objects.get().check_password("staple battery 9")
    client.post("/account/", {**fields, "old_password": "correct horse battery"})
    assert User.objects.get().check_password("staple battery 9")
    assert client.get("/account/").status_code == 200


def test_the_theme_cookie_is_written_into_the_first_paint_and_nothing_else_is(client, member):
    client.force_login(member)
    client.cookies["theme"] = "dark"
    assert 'data-theme="dark"' in text_of(client.get("/"))
    client.cookies["theme"] = 'x" onload="alert(1)'
    assert "alert(1)" not in text_of(client.get("/"))


# ---- home


def test_first_steps_tick_off_what_is_done(client, member, conversation, tuning_run, adapter):
    client.force_login(member)
    steps = {step["name"]: step for step in client.get("/").context["steps"]}
    assert [name for name, step in steps.items() if step["done"]] == ["chat", "data", "tune"]
    assert steps["evaluate"]["next"] and "next" not in steps["tuned"]


# ---- chat


def test_model_output_is_rendered_safely_and_the_question_is_text(client, member, conversation):
    client.force_login(member)
    page = text_of(client.get(f"/chat/{conversation.pk}/"))
    assert "<strong>bold</strong>" in page and "<script>alert" not in page
    assert "&lt;i&gt;ask&lt;/i&gt;" in page


def test_a_first_message_makes_a_conversation_with_the_chosen_model(client, member, adapter, no_worker):
    client.force_login(member)
    response = client.post("/chat/start/", {"text": "你好", "model": f"adapter-{adapter.pk}", "temperature": "0.5"})
    found = Conversation.objects.get()
    assert response["Location"] == f"/chat/{found.pk}/"
    assert (found.title, found.adapter) == ("你好", adapter)
    answer = found.messages.last()
    assert answer.sampling == {"temperature": 0.5}
    assert [message.pk for message in no_worker] == [answer.pk]
    page = text_of(client.get(response["Location"]))
    assert "The inference worker is not up." in page and 'data-status="failed"' in page


def test_a_refused_message_leaves_nothing_behind(client, member, adapter, other_member):
    client.force_login(other_member)
    for fields in [{"text": " "}, {"text": "x", "model": f"adapter-{adapter.pk}"}, {"text": "x", "model": "base-x"},
                   {"text": "x", "temperature": "9"}]:  # fmt: skip
        response = client.post("/chat/start/", fields, follow=True)
        assert 'role="alert"' in text_of(response)
    assert not Conversation.objects.exists()


def test_answering_again_replaces_the_last_answer_with_the_model_chosen_now(client, member, conversation, adapter):
    client.force_login(member)
    before = conversation.messages.last().pk
    client.post(f"/chat/{conversation.pk}/retry/", {"model": f"adapter-{adapter.pk}", "text": ""})
    assert [message.role for message in conversation.messages.all()] == ["user", "assistant"]
    answer = conversation.messages.last()
    assert answer.pk != before and answer.adapter == adapter
    assert conversation.messages.first().content == "<i>ask</i>"


def test_a_turn_that_is_refused_late_changes_nothing(client, member, conversation, monkeypatch):
    def refuse(*args, **options):
        raise ValidationError("too late")

    monkeypatch.setattr("chat.views.create_turn", refuse)
    client.force_login(member)
    before = list(conversation.messages.values_list("pk", flat=True))
    for path in (f"/chat/{conversation.pk}/retry/", "/chat/start/"):
        assert "too late" in text_of(client.post(path, {"text": "x"}, follow=True))
    assert list(conversation.messages.values_list("pk", flat=True)) == before
    assert Conversation.objects.count() == 1


def test_an_answer_in_flight_is_neither_replaced_nor_joined_by_a_second(client, member, conversation):
    conversation.messages.filter(role="assistant").update(status=Message.Status.STREAMING)
    client.force_login(member)
    for path in ("retry", "say"):
        response = client.post(f"/chat/{conversation.pk}/{path}/", {"text": "more"}, follow=True)
        assert 'role="alert"' in text_of(response)
    assert conversation.messages.count() == 2


def test_an_answer_in_flight_carries_what_the_script_needs_to_go_on(client, member, conversation):
    conversation.messages.filter(role="assistant").update(status=Message.Status.STREAMING, seq=1017)
    client.force_login(member)
    page = text_of(client.get(f"/chat/{conversation.pk}/"))
    assert f'data-socket="/ws/conversations/{conversation.pk}/"' in page
    assert 'data-status="streaming" data-seq="1017"' in page
    assert "&lt;script&gt;alert(1)" in page  # still text


def test_conversations_are_renamed_and_deleted_by_their_owner(client, member, conversation):
    client.force_login(member)
    client.post(f"/chat/{conversation.pk}/rename/", {"title": "new"})
    assert Conversation.objects.get().title == "new"
    client.post(f"/chat/{conversation.pk}/delete/")
    assert not Conversation.objects.exists()


def test_many_adapters_go_into_a_menu_with_the_chosen_one_in_front(client, member, adapter, checkpoint):
    for number in range(9):
        Adapter.objects.create(
            name=f"a{number}", checkpoint=checkpoint, folder="x", sha256=str(number) * 64, pre_seq_len=8
        )
    client.force_login(member)
    picker = client.get(f"/chat/?adapter={adapter.pk}").context["picker"]
    assert picker["chosen"]["adapter"] == adapter and picker["chosen"] in picker["chips"]
    assert len(picker["chips"]) == 1 + 4 and len(picker["more"]) == 6


def test_only_staff_add_models(client, member, staff, tmp_path):
    client.force_login(member)
    assert client.post("/checkpoints/new/", {"path": str(tmp_path)}).status_code == 403
    client.force_login(staff)
    page = text_of(client.post("/checkpoints/new/", {"path": str(tmp_path / "nothing")}))
    assert 'aria-invalid="true"' in page and not Checkpoint.objects.exists()


def test_what_the_panel_leaves_alone_is_not_sent(client, member, checkpoint, no_worker):
    client.force_login(member)
    fields = {"temperature": "0.95", "top_p": "0.7", "max_new_tokens": "512", "seed": "", "text": "x"}
    client.post("/chat/start/", fields)
    client.post("/chat/start/", {**fields, "max_new_tokens": "64", "seed": "0"})
    checkpoint.description = {"sampling": {"temperature": 0.2}}  # what its folder wishes
    checkpoint.save()
    client.post("/chat/start/", {**fields, "temperature": "0.2"})
    client.post("/chat/start/", fields)
    plain, changed, wished, against = Message.objects.filter(role="assistant").order_by("id")
    assert plain.sampling == {} and changed.sampling == {"max_new_tokens": 64, "seed": 0}
    assert wished.sampling == {"temperature": 0.2} and against.sampling == {"temperature": 0.95}
    panel = client.get("/chat/").context["sampling"]["temperature"]
    assert panel == {"default": 0.2, "value": 0.2}
    panel = client.get(f"/chat/{against.conversation_id}/").context["sampling"]["temperature"]
    assert panel["value"] == 0.95  # as the last answer was written


def test_an_error_is_explained_in_the_readers_language(client, member, conversation):
    error = {"code": "context_length_exceeded", "message": "the prompt has 2000 tokens"}
    conversation.messages.filter(role="assistant").update(status=Message.Status.FAILED, error=error)
    client.force_login(member)
    for language, words in [("zh-hans", "超出了模型的上下文"), ("en", "does not fit into the model&#x27;s context")]:
        client.cookies["django_language"] = language
        page = text_of(client.get(f"/chat/{conversation.pk}/"))
        assert words in page and 'title="the prompt has 2000 tokens"' in page


def test_an_adapter_is_shared_renamed_and_deleted_by_its_owner_alone(client, member, other_member, adapter, data_dir):
    path = f"/adapters/{adapter.pk}/"
    client.force_login(other_member)
    assert "tuned</span>" not in text_of(client.get("/adapters/"))
    assert client.post(path, {"action": "share"}).status_code == 404
    client.force_login(member)
    client.post(path, {"action": "share"})
    client.post(path, {"action": "rename", "name": "mine: no"})  # a colon is OpenAI's separator
    client.force_login(other_member)
    assert "tuned</span>" in text_of(client.get("/adapters/"))
    assert client.post(path, {"action": "delete"}).status_code == 404  # seen, but not theirs
    client.force_login(member)
    client.post(path, {"action": "rename", "name": "better"})
    assert Adapter.objects.get().name == "better"
    client.post(path, {"action": "delete"})
    assert not Adapter.objects.exists()


@pytest.mark.parametrize("language", ["zh-hans", "en"])
def test_a_page_that_is_not_there_says_so_in_the_portals_look(client, member, language):
    client.force_login(member)
    client.cookies["django_language"] = language
    response = client.get("/chat/999999/")
    assert response.status_code == 404 and 'class="empty"' in text_of(response)


# ---- datasets


def test_an_upload_is_checked_stored_and_shown(client, member, data_dir):
    client.force_login(member)
    file = json_lines([{"content": "<b>裤</b>", "summary": "好看"}, {"content": "裙", "summary": ""}], "my ads.jsonl")
    response = client.post("/datasets/upload/", {"file": file, "name": ""}, follow=True)
    found = Dataset.objects.get()
    page = text_of(response)
    assert (found.name, found.owner, found.prompt_column) == ("my ads", member, "content")
    assert "&lt;b&gt;裤&lt;/b&gt;" in page and "<b>裤</b>" not in page
    assert found.problems[0]["line"] == 2 and str(found.problems[0]["message"]) in page


def test_the_uploading_script_is_told_where_the_dataset_is(client, member, data_dir):
    client.force_login(member)
    fields = {"file": json_lines([{"content": "a", "summary": "b"}])}
    response = client.post("/datasets/upload/", fields, headers={"Accept": "application/json"})
    assert (response.status_code, response.json()) == (201, {"url": f"/datasets/{Dataset.objects.get().pk}/"})


def test_a_bad_upload_names_the_lines_and_stores_nothing(client, member, data_dir):
    client.force_login(member)
    file = io.BytesIO(b'{"content": "a", "summary": "b"}\nnot json\n{"content": 1, "summary": "b"}\n')
    file.name = "bad.json"
    response = client.post("/datasets/upload/", {"file": file, "name": "x", "prompt_column": "content",
                                                 "response_column": "summary"})  # fmt: skip
    assert response.status_code == 422
    assert [kind["lines"] for kind in response.context["kinds"]] == [[2], [3]]
    assert 'value="content"' in text_of(response)  # the form is kept
    assert not Dataset.objects.exists() and not list((data_dir / "datasets").glob("*.jsonl"))


def test_columns_are_suggested_from_the_head_of_a_file_cut_anywhere(client, member, data_dir):
    client.force_login(member)
    head = json_lines([{"prompt": "问", "response": "答"}] * 3).getvalue()[:-7]
    file = io.BytesIO(head)
    file.name = "x.json"
    found = client.post("/datasets/columns/", {"file": file}).json()
    assert (found["prompt_column"], found["response_column"]) == ("prompt", "response")
    empty = io.BytesIO(b"\n")
    empty.name = "x.json"
    refused = client.post("/datasets/columns/", {"file": empty})
    assert refused.status_code == 400 and refused.json()["problem"]
    broken = io.BytesIO(b"\nhello\n")
    broken.name = "x.json"
    client.cookies["django_language"] = "en"
    told = client.post("/datasets/columns/", {"file": broken}).json()["problem"]
    assert told == "Line 2: This line is not JSON (at character 1)."


def test_rows_are_paged_and_validation_rows_set_aside(client, member, dataset):
    client.force_login(member)
    page = client.get(f"/datasets/{dataset.pk}/?page=3")
    assert [row["prompt"] for row in page.context["rows"]] == [f"问{row}" for row in range(40, 50)]
    refused = client.post(f"/datasets/{dataset.pk}/split/", {"validation": 50, "seed": 1})
    assert refused.status_code == 422 and refused.context["split_form"].errors["validation"]
    client.post(f"/datasets/{dataset.pk}/split/", {"validation": 10, "seed": 1})
    page = client.get(f"/datasets/{dataset.pk}/?split=validation")
    assert len(page.context["rows"]) == 10 and not page.context["can_split"]


def test_a_dataset_in_use_is_not_deleted(client, member, dataset, tuning_run):
    client.force_login(member)
    response = client.post(f"/datasets/{dataset.pk}/delete/", follow=True)
    assert 'role="alert"' in text_of(response) and Dataset.objects.filter(deleted_at=None).exists()
    Run.objects.update(status=Run.Status.SUCCEEDED)
    client.post(f"/datasets/{dataset.pk}/delete/")
    assert client.get(f"/datasets/{dataset.pk}/").status_code == 404


# ---- tuning


def filled(client, path="/tuning/new/", **changes) -> dict:
    """What a browser would send: the form's own values with `changes`."""
    form = client.get(path).context["form"]
    values = {name: form[name].value() for name in form.fields}
    values["dataset"], values["checkpoint"] = Dataset.objects.first().pk, Checkpoint.objects.first().pk
    return {name: value for name, value in {**values, **changes}.items() if value is not None and value is not False}


def test_the_preset_of_the_checkpoint_starts_a_run_as_it_stands(client, member, dataset, checkpoint):
    client.force_login(member)
    response = client.post("/tuning/new/", filled(client, name="first"))
    run = TuningRun.objects.get()
    assert response["Location"] == f"/tuning/{run.pk}/"
    assert (run.name, run.owner, run.status) == ("first", member, Run.Status.QUEUED)
    assert run.recipe["preset"] == "starter" and run.recipe["max_steps"] == run.total


def test_every_wrong_value_is_said_at_its_field_and_nothing_starts(client, member, dataset, checkpoint):
    client.force_login(member)
    wrong = filled(client, pre_seq_len="0", learning_rate="fast", max_steps="-3", dataset="999")
    form = client.post("/tuning/new/", wrong).context["form"]
    assert {"learning_rate", "dataset"} <= set(form.errors)
    wrong = filled(client, pre_seq_len="0", max_steps="-3")
    response = client.post("/tuning/new/", wrong)
    assert {"pre_seq_len", "max_steps"} <= set(response.context["form"].errors)
    assert 'value="-3"' in text_of(response)  # what was typed is kept
    assert not TuningRun.objects.exists()


def test_a_new_run_like_an_earlier_one_has_its_recipe(client, member, tuning_run):
    client.force_login(member)
    form = client.get(f"/tuning/new/?like={tuning_run.pk}").context["form"]
    assert (form["pre_seq_len"].value(), form["max_steps"].value()) == (8, 100)


def test_a_running_run_shows_its_curve_and_refreshes_an_ended_one_does_not(client, member, tuning_run):
    client.force_login(member)
    path = f"/tuning/{tuning_run.pk}/"
    response = client.get(path)
    assert response.context["chart"]["points"][-1] == (20, 3.0)
    assert "data-live-every" in text_of(response)
    assert "<dd>auto</dd>" not in text_of(response)  # the form calls it automatic
    Run.objects.update(status=Run.Status.FAILED, error={"code": "nan_loss", "message": "The loss is not a number."})
    page = text_of(client.get(path))
    assert "The loss is not a number." in page and "data-live-every" not in page


def test_a_long_run_is_thinned_to_what_a_chart_can_show(client, member, tuning_run):
    points = [TuningMetric(run=tuning_run, step=step, loss=1.0, learning_rate=0.1) for step in range(21, 3001)]
    TuningMetric.objects.bulk_create(points)
    client.force_login(member)
    shown = client.get(f"/tuning/{tuning_run.pk}/").context["chart"]["points"]
    assert len(shown) <= 601 and shown[0][0] == 1 and shown[-1][0] == 3000


def test_the_log_is_shown_from_a_lines_beginning(client, member, tuning_run, data_dir):
    folder = data_dir / "runs" / str(tuning_run.pk)
    folder.mkdir(parents=True)
    (folder / "run.log").write_text("".join(f"line {number} <x>\n" for number in range(3000)))
    client.force_login(member)
    log = client.get(f"/tuning/{tuning_run.pk}/").context["log"]
    assert log.startswith("line ") and log.endswith("line 2999 <x>\n") and len(log) <= 16_000


def test_stop_asks_the_run_and_go_on_queues_a_failed_one(client, member, tuning_run):
    client.force_login(member)
    client.post(f"/tuning/{tuning_run.pk}/cancel/")
    assert Run.objects.get().cancel_requested
    Run.objects.update(status=Run.Status.FAILED)
    client.post(f"/tuning/{tuning_run.pk}/resume/")
    assert Run.objects.get().status == Run.Status.QUEUED


# ---- evaluation


def test_an_evaluation_shows_base_beside_tuned_with_intervals_and_a_verdict(client, member, evaluated):
    client.force_login(member)
    response = client.get(f"/evaluations/{evaluated.pk}/")
    page = text_of(response)
    assert response.context["verdict"] == "better"
    assert page.count('class="ci0" y') == page.count('class="ci1" y') == 4
    assert "10.00 → <strong" in page and "+30.00" in page
    lines = response.context["scale"]["lines"]
    assert [mark["tuned"] for mark in lines[0]["marks"]] == [False, True]
    assert "10.00" in text_of(client.get("/evaluations/")) and "40.00" in text_of(client.get("/evaluations/"))


@pytest.mark.parametrize(("low", "high", "verdict"), [(-2, -1, "worse"), (-1, 1, "unclear")])
def test_the_verdict_follows_the_intervals(client, member, evaluated, low, high, verdict):
    evaluated.difference = {metric: {"value": 0, "low": low, "high": high} for metric in METRICS}
    evaluated.save()
    client.force_login(member)
    assert client.get(f"/evaluations/{evaluated.pk}/").context["verdict"] == verdict


def test_rows_are_ordered_and_marked(client, member, evaluated):
    Prediction.objects.filter(run=evaluated, row=1).update(scores=dict.fromkeys(METRICS, 1.0))
    client.force_login(member)
    worst = client.get(f"/evaluations/{evaluated.pk}/").context["rows"]
    assert [row["number"] for row in worst] == [2, 1]
    assert (worst[0]["rouge_l"], worst[0]["base_rouge_l"]) == (1.0, 11.0)
    in_order = client.get(f"/evaluations/{evaluated.pk}/?order=row").context["rows"]
    assert [row["number"] for row in in_order] == [1, 2]
    assert "&lt;b&gt;" in in_order[1]["text"]


def test_marks_show_what_a_text_shares_with_the_reference():
    assert (
        marked("今天的裙子真好看", "今天的裙子很好看")
        == '<mark class="same">今天的裙子</mark>很<mark class="same">好看</mark>'
    )
    assert marked("a<b>c", "x<b>y") == 'x<mark class="same">&lt;b&gt;</mark>y'
    assert marked("", "<i>") == "&lt;i&gt;"


def test_an_evaluation_is_started_with_its_base(client, member, dataset, adapter):
    client.force_login(member)
    form = client.get(f"/evaluations/new/?adapter={adapter.pk}").context["form"]
    assert form["model"].value() == f"adapter-{adapter.pk}"
    fields = {"model": f"adapter-{adapter.pk}", "dataset": dataset.pk, "decoding": "greedy", "with_baseline": "on"}
    refused = client.post("/evaluations/new/", {**fields, "max_examples": "0"})
    assert refused.context["form"].errors["max_examples"] and not EvaluationRun.objects.exists()
    response = client.post("/evaluations/new/", {**fields, "max_examples": "5"})
    run = EvaluationRun.objects.get(adapter=adapter)
    assert response["Location"] == f"/evaluations/{run.pk}/"
    assert run.baseline.adapter is None and run.baseline.total == run.total == 5


# ---- words


def test_durations_times_and_names_as_people_say_them():
    with override("en"):
        assert [duration(seconds) for seconds in (7.6, 125, 3780, None)] == ["8 s", "2 min 05 s", "1 h 03 min", ""]
        now = timezone.localtime()
        assert when(now) == f"today {now:%H:%M}" and when(None) == ""
        assert str((now - timedelta(days=800)).year) in when(now - timedelta(days=800))
        assert model_name("base:tuned") == "tuned" and model_name("base") == "base · prefix off"
    assert thousands(1234567) == "1,234,567" and thousands("") == ""
    assert person(User(username="u", first_name="予安", last_name="周")) == "周予安"
    assert person(User(username="u", first_name="Ann", last_name="Lee")) == "Ann Lee"
    assert person(User(username="u")) == "u"


def test_every_text_has_its_chinese_and_the_compiled_catalogue_is_up_to_date():
    import gettext

    folder = Path(project.BASE_DIR) / "locale" / "zh_Hans" / "LC_MESSAGES"
    source = (folder / "django.po").read_text(encoding="utf-8")
    entries = re.findall(r"^msgid (.+?)^(?:msgid_plural .+?^)?msgstr(?:\[0\])? (.+?)(?=\n\n|\Z)", source, re.S | re.M)
    told = {joined(text): joined(chinese) for text, chinese in entries}
    del told[""]
    assert len(told) > 300
    assert [text for text, chinese in told.items() if not chinese] == []
    assert "fuzzy" not in source.split("\n\n", 1)[1]
    with open(folder / "django.mo", "rb") as file:
        compiled = gettext.GNUTranslations(file)._catalog
    assert {text for text in told if compiled.get(text, compiled.get((text, 0))) != told[text]} == set()


def joined(quoted: str) -> str:
    """The string that a run of quoted lines of a .po file means."""
    return "".join(json.loads(line) for line in quoted.strip().splitlines() if line.startswith('"'))
