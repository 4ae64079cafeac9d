// Node's clients of OpenAI, Anthropic and Ollama against a server: node clients.mjs URL FOLDER, where FOLDER/node_modules
// has `openai`, `@anthropic-ai/sdk` and `ollama`. What is streamed has to be what is not; prints how much was compared.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [url, folder] = process.argv.slice(2);
const require = createRequire(`${folder}/`);
const { OpenAI } = require("openai");
const { Anthropic } = require("@anthropic-ai/sdk");
const { Ollama } = require("ollama");

const messages = [{ role: "user", content: "Name three colours." }];
const schema = {
  type: "object",
  properties: { name: { type: "string", maxLength: 8 }, age: { type: "integer", minimum: 1, maximum: 99 } },
  required: ["name", "age"],
  additionalProperties: false,
};
const parameters = { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"], additionalProperties: false };
let compared = 0;
function same(one, other) {
  assert.deepEqual(one, other);
  compared += 1;
}

// OpenAI: chats, completions, tools, structured output, responses, errors.
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const asked = { model: "smol", messages, temperature: 0, max_tokens: 12 };
const plain = await openai.chat.completions.create(asked);
let text = "", usage;
for await (const chunk of await openai.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
same(text, plain.choices[0].message.content);
same(usage, plain.usage);
const helper = openai.chat.completions.stream({ ...asked, stream: true });
same((await helper.finalChatCompletion()).choices[0].message.content, text);
const tools = [{ type: "function", function: { name: "weather", parameters } }];
// SmolLM2's template tells of no calls, so a template with some comes along.
const template =
  "{# <tool_call> arguments #}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}" +
  "{% endfor %}{{ '<|im_start|>assistant\n' }}";
const forced = { ...asked, max_tokens: 60, tools, tool_choice: "required", parallel_tool_calls: false, chat_template: template };
const called = await openai.chat.completions.create(forced);
same(called.choices[0].finish_reason, "tool_calls");
assert.ok(["Paris", "Rome"].includes(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).city));
const streamed = await openai.chat.completions.stream({ ...forced, stream: true }).finalChatCompletion();
same(streamed.choices[0].message.tool_calls[0].function, called.choices[0].message.tool_calls[0].function);
const form = { type: "json_schema", json_schema: { name: "person", schema, strict: true } };
const person = JSON.parse((await openai.chat.completions.create({ ...asked, max_tokens: 80, response_format: form })).choices[0].message.content);
same(Object.keys(person), ["name", "age"]);
const response = await openai.responses.create({ model: "smol", input: "Name three colours.", temperature: 0, max_output_tokens: 12 });
let said = "";
for await (const event of await openai.responses.create({ model: "smol", input: "Name three colours.", temperature: 0, max_output_tokens: 12, stream: true })) {
  if (event.type === "response.output_text.delta") said += event.delta;
}
same(said, response.output_text);
await assert.rejects(openai.chat.completions.create({ ...asked, model: "nobody" }), OpenAI.NotFoundError);
await assert.rejects(openai.chat.completions.create({ ...asked, temperature: -1 }), OpenAI.BadRequestError);

// Anthropic: messages, their stream, tools, counts, errors.
const anthropic = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const message = { model: "smol", max_tokens: 12, temperature: 0, messages };
const whole = await anthropic.messages.create(message);
const pieces = await anthropic.messages.stream(message).finalMessage();
same(pieces.content, whole.content);
same(pieces.stop_reason, whole.stop_reason);
same(whole.content[0].text, text);
const tool = [{ name: "weather", input_schema: parameters }];
const use = await anthropic.messages.create({ ...message, max_tokens: 60, tools: tool, tool_choice: { type: "any", disable_parallel_tool_use: true }, chat_template: template });
same(use.stop_reason, "tool_use");
assert.ok(["Paris", "Rome"].includes(use.content.find((block) => block.type === "tool_use").input.city));
same((await anthropic.messages.countTokens({ model: "smol", messages })).input_tokens, plain.usage.prompt_tokens);
await assert.rejects(anthropic.messages.create({ ...message, model: "nobody" }), Anthropic.NotFoundError);

// Ollama: chats and their stream, generate, formats, models.
const ollama = new Ollama({ host: url });
const options = { temperature: 0, num_predict: 12 };
const chat = await ollama.chat({ model: "smol", messages, options });
let lines = "";
for await (const part of await ollama.chat({ model: "smol", messages, options, stream: true })) lines += part.message.content;
same(lines, chat.message.content);
same(lines, text);
const formed = await ollama.generate({ model: "smol", prompt: "A person:", format: schema, options: { temperature: 0, num_predict: 80 } });
same(Object.keys(JSON.parse(formed.response)), ["name", "age"]);
assert.ok((await ollama.list()).models.length > 0);
await assert.rejects(ollama.chat({ model: "nobody", messages }), { status_code: 404 });
console.log(compared);
