"""What `make gpu` runs on a machine with a GPU: build, check, test, time and sanitize, within ten minutes."""
