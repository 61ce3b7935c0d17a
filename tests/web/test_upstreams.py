"""A server in front of another one: what clients and operators see of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from models.settings import Settings
from models.validation import Json
from server import create_app
from tests.support.client import ANN
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served, serve
from tests.support.workers import serve_by_workers


@pytest.fixture
def behind(settings: Settings, scripted: ScriptedChat) -> Starlette:
    return create_app(settings, scripted.opened)


@contextmanager
def in_front(settings: Settings, *behind: Served, workers: bool = False) -> Iterator[tuple[Served, httpx2.Client]]:
    """A server in front of some others, and ann's client of it."""
    urls = tuple(f"{one.url}/v1" for one in behind)
    own = replace(settings, upstream=urls, upstream_key=ANN, data=settings.data / "front")
    with (serve_by_workers if workers else serve)(create_app(own)) as served:
        headers = {"Authorization": f"Bearer {ANN}"}
        with httpx2.Client(base_url=served.url, headers=headers, trust_env=False) as client:
            yield served, client


def look(served: Served) -> None:
    """Let a server look at its upstreams now."""
    asyncio.run_coroutine_threadsafe(served.app.state.chat.look(), served.loop).result()


def response(client: httpx2.Client, text: str) -> Json:
    return dict(client.post("/v1/responses", json={"input": text}).json())


def test_there_is_no_tokenizer_and_no_model(settings: Settings, behind: Starlette) -> None:
    with serve(behind) as upstream, in_front(settings, upstream) as (served, _):
        assert (served.app.state.tokenizer, served.app.state.model) == (None, None)


@pytest.mark.parametrize("workers", [False, True], ids=["one process", "workers"])
def test_an_upstream_that_is_gone_is_told(settings: Settings, behind: Starlette, workers: bool) -> None:
    with ExitStack() as stack:
        with serve(behind) as upstream:
            served, client = stack.enter_context(in_front(settings, upstream, workers=workers))
            assert client.get("/ready").text == "ready"
            assert response(client, "say hi")["status"] == "completed"
            assert client.get("/args").json()["args"]["upstreams"][0]["kind"] == "parley"
            address = upstream.address
        look(served)
        ready = client.get("/ready")
        assert (ready.status_code, address in ready.text) == (503, True)
        refused = client.post("/v1/responses", json={"input": "say hi"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "upstream_unavailable")
        assert "Retry-After" in refused.headers


def test_a_reply_that_fails_keeps_its_text(settings: Settings, behind: Starlette) -> None:
    with serve(behind) as upstream, in_front(settings, upstream) as (_, client):
        failed = response(client, "break here")
        assert failed["status"] == "failed"
        again = client.get(f"/v1/responses/{failed['id']}").json()
        assert again["output"][0]["content"][0]["text"] == "here"
        assert "has failed" in again["error"]["message"]
        followed = client.post("/v1/responses", json={"input": "say more", "previous_response_id": failed["id"]})
        assert followed.json()["status"] == "completed"


def test_what_the_upstream_refuses_is_told_in_its_words(settings: Settings) -> None:
    async def models(request: Request) -> Response:
        return JSONResponse({"data": [{"id": "tiny", "owned_by": "vllm"}]})

    async def refuse(request: Request) -> Response:
        return JSONResponse({"error": {"message": "no pictures, please", "code": 400}}, 400)

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", refuse, methods=["POST"])]
    with serve(Starlette(routes=routes), http="h11") as upstream, in_front(settings, upstream) as (_, client):
        failed = response(client, "Hi")
        assert failed["status"] == "failed"
        again = client.get(f"/v1/responses/{failed['id']}").json()
        assert failed["error"] == again["error"]
        assert (again["error"]["code"], again["error"]["message"]) == ("invalid_prompt", "no pictures, please")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
        refused = client.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["message"]) == (400, "no pictures, please")


def test_models_that_an_upstream_gets_later_reach_the_workers(settings: Settings, scripted: ScriptedChat) -> None:
    with serve(create_app(settings, scripted.opened)) as upstream:
        with in_front(settings, upstream, workers=True) as (served, client):
            info = scripted.models.default
            scripted.models.replace([info, replace(info, name="large")])
            look(served)
            for _ in range(4):  # of both workers
                with httpx2.Client(base_url=served.url, headers=client.headers, trust_env=False) as other:
                    listed = [model["id"] for model in other.get("/v1/models").json()["data"]]
                assert listed == ["scripted", "large"]
