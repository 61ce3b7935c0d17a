"""Every command and every example in the documents is run, or has a reason why not."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest
from platformdirs import user_cache_path

from models.settings import OPTION_PARSERS, PREFIX, RULES, Settings
from server import create_app
from tests.support.process import PATIENCE, until
from tests.support.serving import Served, serve
from tests.support.tiny import opens_tiny, tiny_llama, tiny_tokenizer
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECRET = "a-secret-that-fits-a-URL"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "models/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)

# Commands that are not run here, and why.
NOT_RUN = {
    "python3 -m venv .venv": "`.ci/run` does it",
    ".venv/bin/pip install uv && .venv/bin/uv pip install --python .venv --torch-backend=cpu torch==2.13.0": (
        "needs the package index of PyTorch"
    ),
    ".venv/bin/pip install --no-deps --require-hashes -r requirements.lock": "`.ci/run` does it",
    ".venv/bin/pip install -r tests/requirements.txt": "`.ci/run` does it",
    "python3 -m venv .venv && .venv/bin/pip install -r tests/requirements.txt && .venv/bin/python -m pytest": (
        "`.ci/run` does it"
    ),
    ".venv/bin/python -m pytest": "`.ci/run` does it",
    ".ci/check": "`.ci/run` does it",
    ".venv/bin/ruff format .": "`.ci/check` does it, without changing files",
    ".venv/bin/pip install uv && .venv/bin/uv pip compile --universal --python-version 3.11 --generate-hashes"
    " requirements.txt -o requirements.lock": "needs the package index, and its answer changes",
    ".venv/bin/python tests/browser/screenshots.py": "it replaces the pictures of README.md",
    ".venv/bin/python tests/browser/smoothness.py": "takes minutes, and only its numbers matter",
    "PARLEY_MODEL=Qwen/Qwen3-0.6B .venv/bin/python server.py": "needs the Hub",
    "PARLEY_UPSTREAM=http://gpu1:8000/v1,http://gpu2:8000/v1 .venv/bin/python server.py": "needs other machines",
    ".venv/bin/pip install -c requirements.txt starlette uvicorn websockets httpx2 msgspec sqlalchemy greenlet"
    " aiosqlite click itsdangerous jinja2 limits prometheus-client python-json-logger python-multipart": (
        "tests/test_requirements.py sees to it that the list is complete"
    ),
    "vllm serve Qwen/Qwen3-32B --tensor-parallel-size 4 --enable-auto-tool-choice --tool-call-parser hermes"
    " --reasoning-parser qwen3 --enable-prompt-tokens-details": "needs GPUs",
    "PARLEY_UPSTREAM=http://gpu1:8000/v1 PARLEY_SLOTS=256 .venv/bin/python server.py --workers 4": "the same",
    "python3 -m venv .bench/llama && .bench/llama/bin/pip install xllamacpp==2026.10.11549": "`.ci/run` does it",
    ".bench/llama/bin/python tests/bench/llama_server.py ~/.cache/parley/SmolLM2-135M-Instruct-bcc81830d10c.gguf": (
        "needs the package of llama.cpp"
    ),
    "PARLEY_UPSTREAM=http://127.0.0.1:7802/v1 .venv/bin/python server.py": "needs the server before it",
    "python3 -m venv .bench/peers": "the peers of the benchmark take gigabytes",
    '.bench/peers/bin/pip install torch==2.13.0 xllamacpp "transformers[serving]==5.23.0"': "the same",
    ".venv/bin/python tests/bench/compare.py --peers .bench/peers": "takes twenty minutes",
    ".venv/bin/python tests/bench/compare.py --peers .bench/peers --model .bench/models/0.5B-Q4_K_M.gguf": "the same",
    ".venv/bin/python tests/bench/loading.py": "makes files of gigabytes",
    ".venv/bin/python tests/bench/gpu.py": "needs a GPU",
}


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """The code blocks of a language in all documents."""
    for path in DOCUMENTS:
        for block in re.findall(
            rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            yield path, block


def commands() -> list[str]:
    """The shell commands in all documents, once each."""
    return list(dict.fromkeys(line for _, block in blocks("sh") for line in block.splitlines()))


def examples() -> list[str]:
    """The Python programs in all documents."""
    return [block for _, block in blocks("python")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with models in it, as the documents name them, and a certificate."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    write_tiny_gguf(home / "models" / "model.Q4_K_M.gguf")
    tiny_llama().save_pretrained(home / "models" / "my-model")
    tiny_tokenizer().save_pretrained(home / "models" / "my-model")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*make, "-subj", "/CN=localhost"], cwd=home, check=True, capture_output=True)
    return home


@pytest.fixture
def environment(home: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a command: a small model, and folders of its own."""
    settings = {"MODEL": str(home / "models" / "my-model"), "DATA": str(tmp_path / "data"), "COMPILE": "false"}
    caches = {"XDG_CACHE_HOME": str(user_cache_path()), "HOME": str(home)}
    return os.environ | caches | {f"{PREFIX}{name}": value for name, value in settings.items()}


