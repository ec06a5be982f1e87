"""Pages of conversations and models. REST and the websocket have their own files: api_urls.py,
routing.py.
"""

from django.urls import path

from chat import views

urlpatterns = [
    path("chat/", views.new_conversation, name="chat"),
    path("chat/start/", views.start, name="conversation_start"),
    path("chat/<int:pk>/", views.conversation, name="conversation"),
    path("chat/<int:pk>/say/", views.say, name="conversation_say"),
    path("chat/<int:pk>/retry/", views.retry, name="conversation_retry"),
    path("chat/<int:pk>/rename/", views.rename, name="conversation_rename"),
    path("chat/<int:pk>/delete/", views.delete, name="conversation_delete"),
    path("adapters/", views.adapter_list, name="adapter_list"),
    path("adapters/<int:pk>/", views.change_adapter, name="adapter_change"),
    path("checkpoints/new/", views.new_checkpoint, name="checkpoint_new"),
]
