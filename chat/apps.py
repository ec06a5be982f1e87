from django.apps import AppConfig
from django.conf import settings
from django.utils.translation import gettext_lazy as _

from chat.explanations import EXPLANATIONS
from chat.worker import router
from portal.explanations import explain


class ChatConfig(AppConfig):
    name = "chat"
    verbose_name = _("Chat")

    def ready(self):
        from chat import checks  # noqa: F401  registers them
        from chat.batches.work import BatchWork
        from chat.fetching.explanations import EXPLANATIONS as FETCHING
        from chat.fetching.work import FetchWork
        from portal.runs.work import register

        router.configure(_worker_settings)
        explain(EXPLANATIONS)
        explain(FETCHING)
        register(FetchWork)
        register(BatchWork)


def _worker_settings() -> router.WorkerSettings:
    return router.WorkerSettings(
        tuple(settings.WORKER_URLS),
        settings.WORKER_TOKEN,
        tuple(settings.UPSTREAMS),
        settings.UPSTREAM_KEY,
    )
