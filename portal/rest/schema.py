"""What the OpenAPI schema says about every operation alike: how it is refused."""

_TEXT_OR_NULL = {"type": "string", "nullable": True}
_PROBLEM = {
    "type": "object",
    "properties": {
        "param": _TEXT_OR_NULL,
        "line": {
            "type": "integer",
            "nullable": True,
            "description": "of an uploaded file, in place of param",
        },
        "message": {"type": "string"},
        "code": _TEXT_OR_NULL,
    },
    "required": ["message", "code"],
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
                "problems": {
                    "type": "array",
                    "items": _PROBLEM,
                    "description": "every problem of a bad body",
                },
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def with_errors(result, generator, **_options):
    """drf-spectacular's hook: adds the error envelope as the answer of any status that an operation
    does not name.
    """
    refused = {
        "description": "400 bad request, 401 no key, 403 not yours to change, "
        "404 not there or not yours, 409 not now, "
        "413 too large, 503 try again after Retry-After",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for operations in result["paths"].values():
        for operation in operations.values():
            operation["responses"].setdefault("default", refused)
    return result


def json_alone(result, generator, **_options):
    """drf-spectacular's hook: a body without a file is described as JSON. Forms are taken too, but
    cannot say null or an object.
    """
    components = result["components"]["schemas"]
    for operations in result["paths"].values():
        for operation in operations.values():
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" in content and not _has_file(content, components):
                operation["requestBody"]["content"] = {
                    "application/json": content["application/json"]
                }
    return result


def _has_file(content: dict, components: dict) -> bool:
    for described in content.values():
        schema = described.get("schema", {})
        schema = components.get(schema.get("$ref", "").rpartition("/")[2], schema)
        if any(each.get("format") == "binary" for each in schema.get("properties", {}).values()):
            return True
    return False
