"""Who decides what, and when: memory manager, replay, overlapped decoder, scenario, simulate."""
