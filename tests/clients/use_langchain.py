"""langchain-openai, unchanged: a chat, its stream, and embeddings."""

from endpoint import EMBED_MODEL, EMBED_URL, MODEL, PROMPT, STORY, TEXTS, TOKEN, URL, same
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

chat = ChatOpenAI(base_url=URL + "/v1", api_key=TOKEN, model=MODEL, max_tokens=12, temperature=0, max_retries=0)
whole = chat.invoke(PROMPT)
assert whole.content.startswith(STORY[:20]), whole
assert whole.usage_metadata["output_tokens"] == 12 and whole.response_metadata["finish_reason"] == "length", whole
assert "".join(c.content for c in chat.stream(PROMPT)) == whole.content
two = chat.invoke([SystemMessage("Tell a tale."), HumanMessage(PROMPT)])
assert two.content and two.usage_metadata["input_tokens"] > whole.usage_metadata["input_tokens"], two
assert [a.content for a in chat.batch([PROMPT, PROMPT], config={"max_concurrency": 1})] == [whole.content] * 2

# Unless it is told not to, it cuts texts into tokens of OpenAI's own models, which are no other model's.
embeddings = OpenAIEmbeddings(
    base_url=EMBED_URL + "/v1", api_key=TOKEN, model=EMBED_MODEL, check_embedding_ctx_length=False, max_retries=0
)
documents = embeddings.embed_documents(TEXTS)
query = embeddings.embed_query(TEXTS[0])
assert same(query, documents[0]) and not same(query, documents[1])
