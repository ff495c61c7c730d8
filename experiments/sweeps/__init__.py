"""Shipped sweeps, one TOML file each: a scenario and a grid over it."""
