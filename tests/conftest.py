"""Shared by all tests: a data folder of their own, one torch thread, no network for the hub."""

import os
import tempfile

os.environ["PORTAL_DATA_DIR"] = tempfile.mkdtemp(prefix="portal-test-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from django.db.backends.signals import connection_created


def _read_without_locking(connection, **_signal):
    """Threads share one SQLite database in memory, where who reads a table keeps writers out at
    once (a file has the WAL for that).
    """
    if connection.vendor == "sqlite" and connection.is_in_memory_db():
        connection.connection.execute("PRAGMA read_uncommitted = ON")


connection_created.connect(_read_without_locking)


@pytest.fixture(autouse=True)
def light_settings(settings):
    """A real hash of a password costs 0.2 s, and many tests make users; static files are not
    collected in the tests.
    """
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    plain = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
    settings.STORAGES = {**settings.STORAGES, "staticfiles": plain}


@pytest.fixture
def data_dir(settings, tmp_path):
    """A fresh PORTAL_DATA_DIR for one test."""
    settings.DATA_DIR = tmp_path
    return tmp_path


@pytest.fixture
def member(django_user_model):
    return django_user_model.objects.create_user("member", password="correct horse battery")


@pytest.fixture
def other_member(django_user_model):
    return django_user_model.objects.create_user("other", password="correct horse battery")


@pytest.fixture
def staff(django_user_model):
    return django_user_model.objects.create_user(
        "chief", password="correct horse battery", is_staff=True, is_superuser=True
    )
