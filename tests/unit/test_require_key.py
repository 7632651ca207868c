"""The engine's door: which requests reach it."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmhost.catalogue import ROOT

KEY = "a-key-of-the-host"


@pytest.fixture(scope="module")
def door() -> Any:
    """RequireKey around an application that answers 200, as vLLM's environment would have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        spec = importlib.util.spec_from_file_location("require_key", ROOT / "runtime/require_key.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        async def behind(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

        return module.RequireKey(behind)


def answer(door: Any, path: str, *authorization: bytes, kind: str = "http", method: str = "GET") -> Any:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", value) for value in authorization]
    asyncio.run(door({"type": kind, "path": path, "method": method, "headers": headers}, None, send))
    return sent[0].get("status", sent[0].get("code"))


@pytest.mark.parametrize("path", ["/v1/models", "/invocations", "/metrics", "/tokenize", "/", "/healthz", "/health/"])
def test_every_other_path_wants_the_key(door: Any, path: str) -> None:
    assert answer(door, path) == 401
    assert answer(door, path, method="OPTIONS") == 401
    assert answer(door, path, b"Bearer wrong") == 401
    assert answer(door, path, KEY.encode()) == 401
    assert answer(door, path, b"Bearer " + KEY.encode()) == 200


def test_two_keys_are_none(door: Any) -> None:
    assert answer(door, "/v1/models", b"Bearer wrong", b"Bearer " + KEY.encode()) == 401


@pytest.mark.parametrize("path", ["/health", "/version"])
def test_life_and_version_are_open(door: Any, path: str) -> None:
    assert answer(door, path) == 200


def test_a_websocket_is_closed(door: Any) -> None:
    assert answer(door, "/v1/realtime", kind="websocket") == 1008


@given(
    st.text().filter(lambda p: p not in ("/health", "/version")), st.binary().filter(lambda v: KEY.encode() != v[7:])
)
def test_nothing_passes_without_the_key(door: Any, path: str, value: bytes) -> None:
    assert answer(door, path, value) == 401
