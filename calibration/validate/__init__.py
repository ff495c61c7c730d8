"""What was executed beside what is simulated."""
