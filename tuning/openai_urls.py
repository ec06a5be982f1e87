from django.urls import path

from tuning import openai_files, openai_jobs

urlpatterns = [
    path("files", openai_files.files, name="openai-files"),
    path("files/<str:name>", openai_files.file, name="openai-file"),
    path("files/<str:name>/content", openai_files.content, name="openai-file-content"),
    path("fine_tuning/jobs", openai_jobs.jobs, name="openai-jobs"),
    path("fine_tuning/jobs/<str:name>", openai_jobs.job, name="openai-job"),
    path("fine_tuning/jobs/<str:name>/cancel", openai_jobs.cancel, name="openai-job-cancel"),
    path("fine_tuning/jobs/<str:name>/pause", openai_jobs.pause, name="openai-job-pause"),
    path("fine_tuning/jobs/<str:name>/resume", openai_jobs.resume, name="openai-job-resume"),
    path("fine_tuning/jobs/<str:name>/events", openai_jobs.events, name="openai-job-events"),
    path(
        "fine_tuning/jobs/<str:name>/checkpoints",
        openai_jobs.checkpoints,
        name="openai-job-checkpoints",
    ),
]
