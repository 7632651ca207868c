# llmhost: runtime/require_key.py - written by pyinfra, changes here are overwritten.
"""The key on every path of the engine, not only on /v1.

vLLM asks for its key below /v1, /v2, /inference, /cohere only (0.32.0, entrypoints/serve/middleware/authenticate.py);
/invocations serves full inference, and /metrics, /load, /tokenize tell about it, without. vllm.yaml names this class.
"""

import os
import secrets

# A load balancer may ask whether the engine lives, and which version it is.
OPEN = ("/health", "/version")
REFUSAL = b'{"error": "Unauthorized"}'


class RequireKey:
    """ASGI middleware: 401 for any request without the key in its Authorization header."""

    def __init__(self, app):
        self.app = app
        self.expected = b"Bearer " + os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or self.allows(scope):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        return await send({"type": "http.response.body", "body": REFUSAL})

    def allows(self, scope):
        if scope["type"] == "http" and scope["path"] in OPEN:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self.expected)
