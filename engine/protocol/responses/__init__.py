"""OpenAI's Responses, without a memory: whoever asks sends the whole conversation.

Source: OpenAI's API reference, "Responses" (https://platform.openai.com/docs/api-reference/responses). Bodies are
read as chats, which ask for the same in other words.
"""
