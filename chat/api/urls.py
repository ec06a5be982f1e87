from rest_framework.routers import SimpleRouter

from chat.api.rest import (
    AdapterViewSet,
    CheckpointViewSet,
    ConversationViewSet,
    MessageViewSet,
    ServingSwitchViewSet,
)
from chat.fetching.api import FetchRunViewSet

router = SimpleRouter()
router.register("checkpoints", CheckpointViewSet)
router.register("serving-switches", ServingSwitchViewSet, basename="api-serving-switch")
router.register("adapters", AdapterViewSet)
router.register("conversations", ConversationViewSet)
router.register("messages", MessageViewSet)
router.register("fetch-runs", FetchRunViewSet, basename="api-fetch-run")

urlpatterns = router.urls
