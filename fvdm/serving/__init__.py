"""Trained models in MLflow's registry."""
