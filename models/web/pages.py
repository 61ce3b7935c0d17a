"""The chat page, the login and the static files."""

from __future__ import annotations

import json
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import Scope

from models.errors import APIError, OriginNotAllowedError, WrongCredentialsError
from models.users.users import SESSION_SECONDS, User
from models.web.authentication import has_allowed_origin, log_in, user_of_cookie
from models.web.cookies import SESSION

TEMPLATES = Path(__file__).parents[2] / "templates"
LANGUAGES = json.loads((TEMPLATES / "languages.json").read_text(encoding="utf-8"))

templates = Jinja2Templates(TEMPLATES)


async def home(request: Request) -> Response:
    """The chat page for a user, the login form for anybody else."""
    return _page(request, user_of_cookie(request))


async def login(request: Request) -> Response:
    """Log in with a secret: set the session cookie, or show the form with an error."""
    async with request.form(max_files=0, max_fields=4, max_part_size=4096) as form:
        secret = str(form.get("secret", ""))
    try:
        if "origin" in request.headers and not has_allowed_origin(request):
            raise OriginNotAllowedError
        user = await log_in(request, secret.strip())
    except APIError as error:
        word = "wrong_secret" if isinstance(error, WrongCredentialsError) else f"error_{error.code}"
        return _page(request, None, word, error.status)
    response = RedirectResponse("./", 303)
    token, secure = request.app.state.users.session_token(user), request.url.scheme == "https"
    response.set_cookie(SESSION, token, SESSION_SECONDS, httponly=True, samesite="strict", secure=secure)
    return response


async def logout(request: Request) -> Response:
    """Delete the session cookie."""
    response = RedirectResponse("./", 303)
    response.delete_cookie(SESSION, httponly=True, samesite="strict")
    return response


def _page(request: Request, user: User | None, error: str | None = None, status: int = 200) -> Response:
    """The page, in the first language of the browser that we support."""
    wanted = [language.strip()[:2].lower() for language in request.headers.get("accept-language", "").split(",")]
    language = next((name for name in wanted if name in LANGUAGES), "en")
    context = {
        "user": user and user.id,
        "error": error,
        "model": request.app.state.model_info.name,
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
