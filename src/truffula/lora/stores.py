"""Reading an adapter's files from HTTP(S), S3, Google Cloud Storage and Azure. Blocks: runs in the loading worker only.

A store tells the state of a file (``stat``), and gives the bytes of exactly that state (``read``). What the libraries
say is not passed on: their messages may contain credentials, signed URLs and names.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol

from truffula.environment import expanded
from truffula.errors import MissingDependency
from truffula.lora.disk_cache import Stamp
from truffula.lora.locations import allows, parse_location
from truffula.types import AdapterRef

if TYPE_CHECKING:
    import httpx

CONNECT_S, STALL_S = 10.0, 30.0
"""How long a source may take to accept a connection, and to send the next bytes."""
MAX_REDIRECTS = 5
TRIES = 3
CHUNK = 8 << 20


class SourceError(Exception):
    """Why a source cannot be read. ``kind``: ``network`` may pass; ``refused`` does not; ``changed`` while it was read.

    ``text`` is a clause that continues a sentence, for clients: it contains nothing of the request.
    """

    def __init__(self, kind: Literal["network", "refused", "changed"], text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text


class Store(Protocol):
    """The folder of one adapter at its source."""

    def stat(self, name: str) -> Stamp | None:
        """The state of a file; None when there is none that may be read. Raises ``SourceError``."""

    def read(self, name: str, stamp: Stamp) -> Iterator[bytes]:
        """The bytes of that state. Raises ``SourceError``: ``changed`` when the file has another one by now."""

    def close(self) -> None: ...


def open_store(ref: AdapterRef) -> Store:
    """The store of a reference to a URL. Raises ``MissingDependency`` where its library is not installed."""
    return HttpStore(ref) if ref.kind == "http" else ObjectStore(ref)


# HTTP


class HttpStore:
    """Files below a URL. A redirect is followed only to what ``ref.root`` allows, which has the same host.

    A client's credential is sent as a bearer token; without one, the operator's for this host from ``~/.netrc``.
    """

    def __init__(self, ref: AdapterRef) -> None:
        import httpx

        self._url, self._root = ref.locator, ref.root or f"{ref.locator}/*"
        headers = {"accept-encoding": "identity"}
        if ref.credential is not None:
            headers["authorization"] = f"Bearer {ref.credential.token}"
        self._client = httpx.Client(
            headers=headers,
            auth=None if ref.credential is not None else _operators_login(),
            timeout=httpx.Timeout(STALL_S, connect=CONNECT_S),
        )

    def stat(self, name: str) -> Stamp | None:
        for method in ("HEAD", "GET"):
            with self._answer(method, name) as answer:
                if method == "HEAD" and answer.status_code in (405, 501):
                    continue  # a server that knows no HEAD
                return None if answer.status_code in (401, 403, 404, 410) else _stamp_of(answer)
        raise AssertionError("a GET is always answered")

    def read(self, name: str, stamp: Stamp) -> Iterator[bytes]:
        import httpx

        done = 0
        for left in reversed(range(TRIES)):
            try:
                with self._answer("GET", name, done) as answer:
                    if answer.status_code in (401, 403, 404, 410, 416):
                        raise SourceError("changed", "")
                    start = done if answer.status_code != 206 else 0  # this server begins again: skip what is there
                    got = _stamp_of(answer, whole=answer.status_code != 206)
                    if got.mark != stamp.mark or (None not in (got.size, stamp.size) and got.size != stamp.size):
                        raise SourceError("changed", "")
                    for chunk in answer.iter_raw(CHUNK):
                        fresh, start = chunk[start:], max(0, start - len(chunk))
                        done += len(fresh)
                        yield fresh
                return
            except httpx.TransportError as error:
                if not left:
                    raise _network(error) from None

    @contextlib.contextmanager
    def _answer(self, method: str, name: str, offset: int = 0) -> Iterator[httpx.Response]:
        import httpx

        url = httpx.URL(f"{self._url}/{name}")
        headers = {"range": f"bytes={offset}-"} if offset else {}
        for _ in range(MAX_REDIRECTS + 1):
            reading = False
            try:
                with self._client.stream(method, url, headers=headers) as answer:
                    if answer.is_redirect:
                        url = self._followed(url, answer.headers.get("location", ""))
                        continue
                    _check_status(answer.status_code)
                    reading = True
                    yield answer
                    return
            except (httpx.TransportError, httpx.InvalidURL, httpx.RemoteProtocolError) as error:
                if reading:
                    raise
                raise _network(error) from None
        raise SourceError("refused", f"it redirects more than {MAX_REDIRECTS} times")

    def _followed(self, url: httpx.URL, location: str) -> httpx.URL:
        """Where a redirect leads. Raises ``SourceError`` unless that is allowed."""
        target = url.join(location)
        try:
            if target.userinfo or not allows(
                self._root, parse_location(str(target.copy_with(query=None, fragment="")))
            ):
                raise ValueError
        except ValueError:
            raise SourceError("refused", "it redirects to a URL that the operator does not allow") from None
        return target

    def close(self) -> None:
        self._client.close()


def _operators_login() -> Any:
    """The logins of ``~/.netrc``, as curl and pip use them; None without the file."""
    import netrc

    import httpx

    try:
        return httpx.NetRCAuth(str(expanded("~/.netrc")))
    except OSError:
        return None
    except netrc.NetrcParseError:
        raise SourceError("refused", "the server's ~/.netrc cannot be parsed") from None


def _check_status(status: int) -> None:
    if status == 429 or status >= 500:
        raise SourceError("network", f"its server answers HTTP {status}; try again later")
    if status not in (200, 206, 401, 403, 404, 405, 410, 416):
        raise SourceError("refused", f"its server answers HTTP {status}")


def _stamp_of(answer: httpx.Response, whole: bool = True) -> Stamp:
    headers = answer.headers
    mark = headers.get("etag") or headers.get("last-modified")
    if mark is None:
        raise SourceError(
            "refused",
            "its server sends neither ETag nor Last-Modified, so it cannot be known whether both files belong together",
        )
    if headers.get("content-encoding", "identity") != "identity":
        raise SourceError("refused", "its server compresses files that were asked for without compression")
    length = headers.get("content-length", "") if whole else headers.get("content-range", "").rpartition("/")[2]
    return Stamp(mark, int(length) if length.isdecimal() else None)


def _network(error: Exception) -> SourceError:
    name = type(error).__name__
    if "Timeout" in name:
        return SourceError("network", "its server does not respond in time")
    if name == "ConnectError":
        return SourceError("network", "its server cannot be reached")
    return SourceError("network", "the connection to its server was lost; try again")


# Object stores


class ObjectStore:
    """Files below a prefix of a bucket, with the credentials and endpoints of the process's environment."""

    def __init__(self, ref: AdapterRef) -> None:
        try:
            import obstore
            from obstore.store import AzureStore, GCSStore, S3Store
        except ImportError:
            raise MissingDependency(
                f"An adapter from {ref.locator.partition(':')[0]}:// needs obstore: pip install 'truffula[cloud]'."
            ) from None
        self._library = obstore
        options: dict[str, Any] = {
            "client_options": {
                "timeout": timedelta(seconds=2 * STALL_S),
                "connect_timeout": timedelta(seconds=CONNECT_S),
                "allow_http": True,  # the operator's endpoint; those of the clouds are https
            },
            "retry_config": {"max_retries": TRIES - 1, "retry_timeout": timedelta(seconds=STALL_S)},
        }
        location = parse_location(ref.locator)
        bucket, prefix = location.origin.partition("://")[2], location.path
        with _explained(obstore):
            if ref.kind == "s3":
                self._store: Any = S3Store(bucket, prefix=prefix, **options)
            elif ref.kind == "gcs":
                self._store = GCSStore(bucket, prefix=prefix, **options)
            else:
                container, _, prefix = prefix.partition("/")
                self._store = AzureStore(container, prefix=prefix, account_name=bucket, **options)

    def stat(self, name: str) -> Stamp | None:
        errors = self._library.exceptions
        with _explained(self._library):
            try:
                return _stamp_of_object(self._library.head(self._store, name))
            except (errors.NotFoundError, FileNotFoundError, errors.PermissionDeniedError, errors.UnauthenticatedError):
                return None

    def read(self, name: str, stamp: Stamp) -> Iterator[bytes]:
        errors, done = self._library.exceptions, 0
        while done < (stamp.size or 0):
            with _explained(self._library):
                try:
                    # In ranges, each with a time limit of its own: a stalled one ends the load.
                    found = self._library.get(self._store, name, options={"range": (done, done + CHUNK)})
                    if _stamp_of_object(found.meta) != stamp:
                        raise SourceError("changed", "")
                    chunk = bytes(found.bytes())
                except (errors.PreconditionError, errors.NotFoundError, FileNotFoundError):
                    raise SourceError("changed", "") from None
            if not chunk:
                raise SourceError("changed", "")
            done += len(chunk)
            yield chunk

    def close(self) -> None:
        """Nothing is held."""


@contextlib.contextmanager
def _explained(library: Any) -> Iterator[None]:
    """Its errors as ``SourceError``, without its text, which quotes requests and answers."""
    try:
        yield
    except library.exceptions.BaseError as error:
        status = re.search(r"\b(?:status|Status:?) \(?([45]\d\d)\b", str(error))
        where = f" (HTTP {status[1]})" if status else f" ({type(error).__name__})"
        text = f"its store cannot be read{where}; are endpoint, region and credentials of the server right?"
        raise SourceError("network", text) from None
    except ValueError as error:
        raise SourceError("refused", f"its store cannot be configured ({type(error).__name__})") from None


def _stamp_of_object(meta: Any) -> Stamp:
    return Stamp(meta["e_tag"] or meta["version"] or meta["last_modified"].isoformat(), meta["size"])
