"""Pages of datasets and tuning runs."""

from django.urls import path

from tuning import views
from tuning.datasets import views as dataset_views

urlpatterns = [
    path("datasets/", dataset_views.dataset_list, name="dataset_list"),
    path("datasets/columns/", dataset_views.columns, name="dataset_columns"),
    path("datasets/upload/", dataset_views.upload, name="dataset_upload"),
    path("datasets/<int:pk>/", dataset_views.detail, name="dataset"),
    path("datasets/<int:pk>/split/", dataset_views.split, name="dataset_split"),
    path("datasets/<int:pk>/rename/", dataset_views.rename, name="dataset_rename"),
    path("datasets/<int:pk>/delete/", dataset_views.delete, name="dataset_delete"),
    path("tuning/", views.run_list, name="tuning_run_list"),
    path("tuning/new/", views.new_run, name="tuning_run_new"),
    path("tuning/<int:pk>/", views.detail, name="tuning_run"),
    path("tuning/<int:pk>/steps/<int:step>/", views.publish_step, name="tuning_run_step"),
    path("tuning/<int:pk>/recipe.json", views.recipe_file, name="tuning_run_recipe"),
    path("tuning/<int:pk>/cancel/", views.cancel, name="tuning_run_cancel"),
    path("tuning/<int:pk>/resume/", views.resume, name="tuning_run_resume"),
]
