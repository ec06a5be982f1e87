"""/v1/files and /v1/fine_tuning/jobs, driven by the official client inside the process."""

import json

import httpx2
import openai
import pytest
from asgiref.sync import sync_to_async
from django.core.asgi import get_asgi_application
from django.utils import timezone

from chat.models import Adapter
from portal.models import ApiKey, Run
from tuning.models import Dataset, TuningMetric, TuningRun

pytestmark = pytest.mark.django_db(transaction=True)
TURNS = [
    {
        "messages": [
            {"role": "user", "content": f"问{number}"},
            {"role": "assistant", "content": f"答{number}"},
        ]
    }
    for number in range(10)
]
JSONL = "\n".join(json.dumps(turn, ensure_ascii=False) for turn in TURNS).encode()


def client_of(user) -> openai.AsyncOpenAI:
    transport = httpx2.ASGITransport(app=get_asgi_application())
    return openai.AsyncOpenAI(
        base_url="http://localhost/v1",
        api_key=ApiKey.create_for(user)[1],
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
    )


@pytest.fixture
def client(member, checkpoint, data_dir):
    return client_of(member)


@pytest.fixture
def other_client(other_member):
    return client_of(other_member)


async def upload(client, content=JSONL, name="train.jsonl"):
    return await client.files.create(file=(name, content), purpose="fine-tune")


async def test_a_training_file_uploads_unchanged_and_comes_back(client, other_client):
    file = await upload(client)
    assert (file.object, file.filename, file.purpose, file.status) == (
        "file",
        "train.jsonl",
        "fine-tune",
        "processed",
    )
    assert (await client.files.retrieve(file.id)).id == file.id
    assert [each.id async for each in client.files.list()] == [file.id]
    content = (await client.files.content(file.id)).text
    assert [json.loads(line) for line in content.splitlines()] == TURNS
    for stranger in (other_client.files.retrieve, other_client.files.delete):
        with pytest.raises(openai.NotFoundError):
            await stranger(file.id)
    assert (await client.files.delete(file.id)).deleted
    assert not await Dataset.objects.filter(deleted_at=None).aexists()


async def test_a_bad_file_is_refused_with_its_line(client):
    with pytest.raises(openai.BadRequestError, match="2") as refused:
        await upload(client, JSONL.splitlines()[0] + b"\nnot json\n")
    assert refused.value.param == "file" and refused.value.body["problems"][0]["line"] == 2
    with pytest.raises(openai.BadRequestError) as refused:
        await client.files.create(file=("a.jsonl", JSONL), purpose="vision")
    assert refused.value.param == "purpose"


async def test_pages_go_on_after_an_id(client):
    files = [(await upload(client, name=f"{number}.jsonl")).id for number in range(3)]
    first = await client.files.list(limit=2)
    assert ([file.id for file in first.data], first.has_more) == (files[:0:-1], True)
    assert [file.id async for file in client.files.list(limit=2)] == files[::-1]


async def test_a_job_is_a_tuning_run(client, other_client, member):
    file, validation = await upload(client), await upload(client, name="dev.jsonl")
    job = await client.fine_tuning.jobs.create(
        model="base",
        training_file=file.id,
        validation_file=validation.id,
        suffix="house",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": 3,
                    "batch_size": 4,
                    "learning_rate_multiplier": 0.5,
                    "prefix_len": 16,
                }
            },
        },
    )
    run = await TuningRun.objects.aget()
    recipe = run.recipe
    assert (run.owner_id, run.name, run.status) == (member.pk, "house", "queued")
    numbers = (recipe["max_steps"], recipe["pre_seq_len"], recipe["seed"], recipe["learning_rate"])
    assert numbers == (8, 16, 7, 1e-2)
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 4
    assert (job.status, job.object, job.fine_tuned_model) == ("queued", "fine_tuning.job", None)
    assert (job.model, job.training_file, job.validation_file) == ("base", file.id, validation.id)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (3, 4)
    assert (job.metadata, job.seed) == ({"team": "a"}, 7)
    assert [each.id async for each in client.fine_tuning.jobs.list()] == [job.id]
    with pytest.raises(openai.NotFoundError):
        await other_client.fine_tuning.jobs.retrieve(job.id)
    with pytest.raises(openai.ConflictError):
        await client.files.delete(file.id)
    cancelled = await client.fine_tuning.jobs.cancel(job.id)
    assert (cancelled.status, cancelled.finished_at is not None) == ("cancelled", True)
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        await client.fine_tuning.jobs.cancel(job.id)


async def test_auto_is_the_checkpoints_preset(client):
    file = await upload(client)
    everything = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    for more in ({}, {"hyperparameters": everything}):
        await client.fine_tuning.jobs.create(model="base", training_file=file.id, **more)
    first, second = [run.recipe async for run in TuningRun.objects.all()]
    assert {**first, "metadata": None} == {**second, "metadata": None}


