"""The ollama package, unchanged: models, texts and chats whole and as lines, embeddings, pulling, errors."""

import ollama
from endpoint import EMBED_MODEL, EMBED_URL, MODEL, PROMPT, STORY, TEXTS, TOKEN, URL, raises, same

headers = {"Authorization": f"Bearer {TOKEN}"}
client = ollama.Client(host=URL, headers=headers)
embedder = ollama.Client(host=EMBED_URL, headers=headers)
greedy = {"num_predict": 12, "temperature": 0, "repeat_penalty": 1}
user = [{"role": "user", "content": PROMPT}]

# Models.
listed = client.list().models
assert [m.model for m in listed] == [MODEL + ":latest"] and listed[0].size > 0 and listed[0].details.family == "llama"
shown = client.show(MODEL)
assert "completion" in shown.capabilities and shown.modelinfo["llama.context_length"] == 512, shown
assert "embedding" in embedder.show(EMBED_MODEL).capabilities

# Texts.
whole = client.generate(model=MODEL, prompt=PROMPT, options=greedy)
assert whole.response.startswith(STORY[:20]) and whole.done and whole.done_reason == "length", whole
assert whole.eval_count == 12 and whole.prompt_eval_count > 0 and whole.total_duration > 0
raw = client.generate(model=MODEL, prompt=PROMPT, raw=True, options=greedy)
assert raw.response.startswith(STORY[:20]), raw
lines = list(client.generate(model=MODEL, prompt=PROMPT, stream=True, options=greedy))
assert "".join(x.response for x in lines) == whole.response and [x.done for x in lines][-2:] == [False, True]
# What is served is loaded, whether a sequence is kept for a next turn or not.
assert [m.model for m in client.ps().models] == [MODEL + ":latest"]
client.generate(model=MODEL, keep_alive=0)
assert [m.model for m in client.ps().models] == [MODEL + ":latest"]

# Chats.
chat = client.chat(model=MODEL, messages=user, options=greedy)
assert chat.message.content == whole.response and chat.message.role == "assistant" and chat.eval_count == 12, chat
lines = list(client.chat(model=MODEL, messages=user, stream=True, options=greedy))
assert "".join(x.message.content for x in lines) == chat.message.content and lines[-1].done
stopped = client.chat(model=MODEL, messages=user, options={"temperature": 0, "repeat_penalty": 1, "stop": ["girl"]})
assert stopped.message.content == ", there was a little " and stopped.done_reason == "stop", stopped

# Embeddings.
both = embedder.embed(model=EMBED_MODEL, input=TEXTS)
one = embedder.embed(model=EMBED_MODEL, input=TEXTS[0])
assert len(both.embeddings) == 2 and both.prompt_eval_count > one.prompt_eval_count > 0
assert same(both.embeddings[0], one.embeddings[0]) and not same(both.embeddings[1], one.embeddings[0])
assert same(embedder.embeddings(model=EMBED_MODEL, prompt=TEXTS[0]).embedding, one.embeddings[0])

# Pulling what is there is done at once; this endpoint fetches nothing else.
assert client.pull(MODEL).status == "success"
assert [p.status for p in client.pull(MODEL, stream=True)][-1] == "success"
# Not there, or the hub is out of reach.
assert raises(ollama.ResponseError, lambda: client.pull("absent")).status_code in (404, 502)

# Errors.
e = raises(ollama.ResponseError, lambda: client.generate(model="absent", prompt=PROMPT))
assert e.status_code == 404 and "absent" in e.error, e
e = raises(ollama.ResponseError, lambda: client.generate(model=MODEL, prompt=PROMPT, options={"temperature": -1}))
assert e.status_code == 400 and "temperature" in e.error, e
e = raises(ollama.ResponseError, lambda: client.embed(model=MODEL, input="x"))
assert e.status_code == 400 and "does not embed" in e.error, e
e = raises(ollama.ResponseError, lambda: client.chat(model=MODEL, messages=user, think=True))
assert e.status_code == 400 and "think" in e.error, e
assert raises(ollama.ResponseError, lambda: ollama.Client(host=URL).list()).status_code == 401
