"""Requests in text: tokenise, submit, detokenise, stop strings, ``n`` and ``best_of``.

Used by ``llm.py`` and ``server/``. ``Service`` is the core: a pure state machine per request (``open`` gives a
``RequestState``, ``push(TokenEvent)`` its ``TextDelta``s). ``SyncService`` drives it in the caller's thread,
``AsyncService`` from an event loop.
"""

from truffula.service.aio import AsyncService, TextStream
from truffula.service.choices import collect
from truffula.service.core import RequestState, Service, ServiceLimits
from truffula.service.sync import SyncService

__all__ = ["AsyncService", "RequestState", "Service", "ServiceLimits", "SyncService", "TextStream", "collect"]
