from django.apps import AppConfig
from django.conf import settings
from django.utils.translation import gettext_lazy as _

from chat.worker import router


class ChatConfig(AppConfig):
    name = "chat"
    verbose_name = _("Chat")

    def ready(self):
        router.configure(_places)


def _places() -> router.Places:
    return router.Places(
        tuple(settings.WORKER_URLS),
        settings.WORKER_TOKEN,
        tuple(settings.UPSTREAMS),
        settings.UPSTREAM_KEY,
    )
