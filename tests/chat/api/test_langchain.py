"""LangChain's own client against the web process, where it is installed (it is no requirement)."""

import pytest

from tests.support.web_process import Web

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("web")]
langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
CALL = 'write <tool_call>{"name": "weather", "arguments": {"at": "京"}}</tool_call>'
SCHEMA = {"title": "Shape", "type": "object", "properties": {"x": {"type": "integer"}}}


@pytest.fixture(scope="module")
def model():
    with Web() as web:
        known = {"base_url": f"{web.url}/v1", "api_key": web.key, "model": "pretend"}
        yield lambda **more: langchain.ChatOpenAI(**known, max_retries=0, timeout=60, **more)


def test_it_asks_and_streams(model):
    assert len(model().invoke("words 3").content.split()) == 3
    assert len("".join(chunk.content for chunk in model().stream("words 5")).split()) == 5
    assert model(use_responses_api=True).invoke("words 2").content[0]["type"] == "text"


def test_it_calls_tools(model):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def weather(at: str) -> str:
        """How the weather is."""
        return "31"

    bound = model().bind_tools([weather])
    said = bound.invoke(CALL)
    (call,) = said.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"at": "京"})
    result = ToolMessage("words 2", tool_call_id=call["id"])
    assert len(bound.invoke([HumanMessage(CALL), said, result]).content.split()) == 2
    first, *rest = bound.stream(CALL)
    assert sum(rest, first).tool_calls[0]["args"] == {"at": "京"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_it_gets_what_has_a_shape(model, method):
    said = (
        '{"name": "Shape", "arguments": {"x": 1}}' if method == "function_calling" else '{"x": 1}'
    )
    shaped = model().with_structured_output(SCHEMA, method=method)
    assert shaped.invoke(f"write {said}") == {"x": 1}
