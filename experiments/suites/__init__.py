"""Shipped benchmark suites, one TOML file each: what `prestage suite` runs and shows."""
