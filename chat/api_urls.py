from rest_framework.routers import SimpleRouter

from chat.api import AdapterViewSet, CheckpointViewSet, ConversationViewSet, MessageViewSet

router = SimpleRouter()
router.register("checkpoints", CheckpointViewSet, basename="api-checkpoint")
router.register("adapters", AdapterViewSet, basename="api-adapter")
router.register("conversations", ConversationViewSet, basename="api-conversation")
router.register("messages", MessageViewSet, basename="api-message")

urlpatterns = router.urls
