"""The OpenAPI schema names every path of chat's REST API, and what goes in and out."""

from django.core.management import call_command
from drf_spectacular.generators import SchemaGenerator


def test_the_schema_has_no_warnings(tmp_path):
    call_command("spectacular", fail_on_warn=True, file=str(tmp_path / "schema.yml"))


def test_the_schema_describes_chat():
    paths = SchemaGenerator().get_schema(request=None, public=True)["paths"]
    operations = {
        (path.removeprefix("/api/v1"), method)
        for path, methods in paths.items()
        for method in methods
    }
    assert {
        ("/checkpoints/", "get"),
        ("/checkpoints/", "post"),
        ("/checkpoints/{id}/", "get"),
        ("/adapters/", "get"),
        ("/adapters/{id}/", "patch"),
        ("/adapters/{id}/", "delete"),
        ("/adapters/{id}/download/", "get"),
        ("/conversations/", "post"),
        ("/conversations/{id}/", "delete"),
        ("/conversations/{id}/messages/", "get"),
        ("/conversations/{id}/messages/", "post"),
        ("/messages/{id}/", "get"),
        ("/messages/{id}/stream/", "get"),
        ("/messages/{id}/stop/", "post"),
    } <= operations
    send = paths["/api/v1/conversations/{id}/messages/"]["post"]
    assert {p["name"]: p["schema"]["type"] for p in send["parameters"]} == {"id": "integer"}
    assert set(send["responses"]) == {"202", "default"}, "the default is the error envelope"
    stream = paths["/api/v1/messages/{id}/stream/"]["get"]
    assert "text/event-stream" in stream["responses"]["200"]["content"]
    assert "after" in {parameter["name"] for parameter in stream["parameters"]}
    assert (
        "application/zip"
        in paths["/api/v1/adapters/{id}/download/"]["get"]["responses"]["200"]["content"]
    )


def test_an_upload_is_a_file_and_a_blank_text_is_none():
    schemas = SchemaGenerator().get_schema(request=None, public=True)["components"]["schemas"]
    assert schemas["UploadRequest"]["properties"]["file"]["format"] == "binary"
    assert schemas["SendRequest"]["properties"]["content"]["minLength"] == 1


def test_the_schema_is_made_once_whatever_is_asked_with_it(client, monkeypatch):
    from portal.rest.schema_view import SchemaView

    made = []
    make = SchemaView._get_schema_response
    monkeypatch.setattr(SchemaView, "made", {})
    monkeypatch.setattr(
        SchemaView, "_get_schema_response", lambda *given: made.append(1) or make(*given)
    )
    texts = {
        client.get(f"/api/schema/?lang={number}&version={number}", HTTP_X=str(number)).content
        for number in range(3)
    }
    assert len(texts) == len(made) == 1
    told = client.get("/api/schema/", headers={"Accept": "application/json"})
    assert told.json()["openapi"] and len(made) == 2
