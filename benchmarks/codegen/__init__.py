"""What do the compilers make of the GPU kernels, and what does a launch cost the host? No GPU is needed."""
