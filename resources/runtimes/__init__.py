"""Shipped runtimes: a TOML file each."""
