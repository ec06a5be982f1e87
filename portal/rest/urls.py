from rest_framework.routers import SimpleRouter

from portal.rest.queue import QueueViewSet

router = SimpleRouter()
router.register("queue", QueueViewSet, basename="api-queue")

urlpatterns = router.urls
