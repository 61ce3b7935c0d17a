"""What clients may know about the models of a server, and how they choose one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from models.errors import ModelNotFoundError
from models.options import Options

ANY_NAME = "*"
MAX_MODEL_NAME = 256  # characters of a name that a reply has


@dataclass(frozen=True)
class ModelInfo:
    """What clients may know about a model. The name "*" among the `aliases` means every name."""

    name: str
    context: int | None  # how many tokens a prompt and its reply may have together; None is unknown
    defaults: Options
    aliases: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()  # "tools", "reasoning", "images"

    @property
    def has_images(self) -> bool:
        """Whether it reads pictures."""
        return "images" in self.capabilities

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name, and its other names."""
        return tuple(dict.fromkeys([self.name, *(alias for alias in self.aliases if alias != ANY_NAME)]))

    def is_called(self, name: str) -> bool:
        """Whether a client may call it by this name."""
        return name in self.names or (ANY_NAME in self.aliases and 0 < len(name) <= MAX_MODEL_NAME)


class ModelList:
    """The models that clients may choose from; the first one is the default. Once a server has started, there is one.

    They can change while the server runs; `on_change` is called then.
    """

    def __init__(self, models: Iterable[ModelInfo]) -> None:
        self._models = tuple(models)
        self.on_change: Callable[[], None] | None = None

    @property
    def all(self) -> tuple[ModelInfo, ...]:
        """The models, the default one first."""
        return self._models

    @property
    def default(self) -> ModelInfo:
        """The model of requests that name none."""
        return self._models[0]

    def replace(self, models: Iterable[ModelInfo]) -> None:
        """Offer other models from now on."""
        before, self._models = self._models, tuple(models)
        if before != self._models and self.on_change:
            self.on_change()

    def choose(self, name: str | None) -> ModelInfo:
        """The model that a request names, or the default one. Raises ModelNotFoundError."""
        if name is None:
            return self.default
        for model in self._models:
            if name in model.names:
                return model
        for model in self._models:
            if model.is_called(name):
                return model
        raise ModelNotFoundError([model.name for model in self._models])

    def of(self, name: str | None) -> ModelInfo:
        """The model of a stored reply; the default one if it is not offered any more."""
        return next((model for model in self._models if name in model.names), self.default)
