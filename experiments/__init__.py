"""Many runs: sweeps, comparisons, break-even and benchmark suites."""
