"""Misconfiguration, found by `manage.py check` and before `up` starts anything."""

import difflib
import os
import shutil
import stat
import sys
from urllib.parse import urlsplit

from django.conf import settings
from django.core.checks import Error, Info, Warning, register
from django.utils.translation import override

# Every variable that portal/settings.py reads; docs/operations.md explains them.
VARIABLES = {
    "PORTAL_DATA_DIR",
    "PORTAL_UMASK",
    "PORTAL_SECRET_KEY",
    "PORTAL_DEBUG",
    "PORTAL_ALLOWED_HOSTS",
    "PORTAL_TRUSTED_ORIGINS",
    "PORTAL_CORS_ORIGINS",
    "PORTAL_KEY_IN_ADDRESS",
    "PORTAL_DATABASE_URL",
    "PORTAL_REDIS_URL",
    "PORTAL_QUEUED_RUNS",
    "PORTAL_DEVICE_RATE",
    "PORTAL_TOKEN_RATE",
    "PORTAL_TOKENS_PER_DAY",
    "PORTAL_APPROVAL",
    "PORTAL_OIDC_ISSUER",
    "PORTAL_OIDC_NAME",
    "PORTAL_OIDC_CLIENT_ID",
    "PORTAL_OIDC_CLIENT_SECRET",
    "PORTAL_OIDC_SCOPES",
    "PORTAL_OIDC_CREATE",
    "PORTAL_OIDC_ADMIN_GROUP",
    "PORTAL_OIDC_GROUPS_CLAIM",
    "PORTAL_TIME_ZONE",
    "PORTAL_HTTPS",
    "PORTAL_PROXIES",
    "PORTAL_DATASET_MAX_MB",
    "PORTAL_LAUNCHER",
    "PORTAL_WORKERS",
    "PORTAL_WORKER_TOKEN",
    "PORTAL_UPSTREAMS",
    "PORTAL_UPSTREAM_KEY",
    "PORTAL_MLFLOW_URL",
    "PORTAL_MLFLOW_TOKEN",
    "PORTAL_MLFLOW_EXPERIMENT",
    "PORTAL_DEVICE",
    "PORTAL_DEVICES",
    "PORTAL_BESIDE_CHAT",
    "PORTAL_CACHE_SHARE",
    "PORTAL_IDLE_UNLOAD",
    "PORTAL_LOADING_WAIT",
    "PORTAL_WEBHOOK_HOSTS",
    "PORTAL_EMAIL_URL",
    "PORTAL_EMAIL_FROM",
    "PORTAL_LOG_LEVEL",
    "PORTAL_LOG_FORMAT",
    "PORTAL_METRICS_FROM",
}
LOCAL = {"localhost", "127.0.0.1", "[::1]"}


@register()
def unknown_variables(**kwargs):
    found = []
    for name in sorted(
        set(filter(lambda name: name.startswith("PORTAL_"), os.environ)) - VARIABLES
    ):
        near = difflib.get_close_matches(name, VARIABLES, 1)
        hint = f"Did you mean {near[0]}?" if near else "docs/operations.md lists the variables."
        found.append(
            Warning(
                f"The environment variable {name} is not known and has no effect.",
                hint=hint,
                id="portal.W001",
            )
        )
    return found


@register()
def data_folder(**kwargs):
    if not os.access(settings.DATA_DIR, os.W_OK | os.X_OK):
        return [
            Error(
                f"The data folder {settings.DATA_DIR} cannot be written.",
                hint="Set PORTAL_DATA_DIR.",
                id="portal.E001",
            )
        ]
    found = []
    mode = stat.S_IMODE(settings.DATA_DIR.stat().st_mode)
    if mode & settings.UMASK & (stat.S_IRWXG | stat.S_IRWXO):
        found.append(
            Error(
                f"The data folder {settings.DATA_DIR} is open to other accounts of this machine: "
                "they could read the conversations and take over sessions.",
                hint=f"chmod {0o777 & ~settings.UMASK:o} {settings.DATA_DIR}; PORTAL_UMASK=007 to "
                "share it with its group.",
                id="portal.E008",
            )
        )
    for name in ("secret_key", "worker_token"):
        path = settings.DATA_DIR / name
        if path.exists() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            found.append(
                Error(
                    f"{path} can be read by other users.",
                    hint=f"chmod 600 {path}",
                    id="portal.E002",
                )
            )
    return found


