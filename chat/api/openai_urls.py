from django.urls import path

from chat.api import openai, openai_completions, openai_responses

urlpatterns = [
    path("chat/completions", openai.chat_completions, name="openai-chat-completions"),
    path("completions", openai_completions.completions, name="openai-completions"),
    path("responses", openai_responses.responses, name="openai-responses"),
    path("models", openai.models, name="openai-models"),
    path("models/<path:name>", openai.model, name="openai-model"),
]
