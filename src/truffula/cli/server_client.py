"""A client of a running server, for ``adapters``, and for ``chat`` and ``generate`` with ``--url``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from truffula.environment import expanded
from truffula.errors import ConfigError, ErrorInfo, TruffulaError
from truffula.settings import load_setting

if TYPE_CHECKING:
    import httpx

CONNECT_S, ANSWER_S = 10.0, 600.0


class ServerClient:
    """Sends JSON to a running server. A context manager.

    Args:
        url: Its address; a missing ``http://`` is added, and OpenAI's ``/v1`` at the end is dropped. None: this
            machine.
        port: The port on this machine; None: the one that ``serve`` would use.
        api_key: None: the first of ``TRUFFULA_API_KEYS``.

    Raises:
        ConfigError: Both ``url`` and ``port`` are given, or the address is not a URL. Every method also raises it when
            no server responds, and else ``TruffulaError`` with the code and the message of the server's error.
    """

    def __init__(self, url: str | None, port: int | None, api_key: str | None = None) -> None:
        import httpx

        if url is not None and port is not None:
            raise ConfigError(f"--url is {url!r} and --port is {port}; give one of them.", param="url")
        address = f"127.0.0.1:{load_setting('port', port).value}" if url is None else url
        address = address if "://" in address else f"http://{address}"
        self.url = address.rstrip("/").removesuffix("/v1")
        keys = load_setting("api_keys").value if api_key is None else (api_key,)
        self._has_key = bool(keys)
        headers = {b"authorization": f"Bearer {keys[0]}".encode()} if keys else {}
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        secure = self.url.lower().startswith("https:")  # else reading the certificates would only take time
        with self._named_errors():
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, verify=secure)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON response of ``path``."""
        answer = self._answer(method, path, body)
        try:
            return answer.json()
        except ValueError as error:
            raise self.not_truffula(path) from error

    def text(self, path: str) -> str:
        """The text response of ``path``."""
        return self._answer("GET", path, None).text

    def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        with self._named_errors():
            answer = self._http.request(method, path, json=body)
        if answer.status_code >= 400:
            raise self._error(answer)
        return answer

    def models(self) -> list[dict[str, Any]]:
        """The list of ``/v1/models``: the base model, and the adapters, which have a ``parent``."""
        found = self.call("GET", "/v1/models")
        rows = found.get("data") if isinstance(found, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
            raise self.not_truffula("/v1/models")
        return rows

    def load_adapter(self, name: str, source: str) -> Any:
        """Load an adapter from the server's disk as ``name``."""
        return self.administer("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": server_path(source)})

    def unload_adapter(self, name: str) -> Any:
        """Unload an adapter and remove its name."""
        return self.administer("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def administer(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """As ``call``, on a route of ``--adapter-admin``."""
        try:
            return self.call(method, path, body)
        except TruffulaError as error:
            if error.code not in ("not_found", "method_not_allowed"):
                raise
            message = (
                f"The server at {self.url} runs without --adapter-admin; start it with that option to load and unload "
                "adapters while it runs."
            )
            raise TruffulaError.from_info(ErrorInfo(code=error.code, message=message)) from error

    def not_truffula(self, path: str) -> ConfigError:
        """The error for a response that is not a truffula server's."""
        return ConfigError(f"The answer of {self.url}{path} is not a truffula server's: check --url.", param="url")

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed response. Closing the iterator aborts it on the server."""
        with self._named_errors(), self._http.stream("POST", path, json={**body, "stream": True}) as answer:
            if answer.status_code >= 400:
                answer.read()
                raise self._error(answer)
            for data in _event_data(answer.iter_bytes()):
                if data == "[DONE]":
                    return
                try:
                    frame = json.loads(data)
                except ValueError as error:
                    raise self.not_truffula(path) from error
                if "error" in frame:
                    raise _parse_error(frame, answer.status_code, data)
                yield frame
        raise TruffulaError(f"The server at {self.url} ended its answer early.")

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.ConnectError as error:
            raise ConfigError(
                f"No server answers at {self.url} ({error}). Start one with 'truffula serve MODEL', or name another "
                "with --url.",
                param="url",
            ) from error
        except httpx.InvalidURL as error:
            raise ConfigError(f"--url is {self.url!r}, which is not a URL: {error}.", param="url") from error
        except httpx.HTTPError as error:
            raise ConfigError(
                f"The server at {self.url} did not respond ({type(error).__name__}: {error}).", param="url"
            ) from error

    def _error(self, answer: httpx.Response) -> TruffulaError:
        """The error of a response; an error about API keys names the options that set a key."""
        try:
            body = answer.json()
        except ValueError:
            body = None
        error = _parse_error(body, answer.status_code, answer.text)
        if answer.status_code == 401:
            what = "rejects this API key" if self._has_key else "requires an API key"
            message = f"The server at {self.url} {what}: pass a valid one with --api-key, or set TRUFFULA_API_KEYS."
            return TruffulaError.from_info(ErrorInfo(code=error.code, message=message, param="api_key"))
        return error


def adapter_path(name: str) -> str:
    """The path of an adapter's routes."""
    return f"/v1/adapters/{quote(name)}"


def alias_path(name: str) -> str:
    return f"/v1/adapter_aliases/{quote(name)}"


def server_path(source: str) -> str:
    """A source on the server's machine; a path that exists on this one is made absolute."""
    path = expanded(source)
    return str(path.resolve()) if path.exists() else source


def weights_of(targets: list[str]) -> dict[str, float]:
    """The weights of ``TARGET=WEIGHT``. Raises ``ConfigError``."""
    found: dict[str, float] = {}
    for one in targets:
        name, _, weight = one.rpartition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(f"{one!r} is not TARGET=WEIGHT, such as support@7=90.", param="targets")
    return found


def _event_data(chunks: Iterator[bytes]) -> Iterator[str]:
    """The data of server-sent events. Only a line feed ends a line: text may contain other separators unescaped."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").decode().strip()


def _parse_error(body: Any, status: int, text: str) -> TruffulaError:
    """The error in a response, in the format of OpenAI, of LoRAX and TGI, or of FastAPI."""
    fields = body if isinstance(body, dict) else {}
    found = fields.get("error", fields)
    if isinstance(found, str):
        found = {"message": found, "code": fields.get("error_type")}
    elif not isinstance(found, dict):
        found = {}
    message = found.get("message", found.get("detail", f"The server answered {status}: {text[:300]}"))
    code, param = found.get("code"), found.get("param")
    return TruffulaError.from_info(
        ErrorInfo(
            code=code if isinstance(code, str) else f"http_{status}",
            message=str(message),
            param=param if isinstance(param, str) else None,
        )
    )
