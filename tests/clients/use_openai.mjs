// npm's openai package, unchanged: chat, its stream, embeddings, models, errors.

import assert from "node:assert/strict";
import OpenAI from "openai";

const { TACET_URL, TACET_MODEL: model, TACET_EMBED_URL, TACET_EMBED_MODEL, TACET_TOKEN: apiKey, TACET_TEXTS } = process.env;
const client = new OpenAI({ baseURL: TACET_URL + "/v1", apiKey, maxRetries: 0 });
const embedder = new OpenAI({ baseURL: TACET_EMBED_URL + "/v1", apiKey, maxRetries: 0 });
const greedy = { model, max_tokens: 12, temperature: 0 };
const messages = [{ role: "user", content: "Once upon a time" }];

const chat = await client.chat.completions.create({ messages, ...greedy });
const text = chat.choices[0].message.content;
assert(text.startsWith(", there was a little"), text);
assert.deepEqual([chat.choices[0].finish_reason, chat.usage.completion_tokens], ["length", 12]);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ messages, stream: true, ...greedy })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
}
assert.equal(streamed, text);
const complete = await client.completions.create({ prompt: "Once upon a time", ...greedy });
assert(complete.choices[0].text.startsWith(", there was a little"), complete.choices[0].text);

// Asks for base64 by itself and decodes it.
const texts = TACET_TEXTS.split("|");
const [a, b] = (await embedder.embeddings.create({ model: TACET_EMBED_MODEL, input: texts })).data.map((d) => d.embedding);
const again = await embedder.embeddings.create({ model: TACET_EMBED_MODEL, input: texts[0], encoding_format: "float" });
const dot = (x, y) => x.reduce((sum, v, i) => sum + v * y[i], 0);
assert(Math.abs(dot(a, a) - 1) < 1e-3 && dot(a, again.data[0].embedding) > 0.999 && dot(a, b) < 0.999);

const ids = [];
for await (const m of client.models.list()) ids.push(m.id);
assert.deepEqual(ids, [model]);
await assert.rejects(client.chat.completions.create({ messages, ...greedy, model: "absent" }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ messages, ...greedy, temperature: -1 }), OpenAI.BadRequestError);
await assert.rejects(client.withOptions({ apiKey: "guess" }).models.list(), OpenAI.AuthenticationError);
