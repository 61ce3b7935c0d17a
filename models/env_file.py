"""Reads the file `.env`."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from models.errors import SettingsError, one_line

logger = logging.getLogger("parley")

LINE = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*)")
QUOTED = re.compile(r"""(["'])(.*)\1""")


def read_env_file(path: Path) -> dict[str, str]:
    """The values of a file with lines such as `NAME=value`, by name; none if there is no file.

    Other lines are logged and ignored, as is a folder of this name. Raises SettingsError if the file cannot be read.
    """
    if not os.path.lexists(path):  # a link to nowhere is an error, or all settings would vanish
        return {}
    if path.is_dir():
        logger.warning("%s is a folder, so no settings are read from it", path)
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors may write a mark at the beginning
    except UnicodeError:
        text = "\0"
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {one_line(error)}") from error
    if "\0" in text:  # UTF-16 without a mark is valid UTF-8
        raise SettingsError(f"{path} cannot be read: it is not UTF-8; save it again as UTF-8")
    return _parse(path, text)


def _parse(path: Path, text: str) -> dict[str, str]:
    values = {}
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        if match := LINE.fullmatch(line):
            name, value = match.groups()
            quoted = QUOTED.fullmatch(value)
            values[name] = quoted[2] if quoted else value
        elif line and not line.startswith("#"):
            logger.warning("%s, line %d has no effect: it is not NAME=value", path, number)
    return values
