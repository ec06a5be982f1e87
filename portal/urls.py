"""The roof: composes the apps, holds no logic."""

from csp.constants import SELF, UNSAFE_INLINE
from csp.decorators import csp_replace
from django.conf import settings
from django.contrib import admin
from django.contrib.auth import views as auth_views
from django.contrib.auth.decorators import login_not_required
from django.urls import include, path, re_path
from django.views.generic import RedirectView
from django.views.i18n import set_language
from drf_spectacular.views import SpectacularSwaggerSplitView

from chat.api import chatglm
from portal import views
from portal.budget import views as budget
from portal.devices import views as device_views
from portal.health import healthz, metrics
from portal.login import LoginForm
from portal.notices import views as notice_views
from portal.rest.conventions import OPENAI_PATH, no_interface, wrong_base
from portal.rest.schema_view import SchemaView

urlpatterns = []
if settings.OIDC_ISSUER:
    from portal import single_sign_on  # with libraries of its own

    urlpatterns += [
        path("login/sso/", single_sign_on.Begin.as_view(), name="single_sign_on"),
        path(
            "login/sso/callback/",
            single_sign_on.Callback.as_view(),
            name="single_sign_on_callback",
        ),
        path("login/sso/leave/", single_sign_on.leave, name="single_sign_on_leave"),
    ]
urlpatterns += [
    path("", views.root, name="home"),  # GET: home page; POST: ChatGLM-6B's api.py
    # POST: the same for clients that cannot set a header, where the setting allows it
    re_path(r"^key/(?P<key>[^/]+)/?$", chatglm.answer_to_key, name="chatglm-key"),
    path(
        "login/",
        auth_views.LoginView.as_view(
            template_name="portal/login.html",
            authentication_form=LoginForm,
            redirect_authenticated_user=True,
            extra_context={"sso_name": settings.OIDC_ISSUER and settings.OIDC_NAME},
        ),
        name="login",
    ),
    path("logout/", auth_views.LogoutView.as_view(), name="logout"),
    path("language/", login_not_required(set_language), name="set_language"),
    path("healthz", healthz, name="healthz"),
    path("metrics", metrics, name="metrics"),
    path("tasks/", views.tasks, name="tasks"),
    path("tasks/decide/", views.decide, name="decide"),
    path("devices/", device_views.devices, name="devices"),
    path("devices/decide/", device_views.decide, name="decide_on_device"),
    path("notices/", notice_views.notices, name="notices"),
    path("notices/settings/", notice_views.change_settings, name="notice_settings"),
    path("account/", views.account, name="account"),
    path("usage/", budget.page, name="usage"),
    path("usage/usage.csv", budget.export, name="usage_csv"),
    path("", include("chat.urls")),
    path("", include("tuning.urls")),
    path("", include("evaluation.urls")),
    path("api/v1/", include("portal.rest.urls")),
    path("api/v1/", include("chat.api.urls")),
    path("api/v1/", include("tuning.api_urls")),
    path("api/v1/", include("evaluation.api_urls")),
    path("v1/", include("chat.api.openai_urls")),
    path("v1/", include("tuning.openai_urls")),
    path(
        "api/schema/",
        login_not_required(SchemaView.as_view()),
        name="api-schema",
    ),
    path(
        "api/docs/",
        # its scripts come from files; swagger-ui writes styles into the page
        csp_replace({"style-src": [SELF, UNSAFE_INLINE]})(
            login_not_required(
                SpectacularSwaggerSplitView.as_view(
                    url_name="api-schema", http_method_names=["get", "head"]
                )
            )
        ),
        name="api-docs",
    ),
    re_path(r"^(?:api|v1)(?:/|$)", no_interface),
    re_path(OPENAI_PATH, wrong_base),
    path("admin/", admin.site.urls),
    # where browsers look by themselves on pages that name no icon
    path(
        "favicon.ico",
        login_not_required(
            RedirectView.as_view(url=f"/{settings.STATIC_URL.strip('/')}/portal/favicon.svg")
        ),
    ),
]
handler404 = "portal.errors.not_found"
handler500 = "portal.errors.server_error"
