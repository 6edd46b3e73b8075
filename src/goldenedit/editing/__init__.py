"""From facts to keys, values and key statistics."""
