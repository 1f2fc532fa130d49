"""Programs that decode: captured without a cache, attention rewritten to read stores of keys and values."""
