from django.urls import path

from chat.api import openai

urlpatterns = [
    path("chat/completions", openai.chat_completions, name="openai-chat-completions"),
    path("models", openai.models, name="openai-models"),
    path("models/<path:name>", openai.model, name="openai-model"),
]
