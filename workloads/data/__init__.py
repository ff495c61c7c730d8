"""Shipped routing traces, recorded from models of our own, each with a report of where it is from."""
