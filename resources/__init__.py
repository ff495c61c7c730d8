"""What things cost, and that they are busy: lanes, links, memory, profile, timeline."""
