"""Policies, one family per file; the table at the bottom of each names its members."""
