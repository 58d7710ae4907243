"""Networks, their blocks and layers; `registry` has the networks by name."""
