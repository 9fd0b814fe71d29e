"""HTTP that outlasts what a long download meets: rate limits, dropped connections, links that expire.

The client is the one that huggingface_hub brings (proxies, certificates and HF_HUB_OFFLINE are its business). What
it does not do is done here: every read has a timeout, waits are bounded and follow Retry-After, a signed link is
asked for once and renewed when it is refused, and the user's token goes to the hub alone.
"""

import contextlib
import email.utils
import random
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 900.0  # seconds of trying without a byte of progress; the hub's rate limits are of 300 seconds
UNREACHABLE = 30.0  # the same for a server that has not answered yet
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time, with jitter
CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0  # seconds without a byte, then the connection counts as lost

_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_REFUSED = {400, 401, 403, 404, 410}  # what stores answer to a signed link that has expired
_REDIRECTS = {301, 302, 303, 307, 308}


@dataclass(frozen=True)
class WebFile:
    """A file at an address: where it belongs in a folder, bytes, SHA-256 in hex (None: not known)."""

    url: str
    path: str
    size: int
    sha256: str | None


class Again(Exception):
    """A try failed in a way that another may not."""

    def __init__(self, problem: str, after: float | None = None, answered: bool = True) -> None:
        super().__init__(problem)
        self.after = after  # seconds that the server asks to wait
        self.answered = answered  # False: no server was reached


class Stopped(Exception):
    """The caller asked to stop."""


class Patience:
    """How long to go on trying: `PATIENCE` seconds without progress, `unreachable` seconds without any answer."""

    def __init__(self, what: str, stop: threading.Event | None = None, unreachable: float | None = None) -> None:
        self.what = what
        self.stop = stop or threading.Event()
        self.unreachable = PATIENCE if unreachable is None else unreachable
        self.progress()

    def progress(self) -> None:
        """Something arrived: count from here."""
        self.since, self.tries = time.monotonic(), 0

    def check(self) -> None:
        """Raises Stopped if the caller has asked to."""
        if self.stop.is_set():
            raise Stopped

    def wait(self, again: Again) -> None:
        """Sleep before the next try. Raises OSError when that would be longer than patience lasts."""
        self.tries += 1
        total = PATIENCE if again.answered else self.unreachable
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


def get_json(url: str, patience: Patience, form: Mapping[str, Any] | None = None) -> tuple[int, Any, str | None]:
    """(status, parsed JSON or None, the hub's word for an error) of an API call; POST if there is a form.

    Statuses that call for patience are waited out; other refusals are the caller's to word.
    """
    while True:
        try:
            with _transport(url):
                response = _session().request(
                    "GET" if form is None else "POST",
                    url,
                    data=form,
                    headers=_headers(url),
                    timeout=_timeout(),
                    follow_redirects=True,  # the client takes the token off where that leaves the host
                )
            _raise_again(response)
            if response.status_code >= 300:
                problem = response.headers.get("X-Error-Code") or response.headers.get("X-Error-Message")
                return response.status_code, None, problem
            patience.progress()
            try:
                return response.status_code, response.json(), None
            except ValueError:
                raise Again(f"{url} answers with something that is not JSON") from None
        except Again as again:
            patience.wait(again)


class Link:
    """A file's address and the one that it leads to (the hub sends to a store, by a link that is good for hours).

    Threads may share one: the hub is asked once for all of them.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._target: str | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def open(self, first: int = 0, stop: int | None = None, etag: str | None = None) -> Iterator[Any]:
        """The response (status 200, 206 or 416, body unread) for bytes [first, stop), by default the whole file.

        `etag` makes the server send the whole file (200) where it is another one by now. Raises Again or OSError.
        """
        headers = {}
        if first or stop is not None:
            headers["Range"] = f"bytes={first}-{'' if stop is None else stop - 1}"
            if etag is not None:
                headers["If-Range"] = etag
        fresh = False
        for _ in range(10):
            fresh = fresh or self._target is None
            target = self._resolve()
            with _get(target, headers) as response:
                if response.status_code in _REDIRECTS:
                    self._replace(target, str(response.url.join(response.headers.get("Location", ""))))
                elif response.status_code in _REFUSED and not fresh:
                    fresh = True
                    self._replace(target, None)  # the link has expired
                else:
                    _raise_final(response, self.url)
                    yield response
                    return
        raise OSError(f"{self.url}: redirected in a circle")

    def _replace(self, old: str, new: str | None) -> None:
        with self._lock:
            if self._target == old:  # no other thread was faster
                self._target = new

    def _resolve(self) -> str:
        """The address that serves the bytes. Redirects are followed here so that none takes the token along."""
        with self._lock:
            if self._target is not None:
                return self._target
            address = self.url
            for _ in range(10):
                with _get(address, {"Range": "bytes=0-0"}) as response:
                    if response.status_code not in _REDIRECTS:
                        _raise_final(response, self.url)
                        break
                    address = str(response.url.join(response.headers.get("Location", "")))
                if not _same_host(address, self.url):
                    break  # a store: ask it for nothing but the bytes that are wanted
            else:
                raise OSError(f"{self.url}: redirected in a circle")
            self._target = address
            return address


def size_of(url: str) -> int:
    """Bytes of the file at an address. Raises OSError in one line."""
    patience = Patience(url, unreachable=UNREACHABLE)
    while True:
        try:
            with Link(url).open(0, 1) as response:
                size = total_size(response)
            if size is None:
                raise OSError(f"{url}: the server does not say how long the file is")
            return size
        except Again as again:
            patience.wait(again)


def read_range(link: Link, start: int, stop: int, patience: Patience) -> bytes:
    """Bytes [start, stop) of a file, whatever happens on the way. Raises OSError."""
    data = bytearray()
    while len(data) < stop - start:
        try:
            first = start + len(data)
            with link.open(first, stop) as response:
                if response.status_code != 206 or range_start(response) != first:
                    raise OSError(f"{link.url}: the server sends no ranges of a file: download it instead")
                for block in blocks(response, link.url):
                    data += block
                    patience.progress()
                    if len(data) > stop - start:
                        raise OSError(f"{link.url}: the server sends more than it was asked for")
            if len(data) < stop - start:
                raise Again(f"connection closed after {len(data):,} of {stop - start:,} bytes")
        except Again as again:
            patience.wait(again)
    return bytes(data)


def blocks(response: Any, url: str) -> Iterator[bytes]:
    """The body as it comes, some 64 kB at a time. Raises Again where the connection fails."""
    with _transport(url):
        yield from response.iter_raw()  # a size here would hold back, and lose, what came before a break


def range_start(response: Any) -> int | None:
    """The first byte of a 206's range, None if it does not say."""
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def total_size(response: Any) -> int | None:
    """Bytes of the whole file by the headers of a 200 or 206, None if they do not say."""
    if response.status_code == 200:
        found = response.headers.get("Content-Length", "")
    else:
        found = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(found) if found.isdigit() else None


