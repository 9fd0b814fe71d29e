"""HTTP that outlasts what a long download meets: rate limits, dropped connections, links that expire.

The client is huggingface_hub's: proxies, certificates, redirects and HF_HUB_OFFLINE are its business. What its own
downloads lack is here: huggingface_hub 2.4.0 loses up to 10 MB at each break, gives up after five tries, waits for
a rate limit without an end or a way to stop it, and asks the hub for a new link at each read of a range.
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
UNREACHABLE = 30.0  # the same for a server that has not answered yet
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time, with jitter
CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0  # seconds without a byte, then the connection counts as lost
LOGIN = "log in by `hf auth login` or set HF_TOKEN"

_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_EXPIRED = {400, 401, 403, 404, 410}  # what stores answer to a signed link that has expired


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
    """Bounds how long to try: PATIENCE seconds without progress, `unreachable` seconds without any answer."""

    def __init__(self, what: str, stop: threading.Event | None = None, unreachable: float | None = None) -> None:
        self.what = what
        self.stop = stop or threading.Event()
        self.unreachable = PATIENCE if unreachable is None else unreachable
        self.progress()

    def progress(self) -> None:
        """Count from here, since something arrived."""
        self.since, self.tries = time.monotonic(), 0

    def check(self) -> None:
        """Raise Stopped if the caller has asked to stop."""
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
        total = PATIENCE if again.reached else self.unreachable
        delay = again.after
        if delay is None:
            delay = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (self.tries - 1)) * random.uniform(0.5, 1.0)
        passed = time.monotonic() - self.since
        if passed + delay > total:
            asked = f", and asks to wait {again.after:.0f} seconds" if again.after else ""
            tries = f"{self.tries} tries in {passed:.0f} seconds" if self.tries > 1 else "one try"
            raise OSError(f"{self.what}: {again}{asked}; gave up after {tries}: run the same command again later")
        if self.stop.wait(delay):
            raise Stopped


class Link:
    """A file's address, and the one it leads to: the hub sends to a store, by a link that is good for hours.

    The hub, which limits the rate of such questions, is asked once, and again when the store refuses the link.
    Threads may share one.
    """

    def __init__(self, url: str) -> None:
        self.url = self._target = url

    @contextlib.contextmanager
    def open(self, first: int = 0, stop: int | None = None, etag: str | None = None) -> Iterator[httpx2.Response]:
        """Ask for bytes [first, stop), by default the whole file; status 200, 206 or 416, body unread.

        `etag` makes the server send the whole file (200) if it is another one by now. Raises Again or OSError.
        """
        headers = {}
        if first or stop is not None:
            headers["Range"] = f"bytes={first}-{'' if stop is None else stop - 1}"
            if etag is not None:
                headers["If-Range"] = etag
        with contextlib.ExitStack() as stack:
            target = self._target
            response = stack.enter_context(_get(target, headers))
            if target != self.url and response.status_code in _EXPIRED:
                response = stack.enter_context(_get(self.url, headers))
            _check(response, self.url)
            self._target = str(response.url)
            yield response


def size_of(url: str) -> int:
    """Return the bytes of the file at an address. Raises OSError in one line."""

    def ask() -> int | None:
        with Link(url).open(0, 1) as response:
            return span(response)[1]

    size = Patience(url, unreachable=UNREACHABLE).call(ask)
    if size is None:
        raise OSError(f"{url}: the server does not say how long the file is")
    return size


def read_range(link: Link, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a file, over as many connections as it takes. Raises OSError."""
    data = bytearray()
    patience = Patience(link.url)

    def read_on() -> None:
        first = start + len(data)
        with link.open(first, stop) as response:
            if response.status_code != 206 or span(response)[0] != first:
                raise OSError(f"{link.url}: the server sends no ranges of a file: download it instead")
            for block in blocks(response):
                data.extend(block)
                patience.progress()
        if len(data) > stop - start:
            raise OSError(f"{link.url}: the server sends more than it was asked for")
        if len(data) < stop - start:
            raise Again(f"connection closed after {len(data):,} of {stop - start:,} bytes")

    patience.call(read_on)
    return bytes(data)


def blocks(response: httpx2.Response) -> Iterator[bytes]:
    """Yield the body as it comes, some 64 kB at a time. Raises Again if the connection fails."""
    with transport(str(response.url)):
        yield from response.iter_raw()  # a size here would hold back, and lose, what came before a break


def span(response: httpx2.Response) -> tuple[int | None, int | None]:
    """Return the first byte that is sent and the bytes of the whole file, by the headers; None if not said."""
    if response.status_code == 200:
        size = response.headers.get("Content-Length", "")
        return 0, int(size) if size.isdigit() else None
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None:
        return None, None
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] != "*" else None


@contextlib.contextmanager
def transport(url: str) -> Iterator[None]:
    """Turn a connection that fails into Again, a false address into OSError; neither shows a signature."""
    plain = url.partition("?")[0]
    try:
        yield
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise OSError(f"{plain}: no address that can be fetched: {error}") from error
    except httpx2.TooManyRedirects as error:
        raise OSError(f"{plain}: redirected in a circle") from error
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        host = _host(url)
        reached = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError)
        why = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, httpx2.TimeoutException):
            problem = f"no answer from {host} in {READ_TIMEOUT if reached else CONNECT_TIMEOUT:g} seconds"
        else:
            problem = f"the connection to {host} broke: {why}" if reached else f"{host} cannot be reached: {why}"
        raise Again(problem, reached=reached) from error


def raise_again(response: httpx2.Response) -> None:
    """Raise Again if the status says that a later try may do better."""
    if response.status_code in _AGAIN:
        what = "limits the rate of requests" if response.status_code == 429 else "is out of order"
        problem = f"{_host(str(response.url))} {what} (HTTP {response.status_code})"
        raise Again(problem, _retry_after(response.headers))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, by Retry-After (seconds or a date, RFC 9110) or by the hub's header."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        with contextlib.suppress(ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    limit = parse_ratelimit_headers(headers)
    return limit.reset_in_seconds + 1 if limit is not None and limit.remaining == 0 else None


@contextlib.contextmanager
def _get(url: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    # The user's token goes to the hub alone; the client takes it off where a redirect leaves the host.
    token = None if urlsplit(url)[:2] == urlsplit(constants.ENDPOINT)[:2] else False
    own: dict[str, Any] = build_hf_headers(token=token, library_name="gpt2-data")
    own |= headers | {"Accept-Encoding": "identity"}
    timeout = httpx2.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    with contextlib.ExitStack() as stack:
        with transport(url):
            response = stack.enter_context(
                get_session().stream("GET", url, headers=own, timeout=timeout, follow_redirects=True)
            )
        yield response


def _check(response: httpx2.Response, url: str) -> None:
    """Raise Again or OSError unless the response can be used."""
    raise_again(response)
    status = response.status_code
    if status in (200, 206, 416):
        return
    why = "no such file" if status in (404, 410) else "refused"
    if response.headers.get("X-Error-Code") == "GatedRepo":
        why = f"access is to be asked for on the dataset's page, then {LOGIN}"
    elif status in (401, 403):
        why = f"not allowed: {LOGIN}, with an account that has access"
    raise OSError(f"{url}: {why} (HTTP {status})")


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]
