"""xinference-client, unchanged: it lists models, takes the handle that a model's abilities ask for, and uses it."""

from endpoint import EMBED_MODEL, EMBED_URL, MODEL, PROMPT, STORY, TEXTS, TOKEN, URL, raises, same
from xinference_client import RESTfulClient
from xinference_client.client.restful.restful_client import RESTfulChatModelHandle, RESTfulEmbeddingModelHandle

client = RESTfulClient(URL, api_key=TOKEN)
models = client.list_models()
assert list(models) == [MODEL] and models[MODEL]["model_type"] == "LLM" and models[MODEL]["context_length"] == 512
assert "chat" in client.describe_model(MODEL)["model_ability"]
handle = client.get_model(MODEL)
assert type(handle) is RESTfulChatModelHandle

greedy = {"max_tokens": 12, "temperature": 0}
text = handle.generate(PROMPT, generate_config=greedy)
assert text["choices"][0]["text"].startswith(STORY[:20]) and text["usage"]["completion_tokens"] == 12, text
chunks = list(handle.generate(PROMPT, generate_config={"stream": True, **greedy}))
assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == text["choices"][0]["text"]
user = [{"role": "user", "content": PROMPT}]
chat = handle.chat(user, generate_config=greedy)
assert chat["choices"][0]["message"]["content"].startswith(STORY[:20]), chat
chunks = list(handle.chat(user, generate_config={"stream": True, **greedy}))
whole = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
assert whole == chat["choices"][0]["message"]["content"]
assert "404" in str(raises(RuntimeError, lambda: client.get_model("absent")))

embedder = RESTfulClient(EMBED_URL, api_key=TOKEN).get_model(EMBED_MODEL)
assert type(embedder) is RESTfulEmbeddingModelHandle
vectors = [d["embedding"] for d in embedder.create_embedding(TEXTS)["data"]]
assert same(vectors[0], embedder.create_embedding(TEXTS[0])["data"][0]["embedding"]) and not same(*vectors)
