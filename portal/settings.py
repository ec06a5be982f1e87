"""Settings of the portal: one file, everything that differs between installations comes from the
environment.

A bare clone runs on SQLite without Redis. docs/operations.md lists the variables; portal/checks.py
finds wrong ones.
"""

import contextlib
import logging
import os
import secrets
import shlex
import stat
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from urllib.parse import unquote, urlsplit
from zoneinfo import ZoneInfo

import dj_database_url
from csp.constants import NONCE, NONE, SELF
from django.utils.translation import gettext_lazy as _

from portal import __version__
from portal.budget.pricing import device_rates, rate
from portal.devices import declared, placing
from portal.rest.schema import ERROR

BASE_DIR = Path(__file__).resolve().parent.parent
# Database, uploads, adapters, secrets, logs: everything that is not code.
DATA_DIR = Path(os.environ.get("PORTAL_DATA_DIR") or BASE_DIR / "var").resolve()


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _list(name: str) -> list[str]:
    return [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()]


def _parsed(name: str, default: str, parse: Callable):
    """`parse` of a variable's text; where it raises, one line that names the variable, and the
    end.
    """
    try:
        return parse(os.environ.get(name) or default)
    except (ValueError, KeyError):
        raise SystemExit(
            f"The value of {name} cannot be used; docs/operations.md says what it may be."
        ) from None


def _hosts_and_networks(entries: list[str]) -> tuple[set[str], list]:
    """Entries that are an address or a network, and all others."""
    names, networks = set(), []
    for entry in entries:
        try:
            networks.append(ip_network(entry))
        except ValueError:
            names.add(entry.lower())
    return names, networks


def _mail_server(url: str) -> tuple[str, int, str, str, bool, bool]:
    """(host, port, user, password, STARTTLS, TLS)"""
    parts = urlsplit(url)
    if url and (parts.scheme not in ("smtp", "smtps") or not parts.hostname):
        raise ValueError(url)
    secure = parts.scheme == "smtps"
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    port = parts.port or (465 if secure else 587)
    plain = port == 25 or parts.hostname in ("localhost", "127.0.0.1")  # this machine's own
    return (
        parts.hostname or "",
        port,
        user,
        password,
        bool(url) and not secure and not plain,
        secure,
    )


# Of every process of the portal: what it writes is read by its own account alone. 007 shares the
# data folder with the account's group (several machines).
UMASK = _parsed("PORTAL_UMASK", "077", lambda text: int(text, 8) & 0o777)
os.umask(UMASK)


def _private(folder: Path) -> None:
    """Makes the folder, or takes from one that is there what the umask would not have given."""
    folder.mkdir(parents=True, exist_ok=True)
    mode = folder.stat().st_mode
    if mode & UMASK and not mode & stat.S_ISVTX:  # a sticky one, like /tmp, is everybody's
        with contextlib.suppress(PermissionError):  # not ours: `manage.py check` tells
            folder.chmod(stat.S_IMODE(mode) & ~UMASK)


def _secret(name: str) -> str:
    """A secret that is drawn once and kept in a file only the owner can read; two installations
    never share one.
    """
    path = DATA_DIR / name
    try:
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(50))
    except FileExistsError:
        pass
    except OSError as error:
        raise SystemExit(
            f"The data folder cannot be written ({error}). Set PORTAL_DATA_DIR."
        ) from None
    return path.read_text().strip()


with contextlib.suppress(OSError):  # which the first secret, or `manage.py check`, tells
    _private(DATA_DIR)
SECRET_KEY = os.environ.get("PORTAL_SECRET_KEY") or _secret("secret_key")
DEBUG = _flag("PORTAL_DEBUG")
# This machine's names always: `up` and monitoring ask /healthz there.
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]", *_list("PORTAL_ALLOWED_HOSTS")]
CSRF_TRUSTED_ORIGINS = _list("PORTAL_TRUSTED_ORIGINS")

# A key may also come as Basic's password: for clients that cannot set a header but take
# http://:KEY@host. Off: addresses end up in histories, logs and screenshots.
KEY_IN_ADDRESS = _flag("PORTAL_KEY_IN_ADDRESS")
# Pages of other origins that may call the doors for scripts from a browser, with a key: never with
# the login cookie. "*": any page.
CORS_ALLOWED_ORIGINS = _list("PORTAL_CORS_ORIGINS")
CORS_ALLOW_ALL_ORIGINS = CORS_ALLOWED_ORIGINS == ["*"]
if CORS_ALLOW_ALL_ORIGINS:
    CORS_ALLOWED_ORIGINS = []
