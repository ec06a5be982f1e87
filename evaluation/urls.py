"""Pages of evaluations."""

from django.urls import path

from evaluation import views

urlpatterns = [
    path("evaluations/", views.run_list, name="evaluation_run_list"),
    path("evaluations/new/", views.new_run, name="evaluation_run_new"),
    path("evaluations/<int:pk>/", views.detail, name="evaluation_run"),
    path("evaluations/<int:pk>/cancel/", views.cancel, name="evaluation_run_cancel"),
    path("evaluations/<int:pk>/resume/", views.resume, name="evaluation_run_resume"),
]
