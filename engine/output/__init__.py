"""What comes out of a run: metrics, timeline export, plots."""