CORS_URLS_REGEX = r"^/(?:v1/.*|api/v1/.*)?$"
CORS_ALLOW_HEADERS = ["*", "authorization"]  # which the star does not include
CORS_EXPOSE_HEADERS = ["Retry-After"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "channels",
    "portal",  # before django_q: its qcluster command takes precedence
    "portal.budget",
    "django_q",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "csp",
    "corsheaders",
    "chat",
    "tuning",
    "evaluation",
]

MIDDLEWARE = [
    "portal.middleware.head_without_body",
    "django.middleware.security.SecurityMiddleware",
    "corsheaders.middleware.CorsMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    # nobody in without logging in, whatever view is added
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "portal.urls"
ASGI_APPLICATION = "portal.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "django.template.context_processors.i18n",
                "csp.context_processors.nonce",
                "portal.page.shell",
            ],
            "builtins": ["portal.templatetags.portal"],
        },
    }
]

# WAL with IMMEDIATE transactions: 8 writers without one lock error (docs/architecture.md,
# "Database").
DATABASES = {
    "default": _parsed(
        "PORTAL_DATABASE_URL",
        "",
        lambda url: dj_database_url.parse(url, conn_max_age=60, conn_health_checks=True),
    )
    if os.environ.get("PORTAL_DATABASE_URL")
    else {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": DATA_DIR / "portal.sqlite3",
        "OPTIONS": {
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; "
            "PRAGMA foreign_keys=ON;",
        },
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
REDIS_URL = os.environ.get("PORTAL_REDIS_URL", "")
CACHES = {
    "default": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": REDIS_URL}
    if REDIS_URL
    else {
        "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
        # beyond its 300 it would forget who has to pause
        "OPTIONS": {"MAX_ENTRIES": 100_000},
    }
}

AUTH_USER_MODEL = "portal.User"
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "home"
LOGOUT_REDIRECT_URL = "login"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]

# Single sign-on (portal/single_sign_on.py): the provider's issuer, as its discovery names it.
OIDC_ISSUER = os.environ.get("PORTAL_OIDC_ISSUER", "")
OIDC_NAME = os.environ.get("PORTAL_OIDC_NAME", "SSO")  # on the login page's button
OIDC_RP_CLIENT_ID = os.environ.get("PORTAL_OIDC_CLIENT_ID", "")
OIDC_RP_CLIENT_SECRET = os.environ.get("PORTAL_OIDC_CLIENT_SECRET", "")
OIDC_RP_SCOPES = os.environ.get("PORTAL_OIDC_SCOPES", "openid email profile")
# Whether somebody without an account gets one.
OIDC_CREATE = _flag("PORTAL_OIDC_CREATE")
# Whoever is in this group of the provider's is an administrator, and nobody else that it lets in.
OIDC_ADMIN_GROUP = os.environ.get("PORTAL_OIDC_ADMIN_GROUP", "")
OIDC_GROUPS_CLAIM = os.environ.get("PORTAL_OIDC_GROUPS_CLAIM", "groups")
OIDC_USE_PKCE = True
OIDC_TIMEOUT = 10  # seconds
OIDC_AUTHENTICATION_CALLBACK_URL = "single_sign_on_callback"
AUTHENTICATION_BACKENDS = ["django.contrib.auth.backends.ModelBackend"]
if OIDC_ISSUER:
    AUTHENTICATION_BACKENDS.append("portal.single_sign_on.Backend")

LANGUAGE_CODE = "zh-hans"
LANGUAGES = [("zh-hans", _("Simplified Chinese")), ("en", _("English"))]
LANGUAGE_COOKIE_AGE = 365 * 86400
LOCALE_PATHS = [BASE_DIR / "locale"]
TIME_ZONE = _parsed("PORTAL_TIME_ZONE", "Asia/Shanghai", lambda name: ZoneInfo(name).key)
USE_I18N = True
USE_TZ = True

STATIC_URL = "static/"
STATIC_ROOT = DATA_DIR / "static"
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if DEBUG
        else "servestatic.storage.CompressedManifestStaticFilesStorage"
    },
}

# The devices of this machine and what of their memory is the portal's, "cuda:0=24GB,cuda:1=24GB" or
# "cpu=16GB"; "": what is found. portal/checks.py tells what is wrong with it.
DEVICES, DEVICE_PROBLEMS = declared.parse(os.environ.get("PORTAL_DEVICES", ""))
# What happens where a run's memory does not suffice beside chat (portal/devices/placing.py).
BESIDE_CHAT = _parsed(
    "PORTAL_BESIDE_CHAT",
    placing.QUEUE if DEVICES else placing.ANY,
    lambda name: placing.POLICIES[placing.POLICIES.index(name)],
)

