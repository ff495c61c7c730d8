"""What comes out of runs: tables, figures, reports and timeline files."""
