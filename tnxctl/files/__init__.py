"""Files of settings: read within limits, TOML with errors in words, and written whole or not at all."""
