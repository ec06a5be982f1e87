from django.urls import path

from chat.api import openai, openai_batches, openai_completions, openai_responses

urlpatterns = [
    path("chat/completions", openai.chat_completions, name="openai-chat-completions"),
    path("completions", openai_completions.completions, name="openai-completions"),
    path("responses", openai_responses.responses, name="openai-responses"),
    path("batches", openai_batches.batches, name="openai-batches"),
    path("batches/<str:name>", openai_batches.batch, name="openai-batch"),
    path("batches/<str:name>/cancel", openai_batches.cancel, name="openai-batch-cancel"),
    path("models", openai.models, name="openai-models"),
    path("models/<path:name>", openai.model, name="openai-model"),
]
