"""HTTP: the chat page, an API that OpenAI's clients speak, and everything between them and untrusted input."""
