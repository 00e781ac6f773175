"""A page in the browser: choose a task or draw a schedule, and watch the clip become clear."""
