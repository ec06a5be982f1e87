"""The rows of the pictures follow the models, and each pictured page is there."""

import pytest

from portal.models import User
from tests.browser.screenshots import PAGES, fill

pytestmark = pytest.mark.django_db


def test_every_page_in_the_pictures_answers(client, data_dir):
    pages = PAGES | fill()
    client.force_login(User.objects.get(username="mei"))
    answers = {name: client.get(path).status_code for name, path in pages.items()}
    assert answers.pop("missing") == 404
    assert set(answers.values()) == {200}, answers
