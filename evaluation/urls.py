"""Pages of evaluations."""

from django.urls import path

from evaluation import blind_views, comparison_views, views

urlpatterns = [
    path("evaluations/", views.run_list, name="evaluation_run_list"),
    path("evaluations/new/", views.new_run, name="evaluation_run_new"),
    path("evaluations/compare/", comparison_views.compare, name="evaluation_compare"),
    path("evaluations/leaderboard/", comparison_views.leaderboard, name="evaluation_leaderboard"),
    path("evaluations/<int:pk>/", views.detail, name="evaluation_run"),
    path("evaluations/<int:pk>/cancel/", views.cancel, name="evaluation_run_cancel"),
    path("evaluations/<int:pk>/resume/", views.resume, name="evaluation_run_resume"),
    path("evaluations/<int:pk>/report/", views.report, name="evaluation_report"),
    path("evaluations/<int:pk>/blind/<int:other>/", blind_views.review, name="blind_review"),
    path("evaluations/<int:pk>/blind/<int:other>/result/", blind_views.result, name="blind_result"),
    path("evaluations/<int:pk>/review/", views.review, name="evaluation_run_review"),
    path("evaluations/<int:pk>/rows/<int:row>/", views.note_row, name="evaluation_row"),
]