@register(deploy=True)  # not at every command that a newcomer types
def python_version(**kwargs):
    """CVE-2024-6232 and -0450: archives that hang or swell. The uploads guard against them; the
    fix belongs into the interpreter."""
    version = sys.version_info[:3]
    if version >= (3, 12, 6) or (3, 11, 10) <= version < (3, 12):
        return []
    return [
        Info(
            f"Python {'.'.join(map(str, version))} has known faults in its archive modules.",
            hint="Python 3.11.10, 3.12.6 and later are free of them.",
            id="portal.I001",
        )
    ]


@register()
def launcher(**kwargs):
    if not settings.LAUNCHER or shutil.which(settings.LAUNCHER[0]):
        return []
    return [
        Error(
            f"PORTAL_LAUNCHER: there is no program {settings.LAUNCHER[0]!r} here.",
            hint="The command that starts a run's process, such as srun --gres=gpu:1",
            id="portal.E007",
        )
    ]


@register()
def single_sign_on(**kwargs):
    if not settings.OIDC_ISSUER:
        return []
    found = []
    if not (settings.OIDC_RP_CLIENT_ID and settings.OIDC_RP_CLIENT_SECRET):
        found.append(
            Error(
                "PORTAL_OIDC_ISSUER needs PORTAL_OIDC_CLIENT_ID and PORTAL_OIDC_CLIENT_SECRET.",
                id="portal.E009",
            )
        )
    address = urlsplit(settings.OIDC_ISSUER)
    here = address.hostname in {"localhost", "127.0.0.1", "::1"}
    if address.scheme != "https" and not (address.scheme == "http" and here):
        found.append(
            Error(
                "PORTAL_OIDC_ISSUER must be an https address: whoever changes the provider's "
                "answers on the way logs in as anybody.",
                id="portal.E010",
            )
        )
    return found


@register()
def devices(**kwargs):
    from portal.devices.inventory import problem_in_words  # its rows need the apps

    with override("en"):  # as all that is said in a terminal
        told = [problem_in_words(problem) for problem in settings.DEVICE_PROBLEMS]
    hint = "PORTAL_DEVICES=cuda:0=24GB,cuda:1=24GB or PORTAL_DEVICES=cpu=16GB"
    return [Error(f"PORTAL_DEVICES: {each}", hint=hint, id="portal.E011") for each in told]


@register()
def cache_share(**kwargs):
    if 0 < settings.CACHE_SHARE <= 0.95:
        return []
    return [
        Error(
            f"PORTAL_CACHE_SHARE must lie between 0 and 0.95, not {settings.CACHE_SHARE}.",
            id="portal.E006",
        )
    ]


@register()
def open_to_the_network(**kwargs):
    public = set(settings.ALLOWED_HOSTS) - LOCAL
    found = []
    if settings.DEBUG and public:
        found.append(
            Error(
                "PORTAL_DEBUG is on while the portal answers to names other than this machine's: "
                "tracebacks would be public.",
                id="portal.E005",
            )
        )
    if "*" in public:
        found.append(Warning("PORTAL_ALLOWED_HOSTS=* accepts every Host header.", id="portal.W002"))
    if public and not settings.HTTPS:
        found.append(
            Warning(
                "The portal answers to public names without HTTPS: passwords and keys travel in "
                "the clear.",
                hint="Put a TLS proxy in front and set PORTAL_HTTPS=1.",
                id="portal.W003",
            )
        )
    return found
