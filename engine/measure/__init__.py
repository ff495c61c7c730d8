"""What a run comes to: every number is a function of the spans and counts that it recorded."""
