"""litellm, unchanged, by both of its roads: OpenAI's and Ollama's."""

import os

# Its list of models and prices comes with the package; this keeps it from fetching another.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
from endpoint import EMBED_MODEL, EMBED_URL, MODEL, PROMPT, STORY, TEXTS, TOKEN, URL, raises, same

litellm.suppress_debug_info = True

greedy = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "temperature": 0, "num_retries": 0}
texts = {}
for road, base in [("openai", URL + "/v1"), ("ollama_chat", URL)]:
    to = {"model": f"{road}/{MODEL}", "api_base": base, "api_key": TOKEN}
    if road == "ollama_chat":
        to["repeat_penalty"] = 1
    whole = litellm.completion(**to, **greedy)
    texts[road] = whole.choices[0].message.content
    assert texts[road].startswith(STORY[:20]) and whole.usage.completion_tokens == 12, whole
    assert whole.choices[0].finish_reason == "length", whole
    chunks = list(litellm.completion(stream=True, **to, **greedy))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == texts[road]
    absent = {**to, "model": f"{road}/absent"}
    raises(litellm.NotFoundError, lambda: litellm.completion(**absent, **greedy))
assert texts["openai"] == texts["ollama_chat"], texts

to = {"model": f"openai/{EMBED_MODEL}", "api_base": EMBED_URL + "/v1", "api_key": TOKEN}
vectors = [d["embedding"] for d in litellm.embedding(input=TEXTS, **to).data]
again = litellm.embedding(input=TEXTS[:1], **to).data[0]["embedding"]
assert same(vectors[0], again) and not same(*vectors)
