from rest_framework.routers import SimpleRouter

from chat.api.rest import AdapterViewSet, CheckpointViewSet, ConversationViewSet, MessageViewSet

router = SimpleRouter()
router.register("checkpoints", CheckpointViewSet)
router.register("adapters", AdapterViewSet)
router.register("conversations", ConversationViewSet)
router.register("messages", MessageViewSet)

urlpatterns = router.urls
