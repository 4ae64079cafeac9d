"""Messages of Anthropic's API, as its reference has them: https://docs.anthropic.com/en/api/messages."""
