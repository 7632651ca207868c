"""One chat as the page holds it, for the Python of Open WebUI's own venv: python page_chat.py URL TOKEN MODEL QUESTION.

The page opens a socket, posts the question with the socket's id, and reads the reply from the socket's events.
Prints the pieces of the reply as a JSON list.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

# Both are in Open WebUI's environment, in which this program runs, not in ours.
import aiohttp  # type: ignore[import-not-found]  # not in our environment
import socketio  # type: ignore[import-not-found]  # the same

EVERY_TASK = {"title_generation": True, "tags_generation": True, "follow_up_generation": True}


async def chat(url: str, token: str, model: str, question: str) -> list[str]:
    """The pieces of the reply, in order."""
    pieces: list[str] = []
    idle = asyncio.Event()
    page = socketio.AsyncClient()

    async def receive(event: dict[str, Any]) -> None:
        kind, data = event["data"]["type"], event["data"]["data"]
        if kind == "response:completion" and data["type"] == "response.output_text.delta":
            pieces.append(data["delta"])
        if kind == "chat:active" and not data["active"]:  # the reply and all that follows it are done
            idle.set()

    page.on("events", receive)
    origin = {"Origin": "http://localhost:7860"}
    await page.connect(
        url, headers=origin, auth={"token": token}, socketio_path="/ws/socket.io", transports=["websocket"]
    )
    session = page.get_sid()
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": question}]}
    body |= {"session_id": session, "chat_id": f"local:{session}", "id": "reply", "background_tasks": EVERY_TASK}
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/api/chat/completions", json=body, headers=headers) as r,
    ):
        r.raise_for_status()
    await asyncio.wait_for(idle.wait(), timeout=30)
    await page.disconnect()
    return pieces


if __name__ == "__main__":
    print(json.dumps(asyncio.run(chat(*sys.argv[1:]))))