def strong_etag(response: Any) -> str | None:
    """The response's ETag if it stands for these very bytes."""
    etag: str = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else None


def _session() -> Any:
    from huggingface_hub import get_session  # one a process; new in a forked child

    return get_session()


def _timeout() -> Any:
    return _library().Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)


def _library() -> Any:
    """The module of huggingface_hub's client: httpx or, since its 2.x, httpx2, alike in all that is used here."""
    return sys.modules[type(_session()).__mro__[-3].__module__.partition(".")[0]]


def _headers(url: str) -> dict[str, str]:
    """Of a request: with the user's token only if it goes to the hub."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    token = None if _same_host(url, constants.ENDPOINT) else False
    return build_hf_headers(token=token, library_name="gpt2-data") | {"Accept-Encoding": "identity"}


def _same_host(a: str, b: str) -> bool:
    first, second = urlsplit(a), urlsplit(b)
    return (first.scheme, first.netloc) == (second.scheme, second.netloc)


@contextlib.contextmanager
def _get(url: str, headers: dict[str, str]) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        with _transport(url):
            response = stack.enter_context(
                _session().stream(
                    "GET", url, headers=_headers(url) | headers, timeout=_timeout(), follow_redirects=False
                )
            )
        yield response


@contextlib.contextmanager
def _transport(url: str) -> Iterator[None]:
    """A connection that fails becomes Again; an address that cannot be one, OSError. Neither shows a signature."""
    library = _library()
    try:
        yield
    except (library.InvalidURL, library.UnsupportedProtocol) as error:
        raise OSError(f"{url.partition('?')[0]}: no address that can be fetched: {error}") from error
    except (library.TransportError, library.DecodingError) as error:
        host = urlsplit(url).netloc.rpartition("@")[2]
        reached = not isinstance(error, library.ConnectError | library.ConnectTimeout | library.ProxyError)
        if isinstance(error, library.TimeoutException):
            problem = f"no answer from {host} in {READ_TIMEOUT if reached else CONNECT_TIMEOUT:g} seconds"
        elif reached:
            problem = f"the connection to {host} broke: {_line(error)}"
        else:
            problem = f"{host} cannot be reached: {_line(error)}"
        raise Again(problem, answered=reached) from error


def _raise_again(response: Any) -> None:
    if response.status_code in _AGAIN:
        host = urlsplit(str(response.url)).netloc.rpartition("@")[2]
        what = "limits the rate of requests" if response.status_code == 429 else "is out of order"
        raise Again(f"{host} {what} (HTTP {response.status_code})", _retry_after(response.headers))


def _raise_final(response: Any, url: str) -> None:
    """Raises Again or OSError unless the response can be used."""
    _raise_again(response)
    status = response.status_code
    if status in (200, 206, 416):
        return
    code = response.headers.get("X-Error-Code", "")
    if code == "GatedRepo":
        why = f"access is to be asked for on the dataset's page, then {LOGIN}"
    elif status in (401, 403):
        why = f"not allowed: {LOGIN}, with an account that has access"
    elif status in (404, 410):
        why = "no such file"
    else:
        why = "refused"
    raise OSError(f"{url}: {why} (HTTP {status})")


LOGIN = "log in by `hf auth login` or set HF_TOKEN"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, by Retry-After (seconds or a date, RFC 9110) or the hub's `ratelimit: "api";r=0;t=55`."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        with contextlib.suppress(ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    match = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return float(match[1]) + 1 if match else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
