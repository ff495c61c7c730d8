"""What a notebook works with: runs from a name and settings, and results that show themselves."""
