"""Datasets and tuning runs below /api/v1/."""

from tuning.api import tuning_run_urlpatterns
from tuning.datasets.api import dataset_urlpatterns

urlpatterns = [*dataset_urlpatterns, *tuning_run_urlpatterns]
