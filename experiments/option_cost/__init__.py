"""What options cost a training step."""
