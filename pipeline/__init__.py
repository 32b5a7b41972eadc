"""What happens to one row or one batch: plain functions, no Ray."""
