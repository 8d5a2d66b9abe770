"""How benchmarks tell the session of `make gpu` what happened: exit statuses, and one word of output."""

WRONG = 3  # some results are wrong, but the backend ends and can be tested further
RESTART = 75  # the GPU or a provider is stuck, and its rows say so: a new process can go on with the rest
SOLVING = "solving "  # a line that begins so: Python has started, and the backend is at work
