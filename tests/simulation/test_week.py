"""The simulation in small: everybody has a turn, nobody is passed twice by the same one, memory is
given once; and it is the real order that sees to it.
"""

import pytest

from portal.runs import lifecycle
from tests.simulation.picture import svg
from tests.simulation.week import Week

pytestmark = pytest.mark.django_db
SMALL = {"members": 12, "devices": 3, "days": 1, "runs": 110, "seed": 3}


@pytest.fixture
def counted(settings):
    settings.BESIDE_CHAT = "queue"


def test_a_day_of_a_crowded_team(counted):
    week = Week(**SMALL)
    outcome = week.simulate()
    assert outcome.finished + outcome.refused == SMALL["runs"]
    assert outcome.longest_line > SMALL["devices"], "nobody had to wait: nothing was tried"
    assert outcome.passed == 1
    assert 0.3 < outcome.utilisation() <= 1
    persons = outcome.of_persons()
    assert persons["median"][-1] <= persons["worst"][-1]
    picture = svg(outcome)
    assert picture.startswith("<svg") and picture.count("<rect class=") == 24


def test_it_would_notice_who_clicks_first_wins(counted, monkeypatch):
    """Without turns a sweep of one goes before all that others start meanwhile."""

    def first_come(queue):
        queued = lifecycle.Run.objects.filter(queue=queue, status="queued")
        return list(queued.order_by("priority", "id").values_list("id", flat=True))

    monkeypatch.setattr(lifecycle, "waiting_order", first_come)
    assert Week(**SMALL).simulate().passed > 3
