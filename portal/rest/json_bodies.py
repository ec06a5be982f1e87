"""JSON bodies, read the same way at every door."""

import json
import math

from django.utils.translation import gettext as _
from rest_framework import exceptions
from rest_framework.parsers import JSONParser


def json_of(body: bytes | str):
    """What a JSON text says. ValueError: it is none, is nested too deep, or has a number beyond any
    float ("1e999").
    """
    try:
        return json.loads(body, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


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
        except ValueError:
            raise exceptions.ParseError(_("The body is not JSON."), "invalid_json") from None
