"""`/metrics`, read by Prometheus' own parser."""

from ipaddress import ip_network

import pytest
from prometheus_client.parser import text_string_to_metric_families

from portal.models import ApiKey, Run

pytestmark = pytest.mark.django_db


def figures(response) -> dict:
    assert response.status_code == 200
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.content.decode())
        for sample in family.samples
    }


def test_it_tells_what_the_rows_say(client, member, settings):
    settings.METRICS_FROM = [ip_network("127.0.0.0/8")]
    for status in ("queued", "queued", "failed"):
        Run.objects.create(owner=member, kind="tuning", name="r", status=status)
    found = figures(client.get("/metrics"))
    assert found["portal_runs", "queued", "tuning"] == 2
    assert found["portal_runs", "failed", "tuning"] == 1
    assert found["portal_database_up",] == 1 and found["portal_worker_up",] == 0
    assert found["portal_disk_free_bytes",] > 0 and found["process_resident_memory_bytes",] > 0
    assert "member" not in client.get("/metrics").content.decode()


def test_it_needs_an_administrators_key_or_a_listed_address(client, member, admin_user, settings):
    assert client.get("/metrics").status_code == 401
    client.force_login(admin_user)
    assert client.get("/metrics").status_code == 401, "a login is no key: pages are not scraped"
    for user, status in ((member, 401), (admin_user, 200)):
        _key, secret = ApiKey.create_for(user)
        headers = {"Authorization": f"Bearer {secret}"}
        assert client.get("/metrics", headers=headers).status_code == status
    settings.METRICS_FROM = [ip_network("10.0.0.0/8")]
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", REMOTE_ADDR="10.1.2.3").status_code == 200
