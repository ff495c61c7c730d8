"""Model presets, one TOML file each."""
