"""What a log line holds, and what it must not."""

import json
import logging
import sys

import pytest

from portal.logs import LineFormatter, ObjectFormatter

SECRETS = [
    "Authorization: Bearer sk-abcdefghijklmnop",
    "postgres://portal:abcdefghijklmnop@db/portal",
    "login with password=abcdefghijklmnop&next=/",
    '{"api_key": "abcdefghijklmnop"}',
    "the key sk-abcdefghijklmnop of a member",
]


def record(text, *args, **more) -> logging.LogRecord:
    return logging.LogRecord("portal", logging.INFO, __file__, 1, text, args, None, **more)


@pytest.mark.parametrize("formatter", [LineFormatter("%(message)s"), ObjectFormatter()])
@pytest.mark.parametrize("text", SECRETS)
def test_no_secret_is_written(formatter, text):
    assert "abcdefghijklmnop" not in formatter.format(record("%s", text))
    try:
        raise ValueError(text)
    except ValueError:
        failed = record("failed")
        failed.exc_info = sys.exc_info()
    line = formatter.format(failed)
    assert "ValueError" in line and "abcdefghijklmnop" not in line


def test_a_json_line_names_its_run_or_message():
    told = json.loads(ObjectFormatter().format(record("run %s lost its process (%s)", 7, "-9")))
    assert (told["run"], told["level"], told["logger"]) == (7, "INFO", "portal")
    assert told["message"] == "run 7 lost its process (-9)" and told["time"]
    told = json.loads(ObjectFormatter().format(record("message %s: 中文", 12)))
    assert told["message_id"] == 12 and told["message"].endswith("中文")
    assert "run" not in json.loads(ObjectFormatter().format(record("running %s", 7)))
