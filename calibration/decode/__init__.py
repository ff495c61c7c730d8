"""A real offloading runtime: a transformers model, its experts in host memory, decoded as the simulator decides."""
