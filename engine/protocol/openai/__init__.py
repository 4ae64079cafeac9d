"""Chat and completions of OpenAI's API, as its reference has them: https://platform.openai.com/docs/api-reference."""
