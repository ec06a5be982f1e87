"""JSON bodies, read the same way at every door."""

import json
import math

from django.utils.translation import gettext as _
from rest_framework import exceptions
from rest_framework.parsers import JSONParser


class NotUtf8(ValueError):
    """The bytes are of another encoding: GBK, UTF-16 ..."""


def json_of(body: bytes | str):
    """What a JSON text says. ValueError: it is none, is nested too deep, or has a number beyond any
    float ("1e999"); NotUtf8.
    """
    if isinstance(body, bytes):
        body = _text(body)
    try:
        return json.loads(body, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def why_not_json(error: ValueError) -> tuple[str, str]:
    """(message, code) for whoever sent what `json_of` refused with `error`."""
    if isinstance(error, NotUtf8):
        return _("The body is not UTF-8; JSON is sent as UTF-8."), "not_utf8"
    return _("The body is not JSON."), "invalid_json"


def _text(body: bytes) -> str:
    # json.loads would guess UTF-16 from NULs, which no JSON text in UTF-8 has
    if b"\0" in body:
        raise NotUtf8
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotUtf8 from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


class JsonBody(JSONParser):
    """DRF's would read a body of any size into memory and fail on what `json_of` refuses."""

    def parse(self, stream, media_type=None, parser_context=None):
        try:
            return json_of(parser_context["request"].body)
        except ValueError as error:
            raise exceptions.ParseError(*why_not_json(error)) from None
