"""Every door of the portal with a body that it would take: from the URL conf, the schema that the
portal publishes, and the forms on its own pages.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser

from tests.support.urls import routes

# the doors that the schema does not describe, with bodies as clients send them
SPOKEN: dict[str, dict] = {
    "/": {"prompt": "hi", "history": [["a", "b"]], "max_length": 40, "top_p": 0.7},
    "/v1/chat/completions": {
        "model": "starter",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
        "max_tokens": 4, "stream": False, "n": 1, "stop": ["x"], "temperature": 1, "top_p": 0.5,
        "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}, "seed": 1, "tools": [],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}},
        },
        "stream_options": {"include_usage": True}, "repetition_penalty": 1.1, "top_k": 5,
    },
    "/v1/completions": {
        "model": "starter", "prompt": ["a", "b"], "max_tokens": 4, "echo": True, "logprobs": 1,
        "stream": True, "n": 2,
    },
    "/v1/responses": {
        "model": "starter", "input": [{"role": "user", "content": "hi"}], "instructions": "x",
        "max_output_tokens": 4, "stream": True,
    },
    "/v1/fine_tuning/jobs": {
        "model": "starter", "training_file": "file-1", "suffix": "x",
        "hyperparameters": {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    },
}  # fmt: skip
UPLOADS = ["/api/v1/datasets/", "/datasets/upload/", "/datasets/columns/", "/v1/files"]


@dataclass
class Form:
    """A form of a page: where it goes and what it holds as it is shown."""

    page: str
    action: str
    fields: dict[str, str] = field(default_factory=dict)


class _Forms(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.page, self.found, self.inside, self.select = page, [], False, ""

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        name = told.get("name") or ""
        if tag == "form":
            self.inside = (told.get("method") or "").lower() == "post"
            if self.inside:
                self.found.append(Form(self.page, told.get("action") or self.page))
        elif not self.inside or not self.found:
            return
        elif tag == "select":
            self.select = name
        elif tag == "option" and self.select:
            fields = self.found[-1].fields
            if "selected" in told or self.select not in fields:
                fields[self.select] = told.get("value") or ""
        elif tag in ("input", "textarea", "button") and name:
            self.found[-1].fields.setdefault(name, told.get("value") or "")

    def handle_endtag(self, tag):
        if tag == "form":
            self.inside = False
        elif tag == "select":
            self.select = ""


def forms(page: str, html: str) -> list[Form]:
    parser = _Forms(page)
    parser.feed(html)
    return parser.found


def paths(numbers: Callable[[str], int]) -> list[str]:
    """Every path of the URL conf, with `numbers(beginning of the path)` where it takes an id."""
    found = [
        route.of(numbers(route.path.partition("{pk}")[0]))
        for route in routes()
        if "(?" not in route.path
    ]
    return [path for path in dict.fromkeys(found) if path != "/logout/"]


def described(schema: dict, numbers: Callable[[str], int]) -> list[tuple[str, str, dict]]:
    """(method, path, a body it would take) of every operation of the schema that takes JSON."""
    found = []
    for path, operations in schema["paths"].items():
        concrete = re.sub(r"\{[^}]*\}", str(numbers(path.partition("{")[0])), path)
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" in content:
                body = _example(content["application/json"]["schema"], schema)
                found.append((method.upper(), concrete, body))
    return found


def _example(shape: dict, schema: dict, depth: int = 0):
    if "$ref" in shape:
        shape = schema["components"]["schemas"][shape["$ref"].rpartition("/")[2]]
    for several in ("allOf", "oneOf", "anyOf"):
        if several in shape:
            return _example(shape[several][0], schema, depth)
    if "enum" in shape:
        return shape["enum"][0]
    kind = shape.get("type")
    if kind == "object" or "properties" in shape:
        properties = shape.get("properties", {}) if depth < 4 else {}
        return {name: _example(each, schema, depth + 1) for name, each in properties.items()}
    if kind == "array":
        return [_example(shape.get("items", {}), schema, depth + 1)]
    return {"integer": 1, "number": 1.0, "boolean": True}.get(kind, "x")
