"""A key for every path of a vLLM server. vLLM's own `--api-key` (0.32) guards /v1, /v2, /inference and /cohere; weight
updates, pause and collective_rpc stay open to whoever reaches the port."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

KEY = "VLLM_API_KEY"  # vLLM's own name, in the environment: a command line is for all to read


class Guard:
    """ASGI middleware, given to vLLM as `--middleware`. Without a key in the environment it lets everything pass."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app
        key = os.environ.get(KEY)
        self.expected = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] in ("http", "websocket") and self.expected is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b"this server needs a key"})
                return
        await self.app(scope, receive, send)
