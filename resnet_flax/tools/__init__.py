"""What is done with a run: summary, conversion, report."""
