"""Model files: from shapes in TOML, a Hugging Face config.json or a GGUF header to the bytes that a run moves."""