# One `name` for all clusters (it salts the signatures); Q_CLUSTER_NAME chooses the cluster.
# Timeouts lie far above any run and retry above the timeout, or the broker would deliver a task
# twice. The Run row, not the queue, is the truth (portal/runs/lifecycle.py).
Q_CLUSTER = {
    "name": "portal",
    "cluster_name": "default",
    "orm": "default",
    "workers": 2,  # a small download need not wait for a large one
    "poll": 0.5,
    "timeout": 30 * 86400,
    "retry": 31 * 86400,
    "ack_failures": True,
    "max_attempts": 1,
    "scheduler": False,
    "catch_up": False,
    "save_limit": 100,
    "label": "Queue",
    "ALT_CLUSTERS": {
        # batches, which may take a day and wait for room more than they work
        "batch": {
            "workers": 1,
            "recycle": 1,
            "queue_limit": 1,
            "timeout": 30 * 86400,
            "retry": 31 * 86400,
        },
        "gpu": {
            "workers": max(1, len(DEVICES)),  # a run on each device
            "recycle": 1,
            "queue_limit": max(1, len(DEVICES)),
            "timeout": 30 * 86400,
            "retry": 31 * 86400,
        },
    },
}
if REDIS_URL:  # takes the database's place; a delivery that it loses is rung again
    Q_CLUSTER["redis"] = REDIS_URL
    del Q_CLUSTER["orm"]

# Addresses and networks that may read /metrics without a key.
METRICS_FROM = _parsed(
    "PORTAL_METRICS_FROM",
    "",
    lambda text: [ip_network(part.strip()) for part in text.split(",") if part.strip()],
)

# Queued runs that one member may have; more are refused (429).
QUEUED_RUNS = _parsed("PORTAL_QUEUED_RUNS", "20", int)

# Units of the budget: for an hour of the device that runs are computed on ("10", or by kind:
# "10,cpu=0.5"), and for 1,000 tokens of chat and programs alike. Without either no budget is kept.
DEVICE_RATES = _parsed("PORTAL_DEVICE_RATE", "0", device_rates)
TOKEN_RATE = _parsed("PORTAL_TOKEN_RATE", "0", rate)
# Tokens of one person on one day, pages and programs together; 0: as many as they like.
TOKENS_PER_DAY = _parsed("PORTAL_TOKENS_PER_DAY", "0", int)

# Whether an adapter needs an approved evaluation before it can be shared with the team.
APPROVAL_NEEDED = _flag("PORTAL_APPROVAL")

# What `up` calls after the migrations; each may be called again at any time.
FIRST_RUN = [
    "chat.registry.ensure_starter",
    "chat.registry.ensure_upstreams",
    "tuning.datasets.store.ensure_sample",
]

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "portal.rest.api_keys.BearerAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    "DEFAULT_THROTTLE_CLASSES": ["portal.rest.api_keys.KeyLimits"],
    "DEFAULT_PARSER_CLASSES": [
        "portal.rest.json_bodies.JsonBody",
        "rest_framework.parsers.FormParser",
        "rest_framework.parsers.MultiPartParser",
    ],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PAGINATION_CLASS": "portal.rest.conventions.Pages",
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "portal.rest.conventions.error_response",
    "PAGE_SIZE": 50,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Model portal",
    "VERSION": __version__,
    "SCHEMA_PATH_PREFIX": "/api/v1",
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_PERMISSIONS": ["rest_framework.permissions.AllowAny"],
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "COMPONENT_SPLIT_REQUEST": True,  # a file is sent as bytes, a blank text is no text
    "APPEND_COMPONENTS": {"schemas": {"Error": ERROR}},
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "portal.rest.schema.with_errors",
        "portal.rest.schema.json_alone",
    ],
    "ENUM_NAME_OVERRIDES": {
        "RunStatus": "portal.models.Run.Status",
        "MessageStatus": "chat.models.Message.Status",
        "PackedPrecision": "chat.models.Precision",
    },
}

CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [SELF],
        "script-src": [SELF, NONCE],
        "style-src": [SELF, NONCE],
        "img-src": [SELF, "data:"],
        "connect-src": [SELF],
        "object-src": [NONE],
        "base-uri": [NONE],
        "form-action": [SELF],
        "frame-ancestors": [NONE],
    },
}
X_FRAME_OPTIONS = "DENY"
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
HTTPS = _flag("PORTAL_HTTPS")  # set behind a TLS proxy
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = HTTPS
# whose X-Forwarded-For is believed, with PORTAL_HTTPS
PROXIES = _list("PORTAL_PROXIES") or ["127.0.0.1", "::1"]
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if HTTPS else None
# HSTS and the way from http to https are the TLS proxy's (docs/operations.md).
SILENCED_SYSTEM_CHECKS = ["security.W004", "security.W008"]

