"""Templates to text. Pure but for reading the templates themselves."""

from __future__ import annotations

import functools
from pathlib import PurePosixPath
from typing import Any

import jinja2

from llmhost.catalogue import ROOT


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(path: str, **values: Any) -> str:
    """The content of `path` on the host, from its template: templates/ mirrors the host's file system."""
    template = PurePosixPath(path).relative_to("/").as_posix() + ".j2"
    return _environment().get_template(template).render(**values)
