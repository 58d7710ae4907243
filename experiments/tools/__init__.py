"""Commands beside the package: sweeps, tables of networks, the TPU compiler."""
