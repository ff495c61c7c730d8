"""What the host decides and orders, in order, without a clock: visits, and the commands that they come to."""
