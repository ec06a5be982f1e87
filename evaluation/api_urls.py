from rest_framework.routers import SimpleRouter

from evaluation.api import EvaluationRunViewSet

router = SimpleRouter()
router.register("evaluation-runs", EvaluationRunViewSet, basename="api-evaluation-run")
urlpatterns = router.urls
