"""Pages of evaluations."""

from django.urls import path

from evaluation import views

urlpatterns = [
    path("evaluations/", views.evaluation_run_list, name="evaluation_run_list"),
    path("evaluations/new/", views.evaluation_run_new, name="evaluation_run_new"),
    path("evaluations/<int:pk>/", views.evaluation_run_detail, name="evaluation_run"),
    path("evaluations/<int:pk>/cancel/", views.evaluation_run_cancel, name="evaluation_run_cancel"),
    path("evaluations/<int:pk>/resume/", views.evaluation_run_resume, name="evaluation_run_resume"),
]
