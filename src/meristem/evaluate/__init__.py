"""What a model is worth, measured on text that it was not trained on."""
