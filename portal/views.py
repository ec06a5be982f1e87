"""Home, tasks, account and health: the pages that look at all apps."""

from django.contrib.auth.decorators import login_not_required
from django.http import HttpResponse, JsonResponse


@login_not_required
def root(request):
    return HttpResponse("home")


@login_not_required
def healthz(request):
    return JsonResponse({"status": "ok"})


def tasks(request):
    return HttpResponse("tasks")


def account(request):
    return HttpResponse("account")
