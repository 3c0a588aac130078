"""A client of a server that others send large bodies to: ``python bystander.py PORT``. For ``test_large_bodies_slow``.

It streams tokens and asks for ``/health``. For each line on its input it writes one: the longest waits since the last
line, in seconds, as JSON. ``machine`` is how much too late its own short sleeps ended: what other programs of this
machine did to it.
"""

import contextlib
import http.client
import json
import sys
import threading
import time

# Every token is the same visible character: tokens without text would make gaps that no other request has caused.
BODY = {"prompt": "Once", "max_tokens": 3500, "stream": True, "ignore_eos": True, "logit_bias": {"10": 100}}
TICK_S = 0.005
longest = {"gap": 0.0, "health": 0.0, "machine": 0.0}


def note(name, seconds):
    longest[name] = max(longest[name], seconds)


def connected(port):
    return contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120))


def stream(port):
    while True:
        with connected(port) as connection:
            connection.request("POST", "/v1/completions", json.dumps(BODY), {"content-type": "application/json"})
            response = connection.getresponse()
            last = None
            while line := response.readline():
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    note("gap", now - (last or now))
                    last = now


def ask(port):
    while True:
        began = time.monotonic()
        with connected(port) as connection:
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
        note("health", time.monotonic() - began)
        time.sleep(0.01)


def tick():
    while True:
        began = time.monotonic()
        time.sleep(TICK_S)
        note("machine", time.monotonic() - began - TICK_S)


if __name__ == "__main__":
    for work, *arguments in ((stream, int(sys.argv[1])), (ask, int(sys.argv[1])), (tick,)):
        threading.Thread(target=work, args=arguments, daemon=True).start()
    for _ in sys.stdin:
        print(json.dumps(longest), flush=True)
        longest.update(dict.fromkeys(longest, 0.0))
