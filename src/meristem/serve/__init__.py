"""Use of a trained model: sessions that remember, and the files that hold them."""