async def test_what_a_job_did_is_told_as_events_and_checkpoints(client, member, checkpoint):
    file = await upload(client)
    job = await client.fine_tuning.jobs.create(model="base", training_file=file.id)
    run = await TuningRun.objects.aget()
    for step in (10, 20):
        await TuningMetric.objects.acreate(run=run, step=step, loss=3 / step, learning_rate=0.1)
    adapter = await Adapter.objects.acreate(
        name="house", checkpoint=checkpoint, owner=member, run=run, step=20, pre_seq_len=4
    )
    now = timezone.now()
    await TuningRun.objects.filter(pk=run.pk).aupdate(
        status=Run.Status.SUCCEEDED, started_at=now, finished_at=now, total=20, loss=0.15
    )
    job = await client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", adapter.name)
    events = [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert [event.type for event in events] == ["message"] * 2 + ["metrics"] * 2 + ["message"] * 2
    assert events[2].data["train_loss"] == 0.15 and "house" in events[1].message
    (saved,) = [each async for each in client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert (saved.fine_tuned_model_checkpoint, saved.step_number) == ("house", 20)


async def test_a_failed_job_says_why(client):
    file = await upload(client)
    job = await client.fine_tuning.jobs.create(model="base", training_file=file.id)
    error = {"code": "out_of_memory", "message": "no memory"}
    await TuningRun.objects.aupdate(
        status=Run.Status.FAILED, error=error, finished_at=timezone.now()
    )
    job = await client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.error.code, job.error.message) == (
        "failed",
        "out_of_memory",
        "no memory",
    )
    newest = (await client.fine_tuning.jobs.list_events(job.id)).data[0]
    assert (newest.level, "no memory" in newest.message) == ("error", True)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"model": "gpt-4o"}, "model"),
        ({"training_file": "file-999"}, "training_file"),
        ({"training_file": "nonsense"}, "training_file"),
        ({"validation_file": "file-999"}, "validation_file"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta"),
        ({"hyperparameters": {"prefix_len": 0}}, "pre_seq_len"),
        ({"seed": -1}, "seed"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
    ],
)
async def test_a_bad_job_is_refused_by_the_parameters_name(client, wish, param):
    file = await upload(client)
    with pytest.raises(openai.BadRequestError) as refused:
        await client.fine_tuning.jobs.create(**{"model": "base", "training_file": file.id, **wish})
    assert refused.value.param == param and not await TuningRun.objects.aexists()


async def test_staff_see_and_cancel_what_others_may_not(client, other_client, staff):
    file = await upload(client)
    job = await client.fine_tuning.jobs.create(model="base", training_file=file.id)
    chief = await sync_to_async(client_of)(staff)
    with pytest.raises(openai.NotFoundError):
        await other_client.fine_tuning.jobs.cancel(job.id)
    assert (await chief.fine_tuning.jobs.cancel(job.id)).status == "cancelled"


async def test_a_training_file_may_be_larger_than_a_body(member, checkpoint, data_dir):
    """Through the whole application, which bounds bodies before any view."""
    from portal.asgi import application

    transport = httpx2.ASGITransport(app=application)
    client = (await sync_to_async(client_of)(member)).with_options(
        http_client=httpx2.AsyncClient(transport=transport)
    )
    row = {"messages": [{**turn, "content": "长" * 2000} for turn in TURNS[0]["messages"]]}
    content = "\n".join([json.dumps(row, ensure_ascii=False)] * 600).encode()
    assert len(content) > 7_000_000
    assert (await upload(client, content)).status == "processed"


async def test_a_job_is_paused_and_goes_on(client, other_client):
    file = await upload(client)
    job = await client.fine_tuning.jobs.create(model="base", training_file=file.id)
    with pytest.raises(openai.BadRequestError, match="queued"):
        await client.fine_tuning.jobs.resume(job.id)
    with pytest.raises(openai.NotFoundError):
        await other_client.fine_tuning.jobs.pause(job.id)
    paused = await client.fine_tuning.jobs.pause(job.id)
    assert paused.status == "paused"
    events = [event.message async for event in client.fine_tuning.jobs.list_events(job.id)]
    assert events[0] == "The job was paused"
    with pytest.raises(openai.BadRequestError, match="paused"):
        await client.fine_tuning.jobs.pause(job.id)
    assert (await client.fine_tuning.jobs.resume(job.id)).status == "queued"
    assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        await client.fine_tuning.jobs.resume(job.id)


@pytest.mark.parametrize(
    "hyper",
    ["x", 7, [1], {"n_epochs": 10**400}, {"learning_rate_multiplier": 1e308}, {"batch_size": -1}],
)
async def test_hyperparameters_that_are_none_are_refused(client, hyper):
    file = await upload(client)
    for body in (
        {"hyperparameters": hyper},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": hyper}}},
    ):
        with pytest.raises(openai.BadRequestError, match="hyperparameters"):
            await client.fine_tuning.jobs.create(
                model="base", training_file=file.id, extra_body=body
            )
