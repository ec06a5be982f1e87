"""Pages of conversations and models. REST and the websocket have their own files: api_urls.py,
routing.py.
"""

from django.urls import path

from chat import views
from chat.conversations import views as turns
from chat.fetching import views as fetching

urlpatterns = [
    path("chat/", views.new_conversation, name="chat"),
    path("chat/start/", views.start, name="conversation_start"),
    path("chat/<int:pk>/", views.conversation, name="conversation"),
    path("chat/<int:pk>/say/", views.say, name="conversation_say"),
    path("chat/<int:pk>/retry/", views.retry, name="conversation_retry"),
    path("chat/<int:pk>/edit/", views.edit, name="conversation_edit"),
    path("chat/<int:pk>/continue/", views.continued, name="conversation_continue"),
    path("chat/<int:pk>/branch/", turns.branch, name="conversation_branch"),
    path("chat/<int:pk>/rate/", turns.rate, name="answer_rate"),
    path("chat/<int:pk>/restore/", turns.restore, name="conversation_restore"),
    path("chat/<int:pk>/share/", turns.share, name="conversation_share"),
    path("chat/search/", turns.search, name="conversation_search"),
    path("shared/<str:token>/", turns.shared, name="conversation_shared"),
    path("comparisons/<int:pk>/", turns.compared, name="comparison"),
    path("chat/<int:pk>/export.<str:form>", turns.export, name="conversation_export"),
    path("chat/<int:pk>/rename/", turns.rename, name="conversation_rename"),
    path("chat/<int:pk>/delete/", turns.delete, name="conversation_delete"),
    path("adapters/", views.adapter_list, name="adapter_list"),
    path("adapters/<int:pk>/", views.change_adapter, name="adapter_change"),
    path("checkpoints/", fetching.checkpoint_list, name="checkpoint_list"),
    path("checkpoints/new/", views.new_checkpoint, name="checkpoint_new"),
    path("checkpoints/fetch/", fetching.start, name="fetch_start"),
    path("checkpoints/endpoints/", fetching.change_endpoints, name="fetch_endpoints"),
    path("checkpoints/orphans/delete/", fetching.delete_orphan, name="orphan_delete"),
    path("checkpoints/<int:pk>/", fetching.checkpoint, name="checkpoint"),
    path("checkpoints/<int:pk>/change/", fetching.change_checkpoint, name="checkpoint_change"),
    path("downloads/<int:pk>/", fetching.detail, name="fetch_run"),
    path("downloads/<int:pk>/cancel/", fetching.cancel, name="fetch_run_cancel"),
    path("downloads/<int:pk>/resume/", fetching.resume, name="fetch_run_resume"),
]
