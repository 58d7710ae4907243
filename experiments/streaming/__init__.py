"""The speed and the cost of decoding images while training."""
