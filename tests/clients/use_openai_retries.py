"""What the openai package tries again by itself: not an answer whose shares were sent, but a request that nobody saw.

An evaluator of this endpoint's lane is killed while it answers."""

import os
import signal
import threading
import time
import urllib.request

import httpx
import openai
from endpoint import MODEL, PROMPT, TOKEN, URL, raises

asked = []
http = httpx.Client(event_hooks={"response": [lambda r: asked.append((r.status_code, r.headers.get("x-should-retry")))]})
client = openai.OpenAI(base_url=URL + "/v1", api_key=TOKEN, max_retries=2, http_client=http)


def ask(tokens):
    ignore_eos = {"ignore_eos": True}
    return client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=tokens, extra_body=ignore_eos)


def kill_while_it_runs():
    while b"\ntacet_sessions 1\n" not in urllib.request.urlopen(os.environ["TACET_EVALUATOR_METRICS"]).read():
        time.sleep(0.01)
    os.kill(int(os.environ["TACET_EVALUATOR"]), signal.SIGKILL)


killer = threading.Thread(target=kill_while_it_runs)
killer.start()
e = raises(openai.InternalServerError, lambda: ask(480))
killer.join()
assert asked == [(502, "false")] and e.status_code == 502, (asked, e)
# Nothing of this one is ever sent: asking again does no harm.
asked.clear()
raises(openai.InternalServerError, lambda: ask(4))
assert asked == [(503, None)] * 3, asked
