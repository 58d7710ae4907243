"""Speed of training, inference, the input pipeline and the start on a CPU."""
