"""HTTP and websockets. Imports no torch: the web process starts in a second and needs no GPU."""

import gc
import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")

import django

django.setup(set_prefix=False)  # before the imports below: they need the app registry

from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter, URLRouter
from django.conf import settings
from django.urls import resolve, reverse
from servestatic import ServeStaticASGI

from chat.api.routing import websocket_urlpatterns
from chat.conversations.live import recover_in_background
from portal.origins import SameOrigin
from portal.request_bodies import Handler, LimitedBodies
from portal.rest.api_keys import key_first


def nosniff(headers, path, url) -> None:
    headers["X-Content-Type-Options"] = "nosniff"


static = {"root": settings.STATIC_ROOT, "prefix": settings.STATIC_URL, "max_age": 3600}
pages = ServeStaticASGI(Handler(), **static, add_headers_function=nosniff)
uploads = {
    reverse(name)
    for name in ("dataset_upload", "dataset_columns", "api-dataset-list", "openai-files")
}
sockets = URLRouter(websocket_urlpatterns)
application = ProtocolTypeRouter(
    {
        "http": LimitedBodies(pages, uploads),
        "websocket": key_first(sockets, without_key=SameOrigin(AuthMiddlewareStack(sockets))),
    }
)

recover_in_background()  # answers that were in flight when the last web process ended

# A full garbage collection would walk all that the imports left behind (150,000 objects, 0.1 s in
# which no token moves) every few seconds under load. It lives as long as the process: what is
# frozen is not looked at again.
resolve("/")  # imports the views, which otherwise the first request does
gc.collect()
gc.freeze()
