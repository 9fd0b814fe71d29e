"""HTTP that outlasts what a long download meets: rate limits, dropped connections, links that expire.

The client is huggingface_hub's: proxies, certificates, redirects and HF_HUB_OFFLINE are its business. Its own
`http_get` and `http_backoff` (2.4.0) would sleep for as long as a Retry-After says, be it a day.
"""

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2

T = TypeVar("T")

PATIENCE = 900.0  # seconds of trying without a byte of progress; the hub's rate limits are of 300 seconds
UNREACHABLE = 30.0  # the same for a server that has not answered yet
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time, with jitter
CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0  # seconds without a byte, then the connection counts as lost
LOGIN = "log in by `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class WebFile:
    """A file at an address: `path` is where it belongs in a folder, `sha256` is in hex, or None if not known."""

    url: str
    path: str
    size: int
    sha256: str | None


class Wrong(OSError):
    """What the server sends is not what it should be."""


class Again(Exception):
    """A try failed in a way that another may not; the server asks to wait `after` seconds, or was not reached."""

    def __init__(self, problem: str, after: float | None = None, reached: bool = True) -> None:
        super().__init__(problem)
        self.after, self.reached = after, reached


def insist(what: str, function: Callable[[], T], size: Callable[[], int] = lambda: 0) -> T:
    """Return what the function returns; call it anew while it raises Again and patience lasts.

    Args:
        what: named in errors.
        size: returns what grows with progress, which makes patience last longer.

    Raises:
        OSError: PATIENCE has passed without progress, or would by the wait that the server asks for.
    """
    since, tries, answered, largest = time.monotonic(), 0, False, 0
    while True:
        try:
            return function()
        except Again as again:
            if size() > largest:
                since, tries, largest = time.monotonic(), 0, size()
            tries += 1
            answered |= again.reached
            delay = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
            delay = delay if again.after is None else again.after
            passed = time.monotonic() - since
            if passed + delay > (PATIENCE if answered else UNREACHABLE):
                gave_up = f"gave up at try {tries} after {passed:.0f} seconds"
                raise OSError(f"{what}: {again}; {gave_up}: run the same command again later") from again
        time.sleep(delay)


@contextlib.contextmanager
def get(url: str, start: int, stop: int | None = None) -> Iterator[tuple[Iterator[bytes], int | None]]:
    """Ask for bytes [start, stop) of a file; yield them in blocks, and the size of all of it, None if not said.

    Raises Wrong if the server does not send that range, another OSError in one line, or Again.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    # The user's token goes to the hub alone; the client takes it off where a redirect leaves the host.
    token = None if urlsplit(url)[:2] == urlsplit(constants.ENDPOINT)[:2] else False
    headers = build_hf_headers(token=token, library_name="gpt2-data")
    headers |= {"Range": f"bytes={start}-{'' if stop is None else stop - 1}", "Accept-Encoding": "identity"}
    timeout = httpx2.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    with transport(url), get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        if response.status_code != 416:
            hf_raise_for_status(response)
        if response.status_code == 200:
            first, total = "0", response.headers.get("Content-Length", "*")
        else:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            first, total = span.groups() if span else ("", "*")
        if first != str(start):
            raise Wrong(f"{url}: the server cannot send the file from byte {start:,} on")
        # Not iter_raw(size): it would hold back, and lose, what came before a break.
        yield response.iter_raw(), None if total == "*" else int(total)


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a file. Raises OSError in one line."""

    def read() -> bytes:
        with get(url, start, stop) as (blocks, _):
            data = b"".join(blocks)
        if len(data) != stop - start:
            raise Again(f"the server sent {len(data):,} bytes of {stop - start:,}")
        return data

    return insist(url, read) if stop > start else b""


@contextlib.contextmanager
def transport(what: str) -> Iterator[None]:
    """Turn what the client raises into Again or an OSError of one line, without the signature of a link."""
    from huggingface_hub import errors
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    reasons = {  # the first that fits; the hub does not tell a private dataset from none
        errors.GatedRepoError: f"gated: ask for access on the dataset's page, then {LOGIN}",
        errors.RepositoryNotFoundError: f"no such dataset; if it is private, {LOGIN}",
        errors.RevisionNotFoundError: "no such revision",
    }
    statuses = {401: f"not allowed: {LOGIN}, with an account that has access", 404: "no such file"}
    statuses[403] = statuses[401]
    try:
        yield
    except errors.HfHubHTTPError as error:
        response, status = error.response, error.response.status_code
        if status in (408, 425, 429, 500, 502, 503, 504):
            limit, after = parse_ratelimit_headers(response.headers), response.headers.get("Retry-After", "")
            seconds = float(after) if after.isdecimal() else None
            if limit is not None and limit.remaining == 0:
                seconds = limit.reset_in_seconds + 1.0
            asks = "" if seconds is None else f" and asks to wait {seconds:.0f} seconds"
            raise Again(f"{response.url.netloc.decode()} answers with HTTP {status}{asks}", seconds) from None
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), "")
        raise OSError(f"{what}: {reason or statuses.get(status, 'refused')} (HTTP {status})") from None
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.TooManyRedirects) as error:
        raise OSError(f"{what}: this address cannot be downloaded: {error}") from error
    except httpx2.RequestError as error:
        reached = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError)
        problem = "the connection broke" if reached else "cannot be reached"
        why = " ".join(str(error).split()) or type(error).__name__
        raise Again(f"{error.request.url.netloc.decode()}: {problem}: {why}", reached=reached) from error
