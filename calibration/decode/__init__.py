"""A real offloading runtime: a transformers model whose experts lie in host memory, decoded as the simulator decides."""
