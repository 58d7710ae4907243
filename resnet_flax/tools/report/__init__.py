"""Reports of runs: `python -m resnet_flax.report WORKDIR... --out=FOLDER`."""
