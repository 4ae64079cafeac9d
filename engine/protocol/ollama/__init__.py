"""Chat and generate of Ollama's API, as its reference has them: https://docs.ollama.com/api."""
