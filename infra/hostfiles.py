"""This rendered tree of files: compared with one call, only what differs is sent with a second.

pyinfra's files.template takes two round trips a file and puts contents through a world-readable temporary file;
this takes two for the whole tree, writes atomically, and names each file in the output and in --diff.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass

from pyinfra import host, logger, state
from pyinfra.api import QuoteString, StringCommand, operation

from infra.facts import JsonFact, failed_look


@dataclass(frozen=True)
class HostFile:
    """A whole file on the host. Never a secret's: its content is shown by --diff (secrets: infra/secretfiles.py)."""

    path: str
    content: str
    mode: str = "0644"
    owner: str = "root"
    group: str = "root"


@dataclass(frozen=True)
class HostDirectory:
    """A directory on the host."""

    path: str
    mode: str = "0755"
    owner: str = "root"
    group: str = "root"


Entry = HostFile | HostDirectory


class TreeState(JsonFact):
    """{path: {kind, mode, owner, group, sha256, text}} for those of the given paths that exist."""

    program = r"""
import grp, hashlib, json, os, pwd, stat, sys
wanted, found = json.loads(sys.argv[1]), {}
def name(of, number, field):
    try: return getattr(of(number), field)
    except KeyError: return str(number)
for path, with_text in wanted.items():
    try: status = os.lstat(path)
    except OSError: continue
    kind = "file" if stat.S_ISREG(status.st_mode) else "directory" if stat.S_ISDIR(status.st_mode) else "other"
    seen = found[path] = {"kind": kind, "mode": "%04o" % stat.S_IMODE(status.st_mode),
        "owner": name(pwd.getpwuid, status.st_uid, "pw_name"), "group": name(grp.getgrgid, status.st_gid, "gr_name")}
    if kind == "file":
        data = open(path, "rb").read()
        seen["sha256"] = hashlib.sha256(data).hexdigest()
        if with_text: seen["text"] = data.decode(errors="replace")
print(json.dumps(found))
"""


# Runs on the host with the entries that differ as JSON on standard input. Each file appears at once and complete.
_WRITE = r"""
import grp, json, os, pwd, shutil, sys
for entry in json.load(sys.stdin):
    path, mode = entry["path"], int(entry["mode"], 8)
    owner, group = pwd.getpwnam(entry["owner"]).pw_uid, grp.getgrnam(entry["group"]).gr_gid
    if entry["kind"] == "directory":
        if os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path)):
            sys.exit("%s exists and is no directory: move it away" % path)
        os.makedirs(path, exist_ok=True)
        os.chown(path, owner, group)
        os.chmod(path, mode)
        continue
    if os.path.isdir(path) and not os.path.islink(path):
        sys.exit("%s is a directory, expected a file: move it away" % path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + ".llmhost-part"
    if os.path.lexists(part): os.unlink(part)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(entry["content"].encode())
        stream.flush()
        os.fchown(descriptor, owner, group)
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    os.rename(part, path)
"""


@operation()
def tree(entries: Sequence[Entry]) -> Generator[StringCommand]:
    """Make these files and directories exactly so.

    + entries: what the host shall have, directories before what lies in them
    """
    looked = _look(entries)
    if failed_look(looked):
        return
    seen = looked or {}
    changed = [entry for entry in entries if _differs(entry, seen.get(entry.path))]
    for entry in changed:
        _announce(entry, seen.get(entry.path))
    if changed:
        payload = json.dumps([{**asdict(entry), "kind": _kind(entry)} for entry in changed])
        yield StringCommand("python3", "-c", QuoteString(_WRITE), _stdin=[payload])
    else:
        host.noop(f"{len(entries)} files and directories are as planned")


@operation()
def absent(paths: Sequence[str]) -> Generator[StringCommand]:
    """None of these files is there.

    + paths: files of llmhost's own; directories are left
    """
    looked = host.get_fact(TreeState, argument=json.dumps(dict.fromkeys(paths, False)))
    if failed_look(looked):
        return
    present = [path for path in paths if (looked or {}).get(path, {}).get("kind", "directory") != "directory"]
    for path in present:
        logger.info(f"{host.print_prefix}remove {path}, which is no longer planned")
    if present:
        yield StringCommand("rm", "-f", *map(QuoteString, present))
    else:
        host.noop("none of them is there")


def _look(entries: Sequence[Entry]) -> dict[str, dict[str, str]] | None:
    with_text = bool(state.config.DIFF)
    wanted = {entry.path: with_text and isinstance(entry, HostFile) for entry in entries}
    seen: dict[str, dict[str, str]] | None = host.get_fact(TreeState, argument=json.dumps(wanted))
    return seen


def _kind(entry: Entry) -> str:
    return "file" if isinstance(entry, HostFile) else "directory"


def _differs(entry: Entry, seen: dict[str, str] | None) -> bool:
    if seen is None or seen["kind"] != _kind(entry):
        return True
    if (seen["mode"], seen["owner"], seen["group"]) != (entry.mode, entry.owner, entry.group):
        return True
    return isinstance(entry, HostFile) and seen["sha256"] != hashlib.sha256(entry.content.encode()).hexdigest()


def _announce(entry: Entry, seen: dict[str, str] | None) -> None:
    verb = "create" if seen is None else "change"
    logger.info(f"{host.print_prefix}{verb} {entry.path} ({entry.mode} {entry.owner}:{entry.group})")
    if not (state.config.DIFF and isinstance(entry, HostFile)):
        return
    old = (seen or {}).get("text", "").splitlines()
    for line in difflib.unified_diff(old, entry.content.splitlines(), entry.path, entry.path, lineterm="", n=1):
        logger.info(f"{host.print_prefix}    {line}")
