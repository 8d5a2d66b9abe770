"""Programs that tests run in their own Python process, through helpers/processes.py."""
