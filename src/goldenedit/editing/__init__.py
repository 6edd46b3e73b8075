"""From facts to keys, values and the deltas of an edit."""
