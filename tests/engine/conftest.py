"""What the tests of compiled models share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from models.engine import compilation
from models.engine.native import build


@pytest.fixture(scope="session")
def program_library() -> Iterator[Path]:
    """The library that runs compiled models, built once for each machine.

    From its first use on, torch asks the processor, and not the compiler too, which vector instructions there are:
    that takes six seconds for each compiled model.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
        yield build.build_library(user_cache_path("parley"), compilation.SOURCE)
