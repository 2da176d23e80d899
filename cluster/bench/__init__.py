"""`cluster bench`: load over HTTP against any OpenAI-compatible server, and what came of it."""
