"""Requests under load: who arrives when and wants how much, KV blocks, steps, what comes out. No clock, no engine."""
