from django.apps import AppConfig
from django.conf import settings
from django.utils.translation import gettext_lazy as _

from chat import worker_client


class ChatConfig(AppConfig):
    name = "chat"
    verbose_name = _("Chat")

    def ready(self):
        worker_client.configure(_places)


def _places() -> worker_client.Places:
    return worker_client.Places(
        tuple(settings.WORKER_URLS), settings.WORKER_TOKEN, tuple(settings.UPSTREAMS), settings.UPSTREAM_KEY
    )
