"""scripts/demo: a lab host from bare to a verified reply, with the step, the elapsed time and the sizes on screen."""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx

from lab import LabError, life, preflight, ssh, state

PREFIX = "demo"
ROOT = Path(__file__).resolve().parent.parent
# Published on the lab's own bridge only, so that a browser on this machine reaches the page.
PUBLISHED = ("--data", "webui_publish=true", "--data", "engine_publish=true")
QUIET_SECONDS = 10
# Programs of the same name that tests use: Open WebUI's system calls are watched for outside addresses.
TEST_PACKAGES = ("strace",)
STEPS = (
    "Lab packages",
    "Lab mirror (wheels, model)",
    "Lab host",
    "pyinfra inventories/lab.py deploy.py",
    "Ask the model",
)

_began = time.monotonic()


def main() -> int:
    """Exit 0 with a reply shown, 1 when a step failed."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--down", action="store_true", help="remove the demo's host and all that belongs to it")
    parser.add_argument("--install-packages", action="store_true", help="only install what lab and tests need")
    arguments = parser.parse_args()
    try:
        if arguments.down:
            life.down(PREFIX, say=say)
            return 0
        if arguments.install_packages:
            install_packages(for_tests=True)
            preflight.require(["debian-12", "debian-13"])
            return 0
        return demo()
    except LabError as error:
        print(f"scripts/demo: {error}", file=sys.stderr)
        return 1


def demo() -> int:
    step(0)
    install_packages()
    preflight.require()  # before anything large is fetched
    step(1)
    run([sys.executable, "-m", "lab.mirror", "prepare"])
    step(2)
    life.up(life.requests([], 1), PREFIX, life.Options(), say=say)
    step(3)
    run(
        [str(Path(sys.executable).parent / "pyinfra"), "inventories/lab.py", "deploy.py", "-y", *PUBLISHED],
        LLMHOST_LAB=PREFIX,
    )
    step(4)
    _, host = state.find_host(f"{PREFIX}-1")
    question, reply = ask(host.name, host.ip)
    print(
        FAREWELL.format(question=question, reply=reply, ip=host.ip, name=host.name, cache=state.cache_directory()),
        flush=True,
    )
    return 0


FAREWELL = """
  You asked:      {question}
  It answered:    {reply}

  Chat page       http://{ip}:7860   (from this machine)
  Engine's API    http://{ip}:8000/v1
  Credentials     .venv/bin/python -m lab ssh {name} cat /etc/llmhost/secrets/open-webui.env
                  sign in as admin@localhost with WEBUI_ADMIN_PASSWORD; the API's key is OPENAI_API_KEY
  Certificate     reports/lab/{name}.json
  Look around     .venv/bin/python -m lab ssh {name}
  Remove it       scripts/demo --down   (the host and its network; wheels and image stay in {cache} for the next time)
"""


def install_packages(*, for_tests: bool = False) -> None:
    """The Debian packages the lab misses, installed or named."""
    if sys.platform != "linux":
        raise LabError("the lab needs Linux: its hosts are systemd in Linux namespaces")
    missing = preflight.missing_packages(gpu=for_tests)
    missing += [name for name in TEST_PACKAGES if for_tests and not shutil.which(name)]
    if not missing:
        return
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or not Path("/usr/bin/apt-get").exists():
        raise LabError(f"the lab needs these packages: {' '.join(missing)}. As root: {shlex.join(command)}")
    say(f"install {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["apt-get", "update", "-qq"], [*command, "-qq"]):
        ended = subprocess.run(words, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise LabError(f"{shlex.join(words)} failed: {ended.stderr.strip()}")


def run(command: list[str], **environment: str) -> None:
    """Run a command, showing its lines as they come; while it is silent, that it still works."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYINFRA_PROGRESS": "off", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in lines(process):
        if line := interesting(line):
            say(line)
    if process.wait():
        raise LabError(f"{shlex.join(command)} ended with {process.returncode}; its words are above")


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Lines as they come, and "..." where none has come for a while."""
    assert process.stdout
    arrived: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=_read_all, args=(process.stdout, arrived), daemon=True)
    reader.start()
    while True:
        try:
            line = arrived.get(timeout=QUIET_SECONDS)
        except queue.Empty:
            yield "..."
            continue
        if not line:
            return
        yield line.rstrip()


def _read_all(stream: IO[str], arrived: queue.Queue[str]) -> None:
    for line in stream:
        arrived.put(line)
    arrived.put("")


def interesting(line: str) -> str:
    """What of pyinfra's output tells the story: each operation, what it does, and what went wrong."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
    if line.startswith("--> Starting operation: "):
        return line.removeprefix("--> Starting operation: ")
    if not line or re.match(
        r"-->|Operation |Grand total|Loading: |.* \| |.*(Success|No changes|Connected)$|.*Ready: ", line
    ):
        return ""
    return f"  {line}"


def ask(name: str, ip: str) -> tuple[str, str]:
    """One question to the engine over its API, with the key read from the host and kept in memory."""
    model = json.loads(ssh.run(name, "cat /etc/llmhost/plan.json"))["engine"]["model"]
    key = ssh.run(name, "sed -n s/^VLLM_API_KEY=//p /etc/llmhost/secrets/vllm.env").strip()
    message = {"role": "user", "content": model["proof_question"]}
    question = {"model": model["served_name"], "messages": [message], "temperature": 0, "max_tokens": 64}
    with httpx.Client(trust_env=False, timeout=60) as client:
        reply = client.post(
            f"http://{ip}:8000/v1/chat/completions", json=question, headers={"Authorization": f"Bearer {key}"}
        )
    return model["proof_question"], reply.raise_for_status().json()["choices"][0]["message"]["content"]


def step(number: int) -> None:
    say(f"Step {number + 1} of {len(STEPS)}: {STEPS[number]}")


def say(text: str) -> None:
    minutes, seconds = divmod(int(time.monotonic() - _began), 60)
    print(f"[{minutes}:{seconds:02}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