# Uploads are streamed to disk; forms and JSON bodies stay small.
DATA_UPLOAD_MAX_MEMORY_SIZE = 5 * 1024 * 1024
FILE_UPLOAD_TEMP_DIR = None
FILE_UPLOAD_PERMISSIONS = 0o666 & ~UMASK  # Django's own would open them to everybody
DATASET_MAX_BYTES = _parsed("PORTAL_DATASET_MAX_MB", "200", int) * 1024 * 1024

# Inference workers, "URL" or "NAME=URL", comma separated: unix:/path.sock, http://host:port, or
# vllm+http://host:port for a vLLM server. Default: one on a socket in DATA_DIR.
WORKER_URLS = _list("PORTAL_WORKERS") or [f"unix:{DATA_DIR / 'worker.sock'}"]
OWN_WORKER_URLS = [url for url in WORKER_URLS if "vllm+" not in url]
WORKER_CONNECT = "chat.worker.router.connect"  # how `up` asks whether its worker lives
WORKER_TOKEN = os.environ.get("PORTAL_WORKER_TOKEN") or _secret("worker_token")
# OpenAI-compatible servers (vLLM, SGLang) that serve a base checkpoint:
# "CHECKPOINT_NAME=URL|MODEL", comma separated.
UPSTREAMS = _list("PORTAL_UPSTREAMS")
UPSTREAM_KEY = os.environ.get("PORTAL_UPSTREAM_KEY", "")
# An MLflow server that is told the figures of every tuning run and evaluation that succeeds.
MLFLOW_URL = os.environ.get("PORTAL_MLFLOW_URL", "")
MLFLOW_TOKEN = os.environ.get("PORTAL_MLFLOW_TOKEN", "")
MLFLOW_EXPERIMENT = os.environ.get("PORTAL_MLFLOW_EXPERIMENT") or "portal"
# Where training and evaluation run: "" means cuda when there is one, else cpu.
DEVICE = os.environ.get("PORTAL_DEVICE", "")
# What starts the process of a run, for instance "srun --gres=gpu:1": it gets the command behind it,
# runs it on a machine with the same folders, and forwards signals.
LAUNCHER = shlex.split(os.environ.get("PORTAL_LAUNCHER", ""))
# Where notices may be sent by webhook: names of hosts, and addresses or networks, which may be
# private ones.
WEBHOOK_HOSTS, WEBHOOK_NETWORKS = _hosts_and_networks(_list("PORTAL_WEBHOOK_HOSTS"))
# smtp://user:password@host:587 (STARTTLS) or smtps://...; "": no e-mail.
EMAIL = _parsed("PORTAL_EMAIL_URL", "", _mail_server)
EMAIL_HOST, EMAIL_PORT, EMAIL_HOST_USER, EMAIL_HOST_PASSWORD, EMAIL_USE_TLS, EMAIL_USE_SSL = EMAIL
EMAIL_TIMEOUT = 10
DEFAULT_FROM_EMAIL = os.environ.get("PORTAL_EMAIL_FROM", "portal@localhost")
# Part of the free memory that a worker's key-value cache may take; what is left is for training
# beside it.
CACHE_SHARE = _parsed("PORTAL_CACHE_SHARE", "0.4", float)
# Minutes without a request after which a worker takes its checkpoint out of memory; 0: never.
IDLE_UNLOAD = _parsed("PORTAL_IDLE_UNLOAD", "0", float)
# Seconds that a request waits for a model that is being loaded.
LOADING_WAIT = _parsed("PORTAL_LOADING_WAIT", "300", float)

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "text": {
            "()": "portal.logs.LineFormatter",
            "format": "%(asctime)s %(levelname)s %(name)s: %(message)s",
        },
        "json": {"()": "portal.logs.ObjectFormatter"},
    },
    "handlers": {
        "console": {
            "class": "logging.StreamHandler",
            "formatter": _parsed(
                "PORTAL_LOG_FORMAT", "text", lambda name: {"text": "text", "json": "json"}[name]
            ),
        }
    },
    "root": {
        "handlers": ["console"],
        "level": _parsed(
            "PORTAL_LOG_LEVEL", "INFO", lambda name: logging.getLevelNamesMapping()[name.upper()]
        ),
    },
    "loggers": {
        "httpx": {"level": "WARNING"},
        "daphne": {"level": "WARNING"},
        "django-q": {"level": "WARNING"},
    },
}
