"""The first real runs: does it learn, and how fast?"""
