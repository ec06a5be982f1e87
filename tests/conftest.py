"""Shared by all tests: a data folder of their own, one torch thread, no network for the hub."""

import os
import tempfile
import time

os.environ["PORTAL_DATA_DIR"] = tempfile.mkdtemp(prefix="portal-test-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from django.db import OperationalError
from django.db.backends.signals import connection_created


def _as_a_file_would(connection, **_signal):
    """Threads share one SQLite database in memory, where who meets another's lock is refused at
    once. In a file readers have the WAL, and writers wait.
    """
    if connection.vendor == "sqlite" and connection.is_in_memory_db():
        connection.connection.execute("PRAGMA read_uncommitted = ON")
        if _wait_for_the_lock not in connection.execute_wrappers:
            connection.execute_wrappers.append(_wait_for_the_lock)


def _wait_for_the_lock(execute, *arguments):
    deadline = time.monotonic() + 5
    while True:
        try:
            return execute(*arguments)
        except OperationalError as error:
            if "table is locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


connection_created.connect(_as_a_file_would)


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
