"""The portal's logs: lines for people, or one JSON object a line (PORTAL_LOG_FORMAT=json). Neither
holds secrets.
"""

import logging
import re

from pythonjsonlogger.json import JsonFormatter

# API keys, whatever follows "Bearer", passwords in URLs, values of secret-looking fields
_SECRETS = (
    (re.compile(r"sk-[\w-]{8,}"), "sk-***"),
    (re.compile(r"(?i)(bearer\s+)[\w.~+/=-]+"), r"\1***"),
    (re.compile(r"(://[^/\s:@]+:)[^@\s/]+@"), r"\1***@"),
    (
        re.compile(
            r"(?i)((?:password|secret|token|api_?key)[\\\"']*\s*[=:]\s*[\\\"']*)[^\s\"'&,;\\]+"
        ),
        r"\1***",
    ),
)
_SUBJECT = re.compile(r"(run|message) (?:%s|%d|(\d+))\b")  # "run %s: ..." says whose line it is


def without_secrets(text: str) -> str:
    for pattern, mask in _SECRETS:
        text = pattern.sub(mask, text)
    return text


class LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class ObjectFormatter(JsonFormatter):
    """{"time", "level", "logger", "message", "process", "run"?, "message_id"?, "exc_info"?}"""

    def __init__(self):
        super().__init__(
            "%(asctime)s %(levelname)s %(name)s %(message)s %(process)d",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            json_ensure_ascii=False,
        )

    def add_fields(self, log_data, record, message_dict):
        super().add_fields(log_data, record, message_dict)
        found = _SUBJECT.match(str(record.msg))
        if found:
            number = found[2] or (record.args[0] if isinstance(record.args, tuple) else None)
            log_data["run" if found[1] == "run" else "message_id"] = number

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))
