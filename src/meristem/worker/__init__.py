"""What may hang gets a time: ``deadline`` and ``breaker`` are values, ``process`` makes calls that can be stopped."""
