"""HTTP to one vLLM server: who may be asked, what is asked again, and how long to wait.

A request is waited for as long as the server makes progress, however many stand before it in the queue. What passes by
itself (a reset connection, "busy") is asked again a few times; the rest is an EngineFailure, or a TrainingStopped when
the server refuses what it was asked.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests

from cipo_fast.errors import EngineFailure, TrainingStopped

Item = TypeVar("Item")
Result = TypeVar("Result")

CONNECT_TIMEOUT_S = 10.0
CONTROL_TIMEOUT_S = 60.0  # of the small calls: pause, resume, reset
RETRY_AFTER_S = (0.5, 1.0, 2.0)
PASSES = (408, 429, 503)  # HTTP's own words for "later"
PROGRESS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")


@dataclass(frozen=True)
class Address:
    """What every rank must know of a server."""

    url: str
    name: str  # the model name that it must give
    key: str | None = field(repr=False)  # sent as a bearer token
    started: bool  # by this run: then nothing stands between, and no proxy is asked


class Connection:
    """`check` raises EngineFailure when the server is known to be gone; `timeout_s` is the longest wait without
    progress."""

    def __init__(self, address: Address, timeout_s: float, check: Callable[[], None]):
        self.url = address.url
        self.timeout_s = timeout_s
        self.check = check
        self.session = requests.Session()
        self.session.trust_env = not (address.started or is_loopback(address.url))
        if address.key is not None:
            self.session.auth = _Bearer(address.key)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=256))

    def post(self, path: str, body: Any = None, read_timeout_s: float | None = CONTROL_TIMEOUT_S) -> Any:
        return self._json(self.request("POST", path, body, read_timeout_s), path)

    def get(self, path: str) -> Any:
        return self._json(self.request("GET", path), path)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        read_timeout_s: float | None = CONTROL_TIMEOUT_S,
        retry_after_s: tuple[float, ...] = RETRY_AFTER_S,
    ) -> requests.Response:
        """Raises EngineFailure, or TrainingStopped for what would be refused again."""
        for pause_s in (*retry_after_s, None):
            self.check()
            try:
                answer = self.session.request(
                    method, f"{self.url}/{path}", json=body, timeout=(CONNECT_TIMEOUT_S, read_timeout_s)
                )
            except requests.RequestException as error:
                failure = EngineFailure(f"{self.url}/{path}: {_reason(error)}")
                passes = isinstance(error, requests.ConnectionError) and not isinstance(error, requests.Timeout)
            else:
                if answer.status_code == 200:
                    return answer
                text = f"{self.url}/{path}: HTTP {answer.status_code}: {' '.join(answer.text[:300].split())}"
                passes = answer.status_code in PASSES
                if 300 <= answer.status_code < 500 and not passes:
                    raise TrainingStopped(text)
                failure = EngineFailure(text)
            if pause_s is None or not passes:
                raise failure
            time.sleep(pause_s)
        raise AssertionError("the last round raises or returns")

    def for_all(self, ask: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> list[Result]:
        """`ask` of each, `at_once` at a time. EngineFailure when the server makes no progress for `timeout_s`."""
        pool = ThreadPoolExecutor(at_once)
        try:
            futures = [pool.submit(ask, item) for item in items]
            look_s = min(5.0, self.timeout_s / 4)
            seen, moved = None, time.monotonic()
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, look_s, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if not waiting:
                    break
                self.check()
                now = (len(waiting), self._tokens(look_s))
                if now != seen:
                    seen, moved = now, time.monotonic()
                elif time.monotonic() - moved > self.timeout_s:
                    raise EngineFailure(f"{self.url}: no answer in time: not a token for {self.timeout_s:g} s")
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a thread that waits for a wedged server ends with it

    def metrics(self, names: Iterable[str], read_timeout_s: float = CONTROL_TIMEOUT_S) -> dict[str, float] | None:
        """Sums over all engines of the server; None when it does not say."""
        try:
            text = self.request("GET", "metrics", None, read_timeout_s, ()).text
            found = dict.fromkeys(names, 0.0)
            for line in text.splitlines():
                name = line.partition("{")[0].partition(" ")[0]
                if name in found:
                    found[name] += float(line.rsplit(" ", 1)[1])
        except (EngineFailure, TrainingStopped, ValueError, IndexError):
            return None
        return found

    def close(self) -> None:
        self.session.close()

    def _tokens(self, read_timeout_s: float) -> float | None:
        found = self.metrics(PROGRESS, read_timeout_s)
        return None if found is None else sum(found.values())

    def _json(self, answer: requests.Response, path: str) -> Any:
        try:
            return answer.json()
        except ValueError:
            raise EngineFailure(f"{self.url}/{path}: the answer is not JSON: {answer.text[:80]!r}") from None


class _Bearer(requests.auth.AuthBase):
    """As `auth`, or requests would prefer what ~/.netrc says of the host."""

    def __init__(self, key: str):
        self.key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.key}"
        return request


def is_loopback(url_or_host: str) -> bool:
    host = (urlsplit(url_or_host).hostname or "") if "//" in url_or_host else url_or_host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _reason(error: Exception) -> str:
    """The innermost cause: what requests and urllib3 wrap around it says little."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy of the environment (http_proxy) does not reach it; name the host in no_proxy"
    if isinstance(error, requests.ConnectionError):
        return "no connection, or it broke off"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
