"""HTTP that outlasts what a long download meets: rate limits, dropped connections, links that expire.

The client is huggingface_hub's: proxies, certificates, redirects and HF_HUB_OFFLINE are its business. What its own
downloads lack is here: huggingface_hub 2.4.0 loses up to 10 MB at each break, gives up after five tries, and waits
for a rate limit without an end or a way to stop it.
"""

import contextlib
import email.utils
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

T = TypeVar("T")

PATIENCE = 900.0  # seconds of trying without a byte of progress; the hub's rate limits are of 300 seconds
UNREACHABLE = 30.0  # the same, where a person waits, for a server that has not answered yet
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time, with jitter
CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0  # seconds without a byte, then the connection counts as lost
LOGIN = "log in by `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class WebFile:
    """A file at an address.

    Attributes:
        path: where it belongs in a folder.
        size: bytes.
        sha256: in hex; None if it is not known.
    """

    url: str
    path: str
    size: int
    sha256: str | None


class Again(Exception):
    """A try failed in a way that another may not; the server asks to wait `after` seconds, or was not reached."""

    def __init__(self, problem: str, after: float | None = None, reached: bool = True) -> None:
        super().__init__(problem)
        self.after, self.reached = after, reached


class Stopped(Exception):
    """The caller asked to stop."""


class Patience:
    """Tries again, for PATIENCE seconds without progress.

    Args:
        what: named in errors.
        stop: set by another thread to stop. Without it a person waits, and an unreachable server gets UNREACHABLE.
    """

    def __init__(self, what: str, stop: threading.Event | None = None) -> None:
        self.what = what
        self.unreachable = UNREACHABLE if stop is None else PATIENCE
        self.stop = stop or threading.Event()
        self.progress()

    def progress(self) -> None:
        """Count from here, since something arrived. Raises Stopped if the caller has asked to stop."""
        self.since, self.tries = time.monotonic(), 0
        if self.stop.is_set():
            raise Stopped

    def call(self, function: Callable[[], T]) -> T:
        """Return what the function returns; call it anew while it raises Again and patience lasts."""
        while True:
            try:
                return function()
            except Again as again:
                self.wait(again)

    def wait(self, again: Again) -> None:
        """Sleep before the next try. Raises OSError if that would be longer than patience lasts."""
        self.tries += 1
        delay = again.after
        if delay is None:
            delay = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (self.tries - 1)) * random.uniform(0.5, 1.0)
        passed = time.monotonic() - self.since
        if passed + delay > (PATIENCE if again.reached else self.unreachable):
            asked = f", and asks to wait {again.after:.0f} seconds" if again.after else ""
            tries = f"{self.tries} tries in {passed:.0f} seconds" if self.tries > 1 else "one try"
            raise OSError(f"{self.what}: {again}{asked}; gave up after {tries}: run the same command again later")
        if self.stop.wait(delay):
            raise Stopped


@contextlib.contextmanager
def get(url: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx2.Response]:
    """Ask for a file, or by `headers` for a range of it: status 200, 206 or 416, body unread.

    Raises Again, also in the block if the connection breaks there, or OSError in one line.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    # The user's token goes to the hub alone; the client takes it off where a redirect leaves the host.
    token = None if urlsplit(url)[:2] == urlsplit(constants.ENDPOINT)[:2] else False
    own: dict[str, Any] = build_hf_headers(token=token, library_name="gpt2-data")
    own |= {**(headers or {}), "Accept-Encoding": "identity"}
    timeout = httpx2.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    with (
        transport(url),
        get_session().stream("GET", url, headers=own, timeout=timeout, follow_redirects=True) as response,
    ):
        if response.status_code not in (200, 206, 416):
            raise refusal(response, url)
        yield response


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a file. Raises OSError in one line."""

    def read() -> bytes:
        with get(url, {"Range": f"bytes={start}-{stop - 1}"}) as response:
            if response.status_code != 206:
                raise OSError(f"{url}: the server cannot send parts of a file: download it instead")
            data = b"".join(response.iter_raw())
        if len(data) != stop - start:
            raise Again(f"the server sent {len(data):,} bytes of {stop - start:,}")
        return data

    return Patience(url).call(read) if stop > start else b""


def span(response: httpx2.Response) -> tuple[int | None, int | None]:
    """Return the first byte that is sent and the bytes of the whole file, by the headers; None if not said."""
    if response.status_code == 200:
        size = response.headers.get("Content-Length", "")
        return 0, int(size) if size.isdigit() else None
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    first, total = match.groups() if match else (None, None)
    return int(first) if first else None, int(total) if total and total != "*" else None


@contextlib.contextmanager
def transport(url: str) -> Iterator[None]:
    """Turn a connection that fails into Again, a false address into OSError; neither shows a signature."""
    try:
        yield
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.TooManyRedirects) as error:
        raise OSError(f"{url}: this address cannot be downloaded: {error}") from error
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        host = error.request.url.netloc.decode()
        reached = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError)
        why = " ".join(str(error).split()) or type(error).__name__
        problem = f"the connection to {host} broke: {why}" if reached else f"{host} cannot be reached: {why}"
        raise Again(problem, reached=reached) from error


def refusal(response: httpx2.Response, what: str) -> Again | OSError:
    """Return Again if a later try may do better than this response, else an error of one line."""
    status = response.status_code
    if status in (408, 425, 429, 500, 502, 503, 504):
        why = "limits the rate of requests" if status == 429 else "is out of order"
        host = response.url.netloc.decode()
        return Again(f"{host} {why} (HTTP {status})", _retry_after(response.headers))
    why = "no such file" if status in (404, 410) else "refused"
    if response.headers.get("X-Error-Code") == "GatedRepo":
        why = f"gated: ask for access on the dataset's page, then {LOGIN}"
    elif status in (401, 403):
        why = f"not allowed: {LOGIN}, with an account that has access"
    return OSError(f"{what}: {why} (HTTP {status})")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait, by Retry-After (seconds or a date, RFC 9110) or by the hub's header."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    limit = parse_ratelimit_headers(headers)
    return limit.reset_in_seconds + 1 if limit is not None and limit.remaining == 0 else None
