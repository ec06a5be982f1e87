"""Home, tasks and account: the pages that look at all apps."""

from django.contrib.auth.decorators import login_not_required
from django.contrib.auth.views import redirect_to_login
from django.shortcuts import render
from django.views.decorators.csrf import csrf_exempt


@csrf_exempt  # a POST is a script's, told apart by its key; the GET changes nothing
@login_not_required
async def root(request):
    """GET: the home page. POST: what ChatGLM-6B's api.py answered."""
    if request.method == "POST":
        from chat import chatglm_api

        return await chatglm_api.answer(request)
    user = await request.auser()
    if not user.is_authenticated:
        return redirect_to_login(request.get_full_path())
    from asgiref.sync import sync_to_async

    return await sync_to_async(home)(request)


def home(request):
    return render(request, "portal/home.html", {})


def tasks(request):
    return render(request, "portal/tasks.html", {})


def account(request):
    return render(request, "portal/account.html", {})