def localized(command: str) -> str:
    """A command with the interpreter of this process, whichever environment that is of."""
    return command.replace(".venv/bin/", f"{Path(sys.executable).parent}/")


def run(command: str, environment: dict[str, str], folder: Path = ROOT) -> str:
    """Run a command to its end; returns what it prints."""
    done = subprocess.run(
        ["bash", "-euc", localized(command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serving(
    command: str, environment: dict[str, str], port: int, folder: Path = ROOT, scheme: str = "http"
) -> Iterator[str]:
    """Run a command that serves, until its page can be read; then end it as Ctrl-C does."""
    process = subprocess.Popen(["bash", "-euc", f"exec {localized(command)}"], cwd=folder, env=environment)
    url = f"{scheme}://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, f"{command} ended with {process.returncode}"
        try:
            return httpx2.get(f"{url}/ready", verify=False).text == "ready"
        except httpx2.TransportError:
            return False

    try:
        until(ready, command)
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def serve_command(command: str, environment: dict[str, str]) -> None:
    """Run `... server.py ...` on a free port, and read its page."""
    port = free_port()
    variables = " ".join(re.findall(r"^PARLEY_\w+=\S+", command))
    rest = command.removeprefix(variables).strip()
    with serving(f"env {variables} {rest} --port {port}", environment, port) as url:
        assert 'name="secret"' in httpx2.get(url).text


def serve_with_uvicorn(command: str, environment: dict[str, str], home: Path) -> None:
    """Run uvicorn with the certificate of the home folder."""
    port = free_port()
    command = command.replace("--port 443", f"--port {port} --app-dir {ROOT}")
    with serving(command, environment, port, home, "https") as url:
        assert 'name="secret"' in httpx2.get(url, verify=False).text


SERVE = (
    ".venv/bin/python server.py",
    ".venv/bin/python server.py --host 0.0.0.0",
    ".venv/bin/python server.py --workers 4",
    "PARLEY_MODEL=~/models/my-model .venv/bin/python server.py",
    "PARLEY_MODEL=~/models/model.Q4_K_M.gguf .venv/bin/python server.py",
)
UVICORN = (
    ".venv/bin/uvicorn server:app --host 0.0.0.0 --port 443 --ssl-keyfile key.pem --ssl-certfile cert.pem"
    " --http models.web.http_protocol:HTTPProtocol --no-proxy-headers",
)
SHORT = {  # commands that take too long as they are, and how they are run here
    ".venv/bin/python tests/bench/engine.py": "--streams 1 --tokens 4 --no-compile",
    ".venv/bin/python tests/bench/soak.py --users 64 --seconds 600": "--users 4 --actions 2 --linger 1 --pause 0",
    ".venv/bin/python tests/bench/idle.py --seconds 40": "--seconds 1 --idle 10 --streams 2",
    '.venv/bin/python -m pytest -m "not slow and not compiler and not browser and not postgresql"': "--co -q",
    ".venv/bin/python -m pytest tests/engine -k scheduler": "--co -q",
}
USERS = [f".venv/bin/python server.py users {command}" for command in ("add ann", "list", "remove ann")]
BACKUP = [
    "umask 077",
    ".venv/bin/python -c \"import sqlite3; sqlite3.connect('data/parley.db').backup(sqlite3.connect('backup.db'))\"",
    "cp data/key backup.key",
]
SIMPLE = ["hostname -I", ".venv/bin/python tests/bench/gpu.py --device cpu --smoke"]


def test_every_command_is_run_or_has_a_reason() -> None:
    known = [*NOT_RUN, *SERVE, *UVICORN, *SHORT, *USERS, *BACKUP, *SIMPLE]
    assert sorted(commands()) == sorted(known)


@pytest.mark.parametrize("command", SERVE)
def test_a_command_that_serves_answers_with_the_page(command: str, environment: dict[str, str]) -> None:
    serve_command(command, environment)


@pytest.mark.parametrize("command", UVICORN)
def test_uvicorn_serves_over_tls(command: str, environment: dict[str, str], home: Path) -> None:
    serve_with_uvicorn(command, environment, home)


@pytest.fixture(scope="module", autouse=True)
def started() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The long commands with smaller arguments, all at once, while the other tests run."""
    with ExitStack() as stack:
        processes = {}
        for command, smaller in SHORT.items():
            words = command.split(" --")[0] if "bench" in command else command
            start = ["bash", "-euc", f"exec {localized(words)} {smaller}"]
            process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            processes[command] = stack.enter_context(process)
        yield processes


@pytest.mark.parametrize("command", SIMPLE)
def test_a_simple_command_runs(command: str) -> None:
    assert run(command, dict(os.environ))


def test_the_commands_for_users_and_backups_run_one_after_the_other(
    environment: dict[str, str], tmp_path: Path
) -> None:
    added, listed, removed = (run(command, environment) for command in USERS)
    assert re.match(r"added ann; the secret, shown only this once: \S+", added)
    assert listed == "ann\n"
    assert removed == "removed ann\n"
    run("\n".join(BACKUP), environment, tmp_path)
    for name in ("backup.db", "backup.key"):
        assert (tmp_path / name).stat().st_size > 0
        assert (tmp_path / name).stat().st_mode & 0o077 == 0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server for the examples, with a tiny model that ends its replies soon."""
    settings = Settings(
        context=256,
        compile=False,
        data=tmp_path_factory.mktemp("data"),
        users={"admin": SECRET},
        options={"max_output_tokens": 8, "temperature": 0},  # by chance, a reply would now and then be empty
    )
    with serve(create_app(settings, opens_tiny)) as served:
        yield served


def test_there_are_examples() -> None:
    assert len(examples()) == 4


@pytest.mark.parametrize("example", examples(), ids=["Chat Completions", "Responses", "chat.v2", "plain text"])
def test_an_example_prints_a_reply(example: str, served: Served) -> None:
    example = example.replace("127.0.0.1:7777", served.address).replace('"the secret"', repr(SECRET))
    command = [sys.executable, "-u", "-c", example, SECRET]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(1), process.stderr.read()
        process.send_signal(signal.SIGINT)


def test_every_setting_has_a_row_in_the_table_of_readme() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"`{PREFIX}(\w+)`", "\n".join(re.findall(rf"^\| `{PREFIX}.*$", table, re.MULTILINE))))
    assert {name.lower() for name in named} == {*RULES, *OPTION_PARSERS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_file_in_a_document_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [
        link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)|(?:src)=\"([^\"]+)\"", text) for link in link
    ]
    for link in filter(None, links):
        assert link.startswith("http") or (document.parent / link).exists(), link


def test_every_module_in_the_map_exists() -> None:
    text = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"`((?:\w+/)+\w+\.\w+)`", text)):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "models")), name


@pytest.mark.parametrize("command", SHORT)
def test_a_long_command_runs_with_smaller_arguments(command: str, started: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = started[command].communicate()
    assert started[command].returncode == 0, output
