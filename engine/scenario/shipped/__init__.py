"""Shipped scenarios, one TOML file each."""
