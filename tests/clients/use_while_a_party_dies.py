"""What clients make of an evaluator that is killed while it works on three answers: none hangs, streams raise, and the
openai package tries again only what nobody saw."""

import os
import signal
import threading
import time
import urllib.request

import httpx
import ollama
import openai
from endpoint import MODEL, PROMPT, TOKEN, URL, raises

asked = []
http = httpx.Client(event_hooks={"response": [lambda r: asked.append((r.status_code, r.headers.get("x-should-retry")))]})
client = openai.OpenAI(base_url=URL + "/v1", api_key=TOKEN, max_retries=2, http_client=http)
other = ollama.Client(host=URL, headers={"Authorization": f"Bearer {TOKEN}"})


def ask(tokens, **more):
    return client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=tokens, extra_body={"ignore_eos": True}, **more
    )


def kill_when_three_answers_run():
    while b"\ntacet_sessions 3\n" not in urllib.request.urlopen(os.environ["TACET_EVALUATOR_METRICS"]).read():
        time.sleep(0.01)
    os.kill(int(os.environ["TACET_EVALUATOR"]), signal.SIGKILL)


killer = threading.Thread(target=kill_when_three_answers_run)
killer.start()
events = ask(480, stream=True)
lines = other.generate(model=MODEL, prompt=PROMPT, stream=True, options={"num_predict": 480, "temperature": 1.5})
next(iter(events)), next(lines)
asked.clear()
e = raises(openai.InternalServerError, lambda: ask(480))
killer.join()
# Shares of it were sent: it is not sent again.
assert asked == [(502, "false")] and e.status_code == 502, (asked, e)
e = raises(openai.APIError, lambda: [None for _ in events])
assert e.type == "server_error" and "alpha" in e.message, e
e = raises(ollama.ResponseError, lambda: [None for _ in lines])
assert "alpha" in e.error, e
# Nothing of this one is ever sent: asking again does no harm.
asked.clear()
raises(openai.InternalServerError, lambda: ask(4))
assert asked == [(503, None)] * 3, asked
