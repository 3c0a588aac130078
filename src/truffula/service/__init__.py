"""Requests in text: tokenise, submit, detokenise, stop strings, ``n`` and ``best_of``.

Used by ``llm.py`` and ``server/``. ``core.Service`` is a pure state machine per request (``open`` gives a
``RequestState``, ``push(TokenEvent)`` its ``TextDelta``s). ``sync.SyncService`` drives it in the caller's thread,
``aio.AsyncService`` from an event loop.
"""
