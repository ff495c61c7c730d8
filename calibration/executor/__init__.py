"""Schedules that are executed on GPUs, as the simulation decides them."""
