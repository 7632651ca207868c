"""SSH into lab hosts: the lab's key, and host keys known beforehand, so that nothing is trusted on first use."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from lab import LabError, shell, state
from lab.state import Host, Lab


def command(lab: Lab, host: Host, *words: str, user: str = "root") -> list[str]:
    """The ssh command line that runs `words` on the host, or logs in; the operator's own configuration is not read."""
    options = {
        "IdentityFile": lab.ssh_key,
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": lab.known_hosts,
        "StrictHostKeyChecking": "yes",
        "BatchMode": "yes",
        "ConnectTimeout": "5",
        "ServerAliveInterval": "3",  # a host that loses its power says no goodbye
        "LogLevel": "ERROR",
    }
    return ["ssh", "-F", "none", *(f"-o{key}={value}" for key, value in options.items()), f"{user}@{host.ip}", *words]


def run(name: str, script: str, user: str = "root", timeout_seconds: float = 60) -> str:
    """Runs a shell script on the host and returns its output; LabError with its error output where it fails."""
    lab, host = state.find_host(name)
    done = attempt(lab, host, script, user=user, timeout_seconds=timeout_seconds)
    if done is None:
        raise LabError(f"{name} did not answer within {timeout_seconds:.0f} s: {script!r}")
    if done.returncode != 0:
        raise LabError(f"{script!r} on {name} failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def attempt(
    lab: Lab, host: Host, script: str, user: str = "root", timeout_seconds: float = 60
) -> subprocess.CompletedProcess[str] | None:
    """Like `run`, for a host that may not answer: None after the timeout."""
    argv = command(lab, host, script, user=user)
    try:
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout_seconds
        )
    except subprocess.TimeoutExpired:
        return None


def make_lab_key(lab: Lab) -> None:
    """The lab's key pair, made once."""
    if not lab.ssh_key.exists():
        lab.directory.mkdir(parents=True, exist_ok=True)
        _make_key(lab.ssh_key, comment=f"llmhost-lab-{lab.prefix}")


def make_host_key(lab: Lab, host: Host) -> tuple[str, str]:
    """A new host key, private and public half; from now on the only one that this lab takes for the host."""
    with tempfile.TemporaryDirectory() as scratch:
        key = Path(scratch, "key")
        _make_key(key, comment=host.name)
        private, public = key.read_text(), key.with_suffix(".pub").read_text()
    forget(lab, host)
    with lab.known_hosts.open("a") as file:
        file.write(f"{host.ip},{host.name} {public}")
    return private, public


def forget(lab: Lab, host: Host) -> None:
    """Drops the host's key."""
    if lab.known_hosts.exists():
        lines = lab.known_hosts.read_text().splitlines(keepends=True)
        lab.known_hosts.write_text("".join(line for line in lines if not line.startswith(f"{host.ip},")))


def _make_key(file: Path, comment: str) -> None:
    shell.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(file))
