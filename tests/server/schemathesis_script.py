"""Random requests made from a server's OpenAPI document: ``python schemathesis_script.py URL [EXAMPLES [SEED]]``.

For ``test_openapi_slow``, in the environment of schemathesis. Both valid and invalid requests are sent. Prints a JSON
object: how many answers had each status, and the answers that are wrong, each with its request.
"""

import json
import sys
import urllib.request
from collections import Counter

import hypothesis
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis.generation import GenerationMode

# What pauses or empties the server, and what ends only with its client.
SKIPPED = {"/pause", "/resume"}


def wrong_shape(response):
    """What is wrong with an error: each dialect's shape has the status, a code, a message and the parameter."""
    path = response.request.path_url.split("?")[0]
    if response.request.method == "HEAD":
        return None
    if response.headers.get("content-type") != ["application/json"]:
        return f"content-type {response.headers.get('content-type')}"
    body = response.json()
    if path.startswith("/v1/messages"):
        error = body.get("error", {})
        told = body.get("type") == "error" and {"type", "message"} <= set(error) and body.get("request_id")
    elif path == "/v1" or path.startswith("/v1/"):
        error = body.get("error", {})
        told = set(error) == {"message", "type", "param", "code"} and error["code"]
        if error.get("code") == "invalid_request" and not error["param"]:
            return "no parameter"
    elif "success" in body:
        return None if body["success"] is False and body["error_message"] else "no message"
    else:
        told = body.get("error") and body.get("error_type")
        error = {"message": body.get("error")}
    return None if told and error["message"] else "not the dialect's shape"


def complaint(response):
    if response.status_code >= 500:
        return "5xx"
    if len(response.content) > 20_000 and response.status_code >= 400:
        return "a long error"
    if not response.headers.get("x-request-id"):
        return "no x-request-id"
    return wrong_shape(response) if response.status_code >= 400 else None


def document(url):
    """The server's document. Objects get no properties that it does not name: each would be refused or ignored."""
    with urllib.request.urlopen(f"{url}/api-doc/openapi.json") as reply:
        found = json.load(reply)
    for schema in found["components"]["schemas"].values():
        schema["additionalProperties"] = False
    return found


def main(url, examples=40, start=1):
    schema = schemathesis.openapi.from_dict(document(url))
    schema.config.update(base_url=url)
    statuses, found = Counter(), []

    def explore(operation, mode):
        @seed(start)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case):
            response = case.call(timeout=60)
            statuses[f"{operation.method.upper()} {operation.path} {response.status_code}"] += 1
            if reason := complaint(response):
                sent = response.request.body or b""
                sent = sent if isinstance(sent, str) else sent.decode("utf-8", "replace")
                found.append(
                    {
                        "reason": reason,
                        "request": f"{operation.method.upper()} {response.request.url} {sent[:1500]}",
                        "answer": f"{response.status_code} {response.text[:600]}",
                    }
                )

        send()

    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in SKIPPED:
            continue
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try:
                explore(operation, mode)
            except hypothesis.errors.Unsatisfiable:  # nothing about it can be wrong
                continue
    print(json.dumps({"statuses": statuses, "wrong": found[:40], "count": len(found)}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
