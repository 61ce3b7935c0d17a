from __future__ import annotations

from starlette.testclient import TestClient

from models.errors import ServerStoppingError
from models.settings import Settings
from server import create_app
from tests.support.client import ANN, BOB
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat
from tests.support.tiny import opens_tiny


def test_health_ready_and_args_are_open_to_all(settings: Settings) -> None:
    with start(create_app(settings, opens_tiny)) as running:
        client = running.client()
        assert (client.get("/health").status_code, client.get("/health").text) == (200, "ok")
        assert (client.get("/ready").status_code, client.get("/ready").text) == (200, "ready")
        args = client.get("/args")
    assert args.json()["args"]["context"] == 256
    assert args.json()["args"]["device"] == "cpu"
    assert ANN not in args.text
    assert BOB not in args.text


def test_metrics_are_in_the_format_of_prometheus(client: TestClient) -> None:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE parley_" in response.text


def test_the_server_is_not_ready_while_the_model_has_trouble(own_client: TestClient, scripted: ScriptedChat) -> None:
    scripted.trouble = "the engine stopped"
    response = own_client.get("/ready")
    assert (response.status_code, response.text) == (503, "the engine stopped")
    assert own_client.get("/health").status_code == 200


def test_the_server_is_not_ready_while_it_stops(own_client: TestClient, scripted: ScriptedChat) -> None:
    scripted.admission.close()
    response = own_client.get("/ready")
    assert (response.status_code, response.text) == (503, ServerStoppingError.message)


def test_the_server_is_ready_with_a_warning_without_its_database(own_app: RunningApp) -> None:
    own_app.app.state.users.trouble = "the database cannot be read"
    response = own_app.client().get("/ready")
    assert (response.status_code, response.text) == (200, "ready, but the database cannot be read")
