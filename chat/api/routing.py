from django.urls import path

from chat.api.websocket import ConversationConsumer

websocket_urlpatterns = [path("ws/conversations/<int:pk>/", ConversationConsumer.as_asgi())]
