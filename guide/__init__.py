"""The original guide's own face: its virtual memory manager, its inference simulator and its tables, run again."""
