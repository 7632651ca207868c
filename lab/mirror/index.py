"""The Python package index: PEP 503 pages, PEP 691 JSON and PEP 658 metadata of the wheelhouse."""

from __future__ import annotations

import html
import zipfile
from collections import defaultdict
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, unquote

from lab.mirror.python_builds import PythonBuilds
from lab.mirror.web import Handler
from lab.mirror.wheelhouse import Wheel

JSON_TYPE = "application/vnd.pypi.simple.v1+json"


class Index:
    """The wheels by project and by file name."""

    def __init__(self, wheels: list[Wheel]) -> None:
        self.files = {wheel.path.name: wheel for wheel in wheels}
        self.projects: dict[str, list[Wheel]] = defaultdict(list)
        for wheel in wheels:
            self.projects[wheel.project].append(wheel)


class IndexHandler(Handler):
    """/simple/, /files/ and /python/."""

    def __init__(self, index: Index, builds: PythonBuilds, *arguments: Any) -> None:
        self.index, self.builds = index, builds
        super().__init__(*arguments)

    def answer(self) -> None:
        match unquote(self.path.partition("?")[0]).strip("/").split("/"):
            case ["simple"]:
                self._list_projects()
            case ["simple", project] if project in self.index.projects:
                self._list_files(project, self.index.projects[project])
            case ["files", name] if name in self.index.files:
                self.send_file(self.index.files[name].path)
            case ["files", name] if name.removesuffix(".metadata") in self.index.files:
                self.reply(HTTPStatus.OK, metadata(self.index.files[name.removesuffix(".metadata")]))
            case ["python", "downloads.json"]:
                self._list_python_builds()
            case ["python", name] if (path := self.builds.file(name)) is not None:
                self.send_file(path)
            case _:
                self.reply(
                    HTTPStatus.NOT_FOUND, f"the lab's mirror has no {self.path}; it holds what locks/*.txt name.\n"
                )

    def _list_projects(self) -> None:
        links = "".join(f'<a href="{project}/">{project}</a><br>\n' for project in sorted(self.index.projects))
        self.reply(HTTPStatus.OK, f"<!DOCTYPE html>\n{links}", "text/html; charset=utf-8")

    def _list_files(self, project: str, wheels: list[Wheel]) -> None:
        if JSON_TYPE in self.headers.get("Accept", ""):
            self.reply(HTTPStatus.OK, as_json(project, wheels), JSON_TYPE)
        else:
            self.reply(HTTPStatus.OK, as_html(wheels), "text/html; charset=utf-8")

    def _list_python_builds(self) -> None:
        here = f"http://{self.headers.get('Host', '')}/python"
        self.reply(HTTPStatus.OK, self.builds.listing(here))


def as_html(wheels: list[Wheel]) -> str:
    links = (
        f'<a href="../../files/{quote(wheel.path.name)}#sha256={wheel.sha256}" data-core-metadata="true">'
        f"{html.escape(wheel.path.name)}</a><br>\n"
        for wheel in wheels
    )
    return f"<!DOCTYPE html>\n{''.join(links)}"


def as_json(project: str, wheels: list[Wheel]) -> dict[str, object]:
    files = [
        {
            "filename": wheel.path.name,
            "url": f"../../files/{quote(wheel.path.name)}",
            "hashes": {"sha256": wheel.sha256},
            "core-metadata": True,
        }
        for wheel in wheels
    ]
    return {"meta": {"api-version": "1.0"}, "name": project, "files": files}


def metadata(wheel: Wheel) -> str:
    """The METADATA file inside a wheel, which spares the client a download when it resolves."""
    with zipfile.ZipFile(wheel.path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1]
        return archive.read(name).decode()
