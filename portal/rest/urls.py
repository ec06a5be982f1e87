from rest_framework.routers import SimpleRouter

from portal.budget.api import BudgetViewSet, UsageViewSet
from portal.rest.devices import DeviceViewSet
from portal.rest.queue import QueueViewSet

router = SimpleRouter()
router.register("queue", QueueViewSet, basename="api-queue")
router.register("budget", BudgetViewSet, basename="api-budget")
router.register("usage", UsageViewSet, basename="api-usage")
router.register("devices", DeviceViewSet, basename="api-devices")

urlpatterns = router.urls
