"""Trackers that people already have: TensorBoard, MLflow, Weights & Biases, and others by entry point."""
