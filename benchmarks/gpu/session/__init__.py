"""What `make gpu` runs on a machine with a GPU: build, test, sanitize and benchmark within 9 minutes."""
