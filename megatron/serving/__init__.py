"""Serve a trained model over HTTP: OpenAI's completions and chat API, a page to try it, metrics."""
