"""Exit statuses of benchmarks that the session of `make gpu` tells apart."""

WRONG = 3  # some results are wrong, but the backend ends and can be tested further
RESTART = 75  # the GPU or a provider is stuck, and its rows say so: a new process can go on with the rest
