"""From measurements to the costs of a profile."""
