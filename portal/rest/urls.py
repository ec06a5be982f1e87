from rest_framework.routers import SimpleRouter

from portal.rest.devices import DeviceViewSet
from portal.rest.queue import QueueViewSet

router = SimpleRouter()
router.register("queue", QueueViewSet, basename="api-queue")
router.register("devices", DeviceViewSet, basename="api-devices")

urlpatterns = router.urls
