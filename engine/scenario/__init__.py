"""The scenario: its sections, what goes together, and what it names."""
