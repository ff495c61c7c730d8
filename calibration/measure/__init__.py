"""What a machine is measured for: copies, kernels, its drive."""
