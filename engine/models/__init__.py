"""The networks, with the official parameter names."""
