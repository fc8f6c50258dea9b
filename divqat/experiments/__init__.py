"""Whole jobs: train, deploy and evaluate victims, over seeds."""
