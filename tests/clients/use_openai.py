"""The openai package, unchanged: chat, completions, embeddings, models, and the error class of each status."""

import httpx
import openai
from endpoint import EMBED_MODEL, EMBED_URL, MODEL, PROMPT, RUNNING, STORY, TEXTS, TOKEN, URL, raises, same

client = openai.OpenAI(base_url=URL + "/v1", api_key=TOKEN, max_retries=0)
embedder = openai.OpenAI(base_url=EMBED_URL + "/v1", api_key=TOKEN, max_retries=0)
greedy = {"model": MODEL, "max_tokens": 12, "temperature": 0}
user = [{"role": "user", "content": PROMPT}]

# Chats, whole and as a stream.
chat = client.chat.completions.create(messages=user, **greedy)
assert chat.choices[0].message.content.startswith(STORY[:20]), chat
assert chat.choices[0].finish_reason == "length" and chat.usage.completion_tokens == 12, chat
assert chat.usage.total_tokens == chat.usage.prompt_tokens + 12, chat
chunks = list(
    client.chat.completions.create(messages=user, stream=True, stream_options={"include_usage": True}, **greedy)
)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.choices[0].message.content
assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
top = client.chat.completions.create(messages=user, logprobs=True, top_logprobs=3, **greedy).choices[0].logprobs.content
assert len(top) == 12 and all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in top)
# Stop strings and sampling reach the sampler.
short = client.chat.completions.create(model=MODEL, messages=user, max_tokens=40, temperature=0, stop=["girl"])
assert short.choices[0].message.content == ", there was a little " and short.choices[0].finish_reason == "stop", short
with client.chat.completions.stream(model=MODEL, messages=user, max_tokens=40, temperature=0, stop=["girl"]) as stream:
    assert stream.get_final_completion().choices[0].message.content == short.choices[0].message.content
# The last digits of logits are not repeatable, so that a seed almost always gives the same draw, but not always.
drawn = client.chat.completions.create(model=MODEL, messages=user, max_tokens=8, seed=7, temperature=1.5, top_p=0.9)
assert drawn.usage.completion_tokens <= 8 and isinstance(drawn.choices[0].message.content, str)

# Completions: text, tokens, and the probabilities of what was given.
whole = client.completions.create(prompt=PROMPT, **greedy)
assert whole.choices[0].text.startswith(STORY[:20]), whole
assert "".join(c.choices[0].text for c in client.completions.create(prompt=PROMPT, stream=True, **greedy)) == (
    whole.choices[0].text
)
echo = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1).choices[0]
assert echo.text == PROMPT and echo.logprobs.token_logprobs[0] is None
# One for the begin token; each is the likelihood of a token after those before it.
assert len(echo.logprobs.tokens) == whole.usage.prompt_tokens
assert all(p <= 0 for p in echo.logprobs.token_logprobs[1:])
assert max(echo.logprobs.token_logprobs[2:]) > -0.5, "the words of a tale follow one another"
ids = [1, 403, 407, 261, 378]
tokens = client.completions.create(prompt=ids, **greedy)
assert tokens.choices[0].text.startswith(STORY[:20]) and tokens.usage.prompt_tokens == 5, tokens
both = client.completions.create(prompt=[ids, ids[:3]], **greedy)
assert [c.index for c in both.choices] == [0, 1] and both.choices[0].text == tokens.choices[0].text

# Embeddings: base64 unless it is asked for numbers.
vectors = embedder.embeddings.create(model=EMBED_MODEL, input=TEXTS)
assert [d.index for d in vectors.data] == [0, 1] and vectors.usage.prompt_tokens > 0
floats = embedder.embeddings.create(model=EMBED_MODEL, input=TEXTS[0], encoding_format="float").data[0].embedding
assert same(vectors.data[0].embedding, floats) and not same(floats, vectors.data[1].embedding)
raw = embedder.embeddings.with_raw_response.create(model=EMBED_MODEL, input=TEXTS[0], encoding_format="base64")
assert isinstance(raw.http_response.json()["data"][0]["embedding"], str)

# Models.
assert [m.id for m in client.models.list()] == [MODEL]
assert client.models.retrieve(MODEL).id == MODEL

# Errors by class: 400, 401, 404.
e = raises(openai.BadRequestError, lambda: client.completions.create(model=MODEL, prompt="x", temperature=-1))
assert e.param == "temperature" and e.type == "invalid_request_error", e.body
long = [{"role": "user", "content": "tale " * 2000}]
e = raises(openai.BadRequestError, lambda: client.chat.completions.create(model=MODEL, messages=long))
assert e.code == "context_length_exceeded", e.body
raises(openai.BadRequestError, lambda: client.embeddings.create(model=MODEL, input="x"))
raises(openai.BadRequestError, lambda: embedder.chat.completions.create(model=EMBED_MODEL, messages=user))
e = raises(openai.NotFoundError, lambda: client.chat.completions.create(model="gpt-4o", messages=user))
assert e.code == "model_not_found" and "gpt-4o" in e.message, e.body
raises(openai.NotFoundError, lambda: client.models.retrieve("gpt-4o"))
raises(openai.AuthenticationError, lambda: client.with_options(api_key="guess").models.list())

# 429: as many answers run as the endpoint allows. The package waits as it is told and asks again.
endless = {"model": MODEL, "prompt": PROMPT, "max_tokens": 480, "stream": True, "extra_body": {"ignore_eos": True}}
running = [client.completions.create(**endless) for _ in range(RUNNING)]
for r in running:
    next(iter(r))
e = raises(openai.RateLimitError, lambda: client.completions.create(prompt=PROMPT, **greedy))
assert e.code == "rate_limit_exceeded" and e.response.headers["retry-after"] == "1", e.body
asked = []


def saw(response):
    asked.append(response.status_code)
    for r in running:
        r.close()


http = httpx.Client(event_hooks={"response": [saw]})
patient = openai.OpenAI(base_url=URL + "/v1", api_key=TOKEN, max_retries=20, http_client=http)
assert patient.completions.create(prompt=PROMPT, **greedy).choices[0].text == whole.choices[0].text
assert asked[0] == 429 and asked[-1] == 200, asked
