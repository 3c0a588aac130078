"""Requests in text: tokenise, submit, detokenise, stop strings, ``n`` and ``best_of``. Used by ``llm.py`` and
``server/``.

``Service`` is the core: a pure state machine per request (``open`` → ``RequestState``, ``push(TokenEvent) →
[TextDelta]``). ``SyncService`` drives it in the caller's thread, ``AsyncService`` from an event loop.
"""

from truffula.service.aio import AsyncService, TextStream
from truffula.service.core import Service, ServiceLimits
from truffula.service.fold import collect

__all__ = ["AsyncService", "Service", "ServiceLimits", "TextStream", "collect"]
