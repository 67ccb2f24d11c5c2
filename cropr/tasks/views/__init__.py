"""What ``python -m cropr show`` asks of a task. Training needs none of it."""
