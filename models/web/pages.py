"""The chat page, the login and the static files."""

from __future__ import annotations

import json
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import Scope

from models.errors import APIError, WrongCredentialsError
from models.users.devices import DEVICE_SECONDS
from models.users.sessions import SESSION_SECONDS
from models.users.users import User
from models.web.authentication import check_origin, log_in, login_of_cookie
from models.web.cookies import DEVICE, SESSION, set_cookie

TEMPLATES = Path(__file__).parents[2] / "templates"
LANGUAGES = json.loads((TEMPLATES / "languages.json").read_text(encoding="utf-8"))

templates = Jinja2Templates(TEMPLATES)


async def home(request: Request) -> Response:
    """The chat page for a user, the login form for anybody else."""
    login = login_of_cookie(request)
    return _page(request, login.user if login else None)


async def login(request: Request) -> Response:
    """Log in with a secret: set the session cookie, or show the form with an error."""
    try:
        check_origin(request)
        if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            raise HTTPException(400, "a login is application/x-www-form-urlencoded")  # other parsers can fail
        async with request.form(max_fields=4) as form:
            secret = str(form.get("secret", ""))
        user = (await log_in(request, secret.strip())).user
    except APIError as error:
        return _refused(request, error)
    response, users = RedirectResponse("./", 303), request.app.state.users
    set_cookie(request, response, SESSION, users.session_token(user), SESSION_SECONDS)
    set_cookie(request, response, DEVICE, users.device_token(user), DEVICE_SECONDS)
    return response


async def logout(request: Request) -> Response:
    """End the session and delete its cookie. The browser stays known as a device of the user."""
    try:
        check_origin(request)
    except APIError as error:
        return _refused(request, error)
    if (login := login_of_cookie(request)) and login.session:
        await request.app.state.users.end_session(login.session)
    response = RedirectResponse("./", 303)
    set_cookie(request, response, SESSION, "", 0)
    return response


def _refused(request: Request, error: APIError) -> Response:
    """The login form with an error."""
    word = "wrong_secret" if isinstance(error, WrongCredentialsError) else f"error_{error.code}"
    return _page(request, None, word, error.status)


def _page(request: Request, user: User | None, error: str | None = None, status: int = 200) -> Response:
    """The page, in the first language of the browser that we support."""
    wanted = [language.strip()[:2].lower() for language in request.headers.get("accept-language", "").split(",")]
    language = next((name for name in wanted if name in LANGUAGES), "en")
    context = {
        "user": user and user.id,
        "error": error,
        "model": request.app.state.models.default.name,
        "language": language,
        "words": LANGUAGES[language],
    }
    return templates.TemplateResponse(request, "chat.html", context, status)


class FreshStaticFiles(StaticFiles):
    """Static files that browsers check each time, so that old and new scripts never run together."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file, or a not-modified response."""
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


static_files = FreshStaticFiles(directory=TEMPLATES / "static")
