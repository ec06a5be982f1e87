"""Pages of datasets and tuning runs."""

from django.urls import path

from tuning import views
from tuning.datasets import chat_views, check_views, editing_views
from tuning.datasets import views as dataset_views

urlpatterns = [
    path("datasets/", dataset_views.dataset_list, name="dataset_list"),
    path("datasets/columns/", dataset_views.columns, name="dataset_columns"),
    path("datasets/upload/", dataset_views.upload, name="dataset_upload"),
    path("datasets/collect/", chat_views.collect, name="answer_collect"),
    path("datasets/<int:pk>/", dataset_views.detail, name="dataset"),
    path("datasets/<int:pk>/split/", dataset_views.split, name="dataset_split"),
    path("datasets/<int:pk>/rename/", dataset_views.rename, name="dataset_rename"),
    path("datasets/<int:pk>/delete/", dataset_views.delete, name="dataset_delete"),
    path("datasets/<int:pk>/rows/new/", editing_views.new_row, name="dataset_row_new"),
    path("datasets/<int:pk>/rows/<str:split>/<int:line>/", editing_views.row, name="dataset_row"),
    path(
        "datasets/<int:pk>/versions/<int:number>/",
        editing_views.difference,
        name="dataset_difference",
    ),
    path("datasets/<int:pk>/review/", editing_views.review, name="dataset_review"),
    path("datasets/<int:pk>/merge/", editing_views.merge, name="dataset_merge"),
    path(
        "datasets/<int:pk>/export/<str:split>.<str:form>",
        editing_views.export,
        name="dataset_export",
    ),
    path("datasets/<int:pk>/check/", check_views.start, name="dataset_check"),
    path("checks/<int:pk>/", check_views.detail, name="check_run"),
    path("checks/<int:pk>/cancel/", check_views.cancel, name="check_run_cancel"),
    path("checks/<int:pk>/resume/", check_views.resume, name="check_run_resume"),
    path("tuning/", views.run_list, name="tuning_run_list"),
    path("tuning/new/", views.new_run, name="tuning_run_new"),
    path("tuning/<int:pk>/", views.detail, name="tuning_run"),
    path("tuning/<int:pk>/steps/<int:step>/", views.publish_step, name="tuning_run_step"),
    path("tuning/<int:pk>/beside/<int:other>/", views.together, name="tuning_run_together"),
    path("tuning/<int:pk>/recipe.json", views.recipe_file, name="tuning_run_recipe"),
    path("tuning/<int:pk>/cancel/", views.cancel, name="tuning_run_cancel"),
    path("tuning/<int:pk>/resume/", views.resume, name="tuning_run_resume"),
]
