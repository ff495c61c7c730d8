"""Published runs of real engines: a TOML file a source."""
